//! Every metric there is: its name, its labels, what it tells. `src/manual/metrics.md` is written from this.

use crate::telemetry::metrics::Description;
use std::fmt::Write as _;

/// A part of the reference page: its title and its metrics.
pub type Group = (&'static str, &'static [&'static Description]);

/// All metrics, in the order of the reference page.
pub const GROUPS: &[Group] = &[
    (
        "Requests",
        &[
            &REQUESTS,
            &RESPONSES,
            &REQUESTS_IN_FLIGHT,
            &DECISION,
            &OVERHEAD,
            &UPSTREAM,
            &KEY_REQUESTS,
            &CONNECTIONS,
            &CONNECTIONS_CAPPED,
            &HANDSHAKES_FAILED,
            &ACCESS_LOG_LINES,
            &ACCESS_LOG_DROPPED,
        ],
    ),
    (
        "Upstreams",
        &[&UPSTREAM_UP, &HEALTH_CHECKS, &CONNECT_FAILURES, &RETRIES],
    ),
    (
        "Keys",
        &[
            &READY,
            &SNAPSHOT_KEYS,
            &SNAPSHOT_REVISION,
            &SNAPSHOT_AGE,
            &FEED_CONNECTED,
            &FEED_CONNECTIONS,
            &FEED_CHANGES,
            &FEED_REFUSED,
            &FEED_UNUSABLE_KEYS,
            &FEED_BEHIND,
            &SPOOL_FAILING,
        ],
    ),
    (
        "Usage and counts",
        &[
            &USAGE_SENT,
            &USAGE_UNSENT,
            &USAGE_UNSENT_BYTES,
            &USAGE_POST_FAILING,
            &JOURNAL_BYTES,
            &JOURNAL_FAILING,
        ],
    ),
    (
        "Shared counts",
        &[
            &CLUSTER_USABLE,
            &CLUSTER_GATES,
            &CLUSTER_WINDOWS,
            &CLUSTER_UNACKED,
            &CLUSTER_CALLS,
            &CLUSTER_LOST,
            &CLUSTER_GRANTED,
            &CLUSTER_DENIED,
            &CLUSTER_SHARED,
            &CLUSTER_IDENTITIES,
            &CLUSTER_WAITED,
            &CLUSTER_WAITED_IN_VAIN,
            &CLUSTER_LONGEST_WAIT,
        ],
    ),
    ("Control plane", &[&CONTROL_REVISION, &CONTROL_GATE_REVISION]),
    (
        "Process",
        &[
            &BUILD_INFO,
            &RELOADS,
            &RELOAD_SUCCESSFUL,
            &RELOAD_TIME,
            &CERTIFICATE_EXPIRY,
            &START_TIME,
            &CPU_SECONDS,
            &RESIDENT_MEMORY,
            &OPEN_FDS,
            &MAX_FDS,
        ],
    ),
];

pub static REQUESTS: Description = Description::counter(
    "tollgate_requests_total",
    &["code", "tier"],
    "Requests, by what was decided (`PASSED`, or the code of the refusal) and the tier of the route.",
);
pub static RESPONSES: Description = Description::counter(
    "tollgate_responses_total",
    &["class"],
    "Responses, by the class of their status (`2xx`); `none`: no response was sent.",
);
pub static REQUESTS_IN_FLIGHT: Description =
    Description::gauge("tollgate_requests_in_flight", &[], "Requests under way.");
pub static DECISION: Description = Description::histogram(
    "tollgate_decision_seconds",
    "From the head of a request to the decision that it passes.",
);
pub static OVERHEAD: Description = Description::histogram(
    "tollgate_overhead_seconds",
    "Tollgate's own part of a request: all of its time but what its upstream took and the transfer of the response's body.",
);
pub static UPSTREAM: Description = Description::histogram(
    "tollgate_upstream_seconds",
    "From choosing the upstream to the head of its response, or to its failure: connecting, further tries and sending the request included.",
);
pub static KEY_REQUESTS: Description = Description::counter(
    "tollgate_key_requests_total",
    &["key", "code"],
    "Requests of known keys, by the key's id and what was decided; only with `admin.key_labels`.",
);
pub static CONNECTIONS: Description = Description::gauge("tollgate_connections", &[], "Open connections of clients.");
pub static CONNECTIONS_CAPPED: Description = Description::counter(
    "tollgate_connections_capped_total",
    &[],
    "Connections of clients that were closed at once, since there were too many.",
);
pub static HANDSHAKES_FAILED: Description = Description::counter(
    "tollgate_handshakes_failed_total",
    &[],
    "TLS handshakes and PROXY headers of clients that failed.",
);
pub static ACCESS_LOG_LINES: Description = Description::counter(
    "tollgate_access_log_lines_total",
    &[],
    "Lines written to the access log.",
);
pub static ACCESS_LOG_DROPPED: Description = Description::counter(
    "tollgate_access_log_dropped_total",
    &[],
    "Lines of the access log that were lost, since they could not be written in time.",
);

pub static UPSTREAM_UP: Description = Description::gauge(
    "tollgate_upstream_up",
    &["upstream", "server"],
    "1 while requests go to a server that has health checks, 0 while they have taken it out.",
);
pub static HEALTH_CHECKS: Description = Description::counter(
    "tollgate_upstream_health_checks_total",
    &["upstream", "server", "result"],
    "Health checks, by their result: `success` or `failure`.",
);
pub static CONNECT_FAILURES: Description = Description::counter(
    "tollgate_upstream_connect_failures_total",
    &["upstream"],
    "Connections to an upstream that did not come about.",
);
pub static RETRIES: Description = Description::counter(
    "tollgate_upstream_retries_total",
    &["upstream"],
    "Further tries of requests of which nothing can have had an effect.",
);

pub static READY: Description = Description::gauge(
    "tollgate_ready",
    &[],
    "1 while the gate can serve requests, as `/readyz` says.",
);
pub static SNAPSHOT_KEYS: Description = Description::gauge("tollgate_snapshot_keys", &[], "Keys that the gate knows.");
pub static SNAPSHOT_REVISION: Description =
    Description::gauge("tollgate_snapshot_revision", &[], "Revision of the keys in force.");
pub static SNAPSHOT_AGE: Description = Description::gauge(
    "tollgate_snapshot_age_seconds",
    &[],
    "Time since the source of the keys was last heard.",
);
pub static FEED_CONNECTED: Description = Description::gauge(
    "tollgate_feed_connected",
    &[],
    "1 while the source of the keys is connected.",
);
pub static FEED_CONNECTIONS: Description = Description::counter(
    "tollgate_feed_connections_total",
    &[],
    "Connections made to the source of the keys.",
);
pub static FEED_CHANGES: Description =
    Description::counter("tollgate_feed_changes_total", &[], "Changes of keys that were applied.");
pub static FEED_REFUSED: Description = Description::counter(
    "tollgate_feed_refused_total",
    &[],
    "Streams and files of keys that were refused because of what was in them.",
);
pub static FEED_UNUSABLE_KEYS: Description = Description::counter(
    "tollgate_feed_unusable_keys_total",
    &[],
    "Keys that could not be taken over, and were left out.",
);
pub static FEED_BEHIND: Description = Description::gauge(
    "tollgate_feed_source_is_behind",
    &[],
    "1 while the source has an older revision than the gate.",
);
pub static SPOOL_FAILING: Description = Description::gauge(
    "tollgate_spool_failing",
    &[],
    "1 while the copy of the keys on disk cannot be written.",
);

pub static USAGE_SENT: Description = Description::counter(
    "tollgate_usage_batches_sent_total",
    &[],
    "Batches of usage that the control plane has taken.",
);
pub static USAGE_UNSENT: Description = Description::gauge(
    "tollgate_usage_batches_unsent",
    &[],
    "Batches of usage that wait on disk for the control plane.",
);
pub static USAGE_UNSENT_BYTES: Description =
    Description::gauge("tollgate_usage_unsent_bytes", &[], "What they take on disk.");
pub static USAGE_POST_FAILING: Description = Description::gauge(
    "tollgate_usage_post_failing",
    &[],
    "1 while usage cannot be posted to the control plane.",
);
pub static JOURNAL_BYTES: Description =
    Description::gauge("tollgate_journal_bytes", &[], "Size of the journal of window counts.");
pub static JOURNAL_FAILING: Description = Description::gauge(
    "tollgate_journal_failing",
    &[],
    "1 while window counts or usage cannot be written to disk.",
);

pub static CONTROL_REVISION: Description = Description::gauge(
    "tollgate_control_revision",
    &[],
    "Newest revision of the keys in the control plane.",
);
pub static CONTROL_GATE_REVISION: Description = Description::gauge(
    "tollgate_control_gate_revision",
    &["gate"],
    "Revision that a gate has acknowledged.",
);

pub static BUILD_INFO: Description = Description::gauge(
    "tollgate_build_info",
    &["version"],
    "1; the label has the version that runs.",
);
pub static RELOADS: Description = Description::counter(
    "tollgate_config_reloads_total",
    &["result"],
    "Reloads of the configuration, by their result: `success` or `failure`.",
);
pub static RELOAD_SUCCESSFUL: Description = Description::gauge(
    "tollgate_config_last_reload_successful",
    &[],
    "Whether the last reload of the configuration was applied; 1 also before the first.",
);
pub static RELOAD_TIME: Description = Description::gauge(
    "tollgate_config_last_reload_success_timestamp_seconds",
    &[],
    "When the configuration in force was read, in seconds since the Unix epoch.",
);
pub static CERTIFICATE_EXPIRY: Description = Description::gauge(
    "tollgate_certificate_expiry_timestamp_seconds",
    &["file"],
    "End of the validity of a certificate that is served, in seconds since the Unix epoch.",
);
pub static START_TIME: Description = Description::gauge(
    "process_start_time_seconds",
    &[],
    "When the process started, in seconds since the Unix epoch.",
);
pub static CPU_SECONDS: Description = Description::counter(
    "process_cpu_seconds_total",
    &[],
    "CPU time of all threads, user and system, in seconds.",
);
pub static RESIDENT_MEMORY: Description = Description::gauge(
    "process_resident_memory_bytes",
    &[],
    "Memory of the process that is in RAM.",
);
pub static OPEN_FDS: Description = Description::gauge("process_open_fds", &[], "Open file descriptors.");
pub static MAX_FDS: Description = Description::gauge(
    "process_max_fds",
    &[],
    "File descriptors that may be open: the soft limit.",
);

pub static CLUSTER_USABLE: Description = Description::gauge(
    "tollgate_cluster_usable",
    &[],
    "1 while grants of the store count, for windows of every length.",
);
pub static CLUSTER_GATES: Description = Description::gauge(
    "tollgate_cluster_gates",
    &[],
    "Gates that share the limits, this one included, as far as it was ever heard.",
);
pub static CLUSTER_WINDOWS: Description = Description::gauge(
    "tollgate_cluster_windows",
    &[],
    "Windows that this gate shares at the moment.",
);
pub static CLUSTER_UNACKED: Description = Description::gauge(
    "tollgate_cluster_unacked",
    &[],
    "Calls that the store has not answered yet.",
);
pub static CLUSTER_CALLS: Description = Description::counter(
    "tollgate_cluster_calls_total",
    &[],
    "Calls to the store, each for one window.",
);
pub static CLUSTER_LOST: Description = Description::counter(
    "tollgate_cluster_lost_total",
    &[],
    "Calls without an answer that could be used.",
);
pub static CLUSTER_GRANTED: Description =
    Description::counter("tollgate_cluster_granted_total", &[], "Permits that the store granted.");
pub static CLUSTER_DENIED: Description = Description::counter(
    "tollgate_cluster_denied_total",
    &[],
    "Calls that wanted permits and were granted none.",
);
pub static CLUSTER_SHARED: Description = Description::counter(
    "tollgate_cluster_shared_total",
    &[],
    "Permits that were given out of the gate's share while the store was lost.",
);
pub static CLUSTER_IDENTITIES: Description = Description::counter(
    "tollgate_cluster_identities_total",
    &[],
    "How often another store, or another content of it, was met.",
);
pub static CLUSTER_WAITED: Description = Description::counter(
    "tollgate_cluster_waited_total",
    &[],
    "Requests that waited for permits.",
);
pub static CLUSTER_WAITED_IN_VAIN: Description = Description::counter(
    "tollgate_cluster_waited_in_vain_total",
    &[],
    "Requests that waited and were refused.",
);
pub static CLUSTER_LONGEST_WAIT: Description = Description::gauge(
    "tollgate_cluster_longest_wait_seconds",
    &[],
    "The longest that a request has waited for permits since the gate began.",
);

/// The reference page.
pub fn reference() -> String {
    let mut page = String::from(HEAD);
    for (title, metrics) in GROUPS {
        let _ = write!(
            page,
            "\n## {title}\n\n| metric | type | labels | what it tells |\n|---|---|---|---|\n"
        );
        for metric in *metrics {
            let labels: Vec<String> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
            let (name, kind, help) = (metric.name, metric.kind, metric.help);
            let _ = writeln!(page, "| `{name}` | {kind} | {} | {help} |", labels.join(", "));
        }
    }
    page
}

const HEAD: &str =
    "<!-- Written from the descriptions in src/app/metrics/catalogue.rs: UPDATE_MANUAL=1 cargo test --test tidy -->
# Metrics

`GET /metrics` on the operator's listener (`admin.listen`): OpenMetrics 1.0 for whoever asks for it, as Prometheus does,
Prometheus' text format otherwise. A process has the metrics of its roles; a metric without a sample is left out.
Histograms are of durations and have buckets from 100 µs to 10 s. `conf/alerts.yaml` has alert rules,
`conf/grafana-dashboard.json` a dashboard; both use no other metrics than these.
";
