//! Counts shared with other gates: from settings to a running part.

use super::AppError;
use crate::clock::Clock;
use crate::cluster::Cluster;
use crate::cluster::coordinator::Settings;
use crate::cluster::protocol::OnLoss;
use crate::cluster::valkey::{Place, Valkey};
use crate::config::{self, ClusterMode, Config};
use crate::gate::reservation::Reservation;
use crate::proxy::SharedLimits;
use async_trait::async_trait;
use std::sync::Arc;
use tokio::time::Instant;

/// The shared counts of a gate, if its configuration has a section `cluster`.
pub fn assemble(config: &Config, clock: &Clock) -> Result<Option<Cluster>, AppError> {
    let (Some(cluster), Some(gate)) = (&config.cluster, &config.gate) else {
        return Ok(None);
    };
    let urls = || {
        cluster
            .urls
            .iter()
            .map(|url| url.expose().to_owned())
            .collect::<Vec<_>>()
    };
    let place = match &cluster.mode {
        ClusterMode::Single => Place::Server(urls().into_iter().next().unwrap_or_default()),
        ClusterMode::Sentinel { master } => Place::Sentinel {
            urls: urls(),
            master: master.clone(),
        },
        ClusterMode::Cluster => Place::Cluster(urls()),
    };
    // A little sooner than the exchange is given up: a connection that hangs is then dropped, and not met again.
    let patience = cluster.lost_after - cluster.lost_after / 10;
    let store = Valkey::new(&place, &cluster.key_prefix, patience)
        .map_err(|error| AppError::Failed(format!("cluster.url: {error}")))?;
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(|error| AppError::Failed(format!("no random numbers: {error}")))?;
    let settings = Settings {
        id: u64::from_ne_bytes(random),
        name: gate.name.as_str().into(),
        on_loss: match cluster.on_loss {
            config::OnLoss::Share => OnLoss::Share,
            config::OnLoss::Closed => OnLoss::Closed,
            config::OnLoss::Local => OnLoss::Local,
        },
        lost_after: cluster.lost_after,
        max_clock_skew: cluster.max_clock_skew,
        longest_window_ms: config
            .tiers
            .iter()
            .map(|tier| tier.window.as_millis() as u64)
            .max()
            .unwrap_or(1_000),
    };
    Ok(Some(Cluster::new(
        &settings,
        cluster.wait,
        Arc::new(store),
        clock.clone(),
    )))
}

/// The cluster as the proxy sees it: the two parts know nothing of each other.
#[async_trait]
impl SharedLimits for Cluster {
    fn want(&self, reservation: &Arc<Reservation>) {
        Cluster::want(self, reservation);
    }

    fn deadline(&self) -> Instant {
        Cluster::deadline(self)
    }

    async fn wait(&self, reservation: &Arc<Reservation>, deadline: Instant) -> bool {
        Cluster::wait(self, reservation, deadline).await
    }

    fn waited(&self, in_vain: bool) {
        self.count_wait(in_vain);
    }
}
