//! Control plane, operator's listener, cluster and logs.

use std::time::Duration;

use super::super::fault::Path;
use super::super::file;
use super::super::scalar::Span;
use super::super::settings::{
    AccessLog, Admin, Cluster, ClusterMode, Control, Database, Format, Level, Log, OnLoss, Output, Registration,
    Retention, Secret,
};
use super::{Resolver, names_of};

const DAY: Duration = Duration::from_secs(24 * 3600);
/// Less is a slip of the pen: what is forgotten does not come back.
const LEAST_AUDIT: Duration = DAY;
/// The portal shows what was used in the longest window, of 30 days, by the minute.
const LEAST_USAGE: Duration = DAY.saturating_mul(31);
const LONGEST_KEPT: Duration = DAY.saturating_mul(36_500);

impl Resolver {
    pub(super) fn control(&mut self, control: &file::Control, file: &file::File) -> Control {
        let path = Path::root().key("control");
        let (address, tls) = match &control.listen {
            file::ControlListen::Address(address) => (address.0.clone(), None),
            file::ControlListen::Listener(listener) => {
                let tls = listener.tls.as_ref();
                (
                    listener.address.0.clone(),
                    tls.map(|tls| self.listener_tls(&path.key("listen").key("tls"), tls)),
                )
            }
        };
        if tls.is_some() {
            self.control_tls(&path, control, file);
        }
        let feed_token = self.secret(
            &path,
            "feed_token",
            control.feed_token.as_ref(),
            control.feed_token_file.as_deref(),
        );
        let admin_token = self.secret(
            &path,
            "admin_token",
            control.admin_token.as_ref(),
            control.admin_token_file.as_deref(),
        );
        if !feed_token.expose().is_empty() && feed_token == admin_token {
            let key = if control.admin_token.is_some() {
                "admin_token"
            } else {
                "admin_token_file"
            };
            self.fault(
                &path.key(key),
                "the same as the feed token; every gate would hold the operator's token",
            );
        }
        let plans = names_of(&file.plans);
        let plans = if self.places.was_written(&Path::root().key("plans")) {
            plans
        } else {
            vec!["starter"]
        };
        if !self.is_faulty(&Path::root().key("plans")) {
            self.known(&path.key("default_plan"), "plan", &control.default_plan, &plans);
        }
        let state_dir = match (&control.state_dir, &file.gate) {
            (Some(text), _) => self.file_path(&path.key("state_dir"), text),
            (None, Some(gate)) => self.base.join(&gate.state_dir),
            (None, None) => file::state_dir().into(),
        };
        Control {
            address,
            tls,
            database: self.database(&path.key("database"), &control.database.0),
            feed_token,
            admin_token,
            public_url: control.public_url.as_ref().map(|url| url.0.clone()),
            registration: match control.registration {
                file::Registration::Open => Registration::Open,
                file::Registration::Invite => Registration::Invite,
                file::Registration::Off => Registration::Off,
            },
            state_dir,
            default_plan: control.default_plan.clone(),
            registrations_per_hour: control.registrations_per_hour,
            login_attempts: control.login_attempts,
            trusted_proxies: control.trusted_proxies.iter().map(|network| network.0).collect(),
            retention: self.retention(&path.key("retention"), &control.retention),
        }
    }

    fn retention(&mut self, path: &Path, retention: &file::Retention) -> Retention {
        Retention {
            audit: self.kept(&path.key("audit"), retention.audit, LEAST_AUDIT),
            usage_by_minute: self.kept(&path.key("usage_by_minute"), retention.usage_by_minute, LEAST_USAGE),
        }
    }

    /// How long something is kept; 0: for ever.
    fn kept(&mut self, path: &Path, span: Span, least: Duration) -> Option<Duration> {
        if span.0.is_zero() {
            return None;
        }
        if span.0 < least || span.0 > LONGEST_KEPT {
            let (least, most) = (Span(least), Span(LONGEST_KEPT));
            self.fault(
                path,
                format!("must be 0 (for ever), or from {least} to {most}, found {span}"),
            );
        }
        Some(span.0)
    }

    /// What TLS on the control plane's listener needs elsewhere in the file.
    fn control_tls(&mut self, path: &Path, control: &file::Control, file: &file::File) {
        if control.public_url.is_none() {
            self.fault(
                &path.key("public_url"),
                "missing; with TLS, sessions are bound to the name that people use: https://NAME",
            );
        }
        let feed = file
            .gate
            .as_ref()
            .map(|gate| gate.feed.as_ref().and_then(|feed| feed.url.as_ref()));
        if feed.is_some_and(|url| url.is_none_or(|url| !url.0.starts_with("https://"))) {
            self.fault(
                &Path::root().key("gate").key("feed"),
                "the control plane of this file listens with TLS; expected {url: \"https://…\", token_file: …, tls: …}, \
                 by which the gate reaches it",
            );
        }
    }

    fn database(&mut self, path: &Path, url: &str) -> Database {
        if let Some(file) = url.strip_prefix("sqlite://") {
            let file = file.split('?').next().unwrap_or(file);
            if file.is_empty() || file.ends_with('/') {
                self.fault(
                    path,
                    "expected the path of a file: sqlite:///var/lib/tollgate/tollgate.db",
                );
            }
            return Database::Sqlite {
                path: self.base.join(file),
            };
        }
        if let Some(rest) = url
            .strip_prefix("postgres://")
            .or_else(|| url.strip_prefix("postgresql://"))
        {
            let authority = rest.split(['/', '?']).next().unwrap_or(rest);
            let host = authority.rsplit('@').next().unwrap_or(authority);
            if host.is_empty() || host.starts_with(':') {
                self.fault(path, "no host; expected postgres://USER:PASSWORD@HOST/NAME");
            }
            return Database::Postgres { url: Secret::new(url) };
        }
        let message = if url.starts_with("sqlite:") {
            "expected sqlite:///PATH, with :// before the path"
        } else {
            "expected sqlite:///PATH or postgres://USER:PASSWORD@HOST/NAME"
        };
        self.fault(path, message);
        Database::Postgres { url: Secret::new("") }
    }

    pub(super) fn admin(&mut self, admin: &file::Admin) -> Admin {
        Admin {
            address: admin.listen.0.clone(),
            key_labels: admin.key_labels,
        }
    }

    pub(super) fn cluster(&mut self, cluster: &file::Cluster, has_gate: bool) -> Cluster {
        let path = Path::root().key("cluster");
        if !has_gate {
            self.fault_of_key(
                &path,
                "counts are shared between gates, and this file has no section `gate`",
            );
        }
        let urls: Vec<(Path, &str)> = match &cluster.url {
            file::ClusterUrls::One(url) => vec![(path.key("url"), &url.0)],
            file::ClusterUrls::Several(urls) => urls
                .iter()
                .enumerate()
                .map(|(index, url)| (path.key("url").index(index), url.0.as_str()))
                .collect(),
        };
        if urls.is_empty() {
            self.fault(&path.key("url"), "must not be empty; expected redis://HOST:PORT");
        }
        for (path, url) in &urls {
            let rest = url.strip_prefix("redis://").or_else(|| url.strip_prefix("rediss://"));
            if rest.is_none_or(|rest| rest.is_empty() || rest.starts_with('/')) {
                self.fault(path, "expected redis://HOST:PORT, or rediss://HOST:PORT for TLS");
            }
        }
        let mode = match (&cluster.sentinel_master, cluster.cluster_mode) {
            (Some(_), true) => {
                self.fault(
                    &path.key("cluster_mode"),
                    "given together with `sentinel_master`; the store is one or the other",
                );
                ClusterMode::Cluster
            }
            (Some(master), false) => ClusterMode::Sentinel { master: master.clone() },
            (None, true) => ClusterMode::Cluster,
            (None, false) => {
                if urls.len() > 1 {
                    self.fault(
                        &path.key("url"),
                        "several stores need sentinel_master: NAME or cluster_mode: true",
                    );
                }
                ClusterMode::Single
            }
        };
        let key_prefix = cluster.key_prefix.clone();
        if key_prefix.is_empty()
            || key_prefix.len() > 64
            || !key_prefix
                .bytes()
                .all(|byte| byte.is_ascii_graphic() && byte != b'{' && byte != b'}')
        {
            self.fault(
                &path.key("key_prefix"),
                "1 to 64 visible ASCII characters without { and }",
            );
        }
        let wait = self.span(
            &path.key("wait"),
            cluster.wait,
            Duration::from_millis(1),
            Duration::from_secs(10),
        );
        let lost_after = self.span(
            &path.key("lost_after"),
            cluster.lost_after,
            Duration::from_millis(10),
            Duration::from_secs(60),
        );
        if lost_after <= wait {
            let key = if self.places.was_written(&path.key("lost_after")) {
                "lost_after"
            } else {
                "wait"
            };
            self.fault(
                &path.key(key),
                format!(
                    "lost_after ({}) must be longer than wait ({})",
                    cluster.lost_after, cluster.wait
                ),
            );
        }
        Cluster {
            urls: urls.iter().map(|(_, url)| Secret::new(*url)).collect(),
            mode,
            on_loss: match cluster.on_loss {
                file::OnLoss::Share => OnLoss::Share,
                file::OnLoss::Closed => OnLoss::Closed,
                file::OnLoss::Local => OnLoss::Local,
            },
            wait,
            lost_after,
            max_clock_skew: self.span(
                &path.key("max_clock_skew"),
                cluster.max_clock_skew,
                Duration::ZERO,
                Duration::from_secs(10),
            ),
            key_prefix,
        }
    }

    pub(super) fn log(&mut self, log: &file::Log) -> Log {
        let path = Path::root().key("log");
        let access = match &log.access {
            file::Access::Switch(file::Switch::Off) => None,
            file::Access::Switch(file::Switch::On) => Some(file::AccessSettings::default()),
            file::Access::Settings(settings) => Some(settings.clone()),
        };
        Log {
            level: match log.level {
                file::Level::Off => Level::Off,
                file::Level::Error => Level::Error,
                file::Level::Warn => Level::Warn,
                file::Level::Info => Level::Info,
                file::Level::Debug => Level::Debug,
                file::Level::Trace => Level::Trace,
            },
            format: match log.format {
                file::LogFormat::Json => Format::Json,
                file::LogFormat::Text => Format::Text,
            },
            path: self.output(&path.key("path"), &log.path.0),
            access: access.map(|access| AccessLog {
                format: match access.format {
                    file::AccessFormat::Json => Format::Json,
                    file::AccessFormat::Text => Format::Text,
                },
                path: self.output(&path.key("access").key("path"), &access.path),
                buffer_lines: access.buffer_lines as usize,
            }),
        }
    }

    fn output(&mut self, path: &Path, text: &str) -> Output {
        match text {
            "stdout" => Output::Stdout,
            "stderr" => Output::Stderr,
            file => Output::File(self.file_path(path, file)),
        }
    }
}
