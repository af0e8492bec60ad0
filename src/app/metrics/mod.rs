//! Where each metric of a process is read.

mod catalogue;

pub use catalogue::{GROUPS, reference};

use super::gate_role::GateRole;
use crate::clock::Clock;
use crate::cluster::{Cluster, Status};
use crate::control::ControlPlane;
use crate::feed::{Feed, FeedStatus};
use crate::meter::{Meter, MeterStatus};
use crate::proxy::{Durations, Proxy, ProxyMetrics};
use crate::telemetry::metrics::{Description, HistogramSample, Metrics, Sample};
use crate::telemetry::process;
use crate::tls::ListenerTls;
use catalogue::*;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

/// A metric and how it is read from a source that has many.
type Reading<S, V = f64> = (&'static Description, fn(&S) -> V);

/// A metric that the system tells of this process, where it does.
type OfProcess = (&'static Description, fn() -> Option<f64>);

/// What the metrics of a process are read from.
pub struct Sources<'a> {
    pub gate: Option<&'a GateRole>,
    /// Set once the control plane of this process has opened its database; `None`: it has none.
    pub control: Option<Arc<OnceLock<ControlPlane>>>,
    pub certificates: Vec<Arc<ListenerTls>>,
    pub reloads: Arc<Reloads>,
    pub clock: Clock,
}

/// What is counted of the edge's connections. Relaxed, as all counters here: each stands for itself.
#[derive(Debug, Default)]
pub struct EdgeCounts {
    pub opened: AtomicU64,
    pub closed: AtomicU64,
    pub capped: AtomicU64,
    pub handshakes_failed: AtomicU64,
}

/// What came of reloads.
#[derive(Debug, Default)]
pub struct Reloads {
    pub succeeded: AtomicU64,
    pub failed: AtomicU64,
    /// 1 where the last one failed.
    pub last_failed: AtomicU64,
    /// When the settings in force were read, in milliseconds since the Unix epoch.
    pub in_force_since_unix_ms: AtomicU64,
}

/// All metrics of a process.
pub fn registry(sources: Sources<'_>) -> Metrics {
    let mut metrics = Metrics::default();
    if let Some(role) = sources.gate {
        requests(&mut metrics, role);
        upstreams(&mut metrics, &role.proxy);
        keys(&mut metrics, role, &sources.clock);
        usage(&mut metrics, &role.meter);
        if let Some(cluster) = &role.cluster {
            shared(&mut metrics, cluster);
        }
    }
    if let Some(control) = sources.control {
        self::control(&mut metrics, control, &sources.clock);
    }
    own(&mut metrics, sources.reloads, sources.certificates);
    metrics
}

fn requests(metrics: &mut Metrics, role: &GateRole) {
    let proxy = role.proxy.metrics();
    let read = proxy.clone();
    metrics.add(&REQUESTS, move || {
        let sample = |(code, tier, count): (&str, Box<str>, u64)| (vec![code.to_owned(), tier.into()], count as f64);
        read.requests().into_iter().map(sample).collect()
    });
    let read = proxy.clone();
    metrics.add(&RESPONSES, move || {
        let class = |n: usize| if n == 0 { "none".to_owned() } else { format!("{n}xx") };
        let count = |(n, count): (usize, u64)| (vec![class(n)], count as f64);
        read.by_class().into_iter().enumerate().map(count).collect()
    });
    let in_flight = role.in_flight.clone();
    metrics.add_one(&REQUESTS_IN_FLIGHT, move || load(&in_flight));
    let durations: [Reading<ProxyMetrics, Durations>; 3] = [
        (&DECISION, ProxyMetrics::decision),
        (&OVERHEAD, ProxyMetrics::overhead),
        (&UPSTREAM, ProxyMetrics::upstream),
    ];
    for (what, read) in durations {
        let proxy = proxy.clone();
        metrics.add_histogram(what, move || histogram(read(&proxy)));
    }
    let counted = role.proxy.clone();
    metrics.add(&KEY_REQUESTS, move || {
        let sample = |(key, code, count): (Box<str>, &str, u64)| (vec![key.into(), code.to_owned()], count as f64);
        counted.key_requests().into_iter().map(sample).collect()
    });
    let edge = role.edge_counts.clone();
    metrics.add_one(&CONNECTIONS, move || {
        // Closed before opened: what is opened between the two must not make it negative.
        let closed = load(&edge.closed);
        load(&edge.opened) - closed
    });
    let edge = role.edge_counts.clone();
    metrics.add_one(&CONNECTIONS_CAPPED, move || load(&edge.capped));
    let edge = role.edge_counts.clone();
    metrics.add_one(&HANDSHAKES_FAILED, move || load(&edge.handshakes_failed));
    if let Some((log, _)) = &role.access_log {
        let read = log.clone();
        metrics.add_one(&ACCESS_LOG_LINES, move || read.written() as f64);
        let read = log.clone();
        metrics.add_one(&ACCESS_LOG_DROPPED, move || read.dropped() as f64);
    }
}

fn shared(metrics: &mut Metrics, cluster: &Cluster) {
    let readings: [Reading<Status>; 13] = [
        (&CLUSTER_USABLE, |status| f64::from(u8::from(status.is_usable))),
        (&CLUSTER_GATES, |status| f64::from(status.gates)),
        (&CLUSTER_WINDOWS, |status| status.windows as f64),
        (&CLUSTER_UNACKED, |status| status.unacked as f64),
        (&CLUSTER_CALLS, |status| status.counts.asks as f64),
        (&CLUSTER_LOST, |status| status.counts.lost as f64),
        (&CLUSTER_GRANTED, |status| status.counts.granted as f64),
        (&CLUSTER_DENIED, |status| status.counts.denied as f64),
        (&CLUSTER_SHARED, |status| status.counts.shared as f64),
        (&CLUSTER_IDENTITIES, |status| status.counts.identities as f64),
        (&CLUSTER_WAITED, |status| status.waited as f64),
        (&CLUSTER_WAITED_IN_VAIN, |status| status.waited_in_vain as f64),
        (&CLUSTER_LONGEST_WAIT, |status| status.longest_wait.as_secs_f64()),
    ];
    for (what, read) in readings {
        let cluster = cluster.clone();
        metrics.add_one(what, move || read(&cluster.status()));
    }
}

fn upstreams(metrics: &mut Metrics, proxy: &Proxy) {
    let read = proxy.clone();
    metrics.add(&UPSTREAM_UP, move || {
        let checked = read.servers().into_iter().filter(|server| server.is_checked);
        checked
            .map(|server| {
                let labels = vec![server.upstream.into(), server.address.to_string()];
                (labels, truth(server.health.is_up()))
            })
            .collect()
    });
    let read = proxy.clone();
    metrics.add(&HEALTH_CHECKS, move || {
        let checked = read.servers().into_iter().filter(|server| server.is_checked);
        checked
            .flat_map(|server| {
                let (succeeded, failed) = server.health.checks();
                [("success", succeeded), ("failure", failed)].map(|(result, count)| {
                    let labels = vec![
                        server.upstream.to_string(),
                        server.address.to_string(),
                        result.to_owned(),
                    ];
                    (labels, count as f64)
                })
            })
            .collect()
    });
    let of_each = |read: fn(u64, u64) -> u64| {
        let proxy = proxy.clone();
        move || {
            let sample = |(upstream, failures, retries)| (vec![upstream], read(failures, retries) as f64);
            proxy.upstream_counts().into_iter().map(sample).collect()
        }
    };
    metrics.add(&CONNECT_FAILURES, of_each(|failures, _| failures));
    metrics.add(&RETRIES, of_each(|_, retries| retries));
}

fn keys(metrics: &mut Metrics, role: &GateRole, clock: &Clock) {
    let gate = role.gate.clone();
    metrics.add_one(&READY, move || truth(gate.is_ready()));
    let gate = role.gate.clone();
    metrics.add_one(&SNAPSHOT_KEYS, move || gate.key_count() as f64);
    let gate = role.gate.clone();
    metrics.add_one(&SNAPSHOT_REVISION, move || gate.revision().unwrap_or_default() as f64);
    let (feed, clock) = (role.feed.clone(), clock.clone());
    metrics.add(&SNAPSHOT_AGE, move || {
        let age_ms = |heard_ms: i64| (clock.now().unix_ms - heard_ms).max(0);
        let heard = feed.status().last_heard_unix_ms;
        heard
            .map(|heard_ms| unlabelled(age_ms(heard_ms) as f64 / 1000.0))
            .into_iter()
            .collect()
    });
    let of_feed: [Reading<FeedStatus>; 7] = [
        (&FEED_CONNECTED, |feed| truth(feed.connected)),
        (&FEED_CONNECTIONS, |feed| feed.connections as f64),
        (&FEED_CHANGES, |feed| feed.changes as f64),
        (&FEED_REFUSED, |feed| feed.refused as f64),
        (&FEED_UNUSABLE_KEYS, |feed| feed.unusable_keys as f64),
        (&FEED_BEHIND, |feed| truth(feed.source_is_behind)),
        (&SPOOL_FAILING, |feed| truth(feed.spool_error.is_some())),
    ];
    for (what, read) in of_feed {
        let feed: Arc<Feed> = role.feed.clone();
        metrics.add_one(what, move || read(&feed.status()));
    }
}

fn usage(metrics: &mut Metrics, meter: &Arc<Meter>) {
    let of_meter: [Reading<MeterStatus>; 6] = [
        (&USAGE_SENT, |meter| meter.sent_batches as f64),
        (&USAGE_UNSENT, |meter| meter.unsent_batches as f64),
        (&USAGE_UNSENT_BYTES, |meter| meter.unsent_bytes as f64),
        (&USAGE_POST_FAILING, |meter| truth(meter.post_error.is_some())),
        (&JOURNAL_BYTES, |meter| meter.journal_bytes as f64),
        (&JOURNAL_FAILING, |meter| truth(meter.disk_error.is_some())),
    ];
    for (what, read) in of_meter {
        let meter = meter.clone();
        metrics.add_one(what, move || read(&meter.status()));
    }
}

fn control(metrics: &mut Metrics, control: Arc<OnceLock<ControlPlane>>, clock: &Clock) {
    let read = control.clone();
    metrics.add(&CONTROL_REVISION, move || {
        read.get()
            .map(|control| unlabelled(control.revision() as f64))
            .into_iter()
            .collect()
    });
    let clock = clock.clone();
    metrics.add(&CONTROL_GATE_REVISION, move || {
        let gates = control.get().map(|control| control.gate_revisions(clock.now().unix_ms));
        let sample = |(gate, revision): (String, u64)| (vec![gate], revision as f64);
        gates.into_iter().flatten().map(sample).collect()
    });
}

fn own(metrics: &mut Metrics, reloads: Arc<Reloads>, certificates: Vec<Arc<ListenerTls>>) {
    metrics.add(&BUILD_INFO, || vec![(vec![env!("CARGO_PKG_VERSION").to_owned()], 1.0)]);
    let read = reloads.clone();
    metrics.add(&RELOADS, move || {
        let counts = [("success", &read.succeeded), ("failure", &read.failed)];
        counts
            .map(|(result, count)| (vec![result.to_owned()], load(count)))
            .into()
    });
    let read = reloads.clone();
    metrics.add_one(&RELOAD_SUCCESSFUL, move || 1.0 - load(&read.last_failed));
    metrics.add_one(&RELOAD_TIME, move || load(&reloads.in_force_since_unix_ms) / 1000.0);
    metrics.add(&CERTIFICATE_EXPIRY, move || {
        let all = certificates.iter().flat_map(|tls| tls.expiries());
        all.map(|(file, seconds)| (vec![file.display().to_string()], seconds as f64))
            .collect()
    });
    let of_process: [OfProcess; 5] = [
        (&START_TIME, process::start_time_seconds),
        (&CPU_SECONDS, process::cpu_seconds),
        (&RESIDENT_MEMORY, process::resident_memory_bytes),
        (&OPEN_FDS, process::open_fds),
        (&MAX_FDS, process::max_fds),
    ];
    for (what, read) in of_process {
        metrics.add(what, move || read().map(unlabelled).into_iter().collect());
    }
}

fn histogram(durations: Durations) -> HistogramSample {
    let bounds = crate::proxy::BUCKETS_US
        .iter()
        .map(|us| *us as f64 / 1e6)
        .chain([f64::INFINITY]);
    HistogramSample {
        buckets: bounds.zip(durations.counts).collect(),
        sum: durations.sum_us as f64 / 1e6,
    }
}

fn load(count: &AtomicU64) -> f64 {
    count.load(Ordering::Relaxed) as f64
}

fn truth(is: bool) -> f64 {
    f64::from(u8::from(is))
}

fn unlabelled(value: f64) -> Sample {
    (vec![], value)
}
