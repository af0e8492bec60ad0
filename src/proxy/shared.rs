//! Limits that are shared with other gates: a request that finds no reserved permits waits for some, for a bounded time.

use super::steps;
use crate::clock::{Clock, Now};
use crate::gate::reservation::Reservation;
use crate::gate::{Gate, Permit, Refusal};
use async_trait::async_trait;
use pingora::proxy::Session;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use tokio::time::Instant;

/// Where permits of shared limits come from.
#[async_trait]
pub trait SharedLimits: fmt::Debug + Send + Sync {
    /// More is wanted. Does not wait.
    fn want(&self, reservation: &Arc<Reservation>);

    /// Until when a request that finds none may wait.
    fn deadline(&self) -> Instant;

    /// More is wanted: waits until it is worth while to ask the gate again. `false`: it is not, by the deadline.
    async fn wait(&self, reservation: &Arc<Reservation>, deadline: Instant) -> bool;

    /// A request has waited, and was refused all the same or not.
    fn waited(&self, in_vain: bool);
}

/// Asks the gate, and waits where that may help.
pub(super) async fn check(
    limits: &dyn SharedLimits,
    gate: &Gate,
    clock: &Clock,
    session: &Session,
    client: IpAddr,
    mut now: Now,
) -> Result<Permit, Refusal> {
    let mut deadline = None;
    loop {
        let decided = steps::check(gate, session, client, now);
        let wanted = match &decided {
            Ok(permit) => {
                permit
                    .wanted()
                    .into_iter()
                    .for_each(|reservation| limits.want(reservation));
                None
            }
            Err(refusal) => refusal.wanted(),
        };
        let Some(wanted) = wanted else {
            if deadline.is_some() {
                limits.waited(decided.is_err());
            }
            return decided;
        };
        let until = *deadline.get_or_insert_with(|| limits.deadline());
        let (reservation, may_wait) = (wanted.reservation.clone(), Instant::now() < until);
        if wanted.tell && !may_wait {
            limits.want(&reservation);
        }
        if !may_wait || !limits.wait(&reservation, until).await {
            limits.waited(true);
            return decided.inspect_err(|refusal| gate.count_refusal(refusal, now));
        }
        now = clock.now();
    }
}
