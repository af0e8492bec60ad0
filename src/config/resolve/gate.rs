//! The gate: listeners, feed, limits.

use std::net::IpAddr;
use std::time::Duration;

use super::super::fault::Path;
use super::super::file;
use super::super::settings::{
    ClientTls, FailedAttempts, Feed, FeedSource, Gate, Limits, Listener, ListenerTls, Paths, RateLimitHeaders, Route,
    TlsVersion,
};
use super::Resolver;

/// Headers that carry something else and must not fall into our namespace.
const NOT_OURS: [&str; 8] = [
    "x-api-key",
    "x-request-id",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-proto",
    "x-real-ip",
    "x-ratelimit-limit",
    "x-http-method-override",
];

/// The control plane sends something every 5 s; a shorter bound would refuse between two heartbeats.
const LEAST_STALENESS: Duration = Duration::from_secs(6);

impl Resolver {
    pub(super) fn gate(&mut self, gate: &file::Gate, file: &file::File, routes: &[Route]) -> Gate {
        let path = Path::root().key("gate");
        self.name(&path.key("name"), "a gate", &gate.name);
        let listen = gate.listen.iter().enumerate().map(|(index, listener)| {
            let path = path.key("listen").index(index);
            if listener.proxy_protocol && gate.trusted_proxies.is_empty() {
                self.fault(
                    &path.key("proxy_protocol"),
                    "needs gate.trusted_proxies: the addresses whose PROXY headers are believed",
                );
            }
            Listener {
                address: listener.address.0.clone(),
                tls: listener
                    .tls
                    .as_ref()
                    .map(|tls| self.listener_tls(&path.key("tls"), tls)),
                http2: listener.http2,
                proxy_protocol: listener.proxy_protocol,
            }
        });
        let listen = listen.collect();
        self.header_prefix(&path.key("header_prefix"), &gate.header_prefix);
        if !gate
            .realm
            .chars()
            .all(|c| matches!(c, ' '..='~') && c != '"' && c != '\\')
            || gate.realm.is_empty()
        {
            self.fault(
                &path.key("realm"),
                "visible ASCII characters and spaces only, without \" and \\",
            );
        }
        let shutdown_path = path.key("shutdown_grace");
        Gate {
            name: gate.name.clone(),
            threads: match gate.threads {
                file::Threads::Auto => None,
                file::Threads::Number(number) => Some(usize::from(number)),
            },
            listen,
            header_prefix: gate.header_prefix.clone(),
            realm: gate.realm.clone(),
            state_dir: self.file_path(&path.key("state_dir"), &gate.state_dir),
            feed: self.feed(&path.key("feed"), gate.feed.as_ref(), file.control.is_some()),
            default_upstream: routes
                .iter()
                .find(|route| route.is_catch_all())
                .map(|route| route.upstream.clone())
                .unwrap_or_default(),
            trusted_proxies: gate.trusted_proxies.iter().map(|network| network.0).collect(),
            limits: self.limits(&path.key("limits"), &gate.limits),
            failed_attempts: self.failed_attempts(&path.key("failed_attempts"), &gate.failed_attempts),
            rate_limit_headers: RateLimitHeaders {
                standard: gate.rate_limit_headers.standard,
                legacy: gate.rate_limit_headers.legacy,
            },
            paths: match gate.paths {
                file::Paths::Strict => Paths::Strict,
                file::Paths::Relaxed => Paths::Relaxed,
            },
            shutdown_grace: self.span(
                &shutdown_path,
                gate.shutdown_grace,
                Duration::ZERO,
                Duration::from_secs(24 * 3600),
            ),
        }
    }

    pub(super) fn listener_tls(&mut self, path: &Path, tls: &file::ListenerTls) -> ListenerTls {
        let mut certificates = Vec::new();
        certificates.extend(self.certificate(path, tls.cert.as_deref(), tls.key.as_deref()));
        for (index, certificate) in tls.certificates.iter().enumerate() {
            let path = path.key("certificates").index(index);
            certificates.extend(self.certificate(&path, Some(&certificate.cert), Some(&certificate.key)));
        }
        if tls.cert.is_none() && tls.key.is_none() && tls.certificates.is_empty() {
            self.fault(path, "no certificate; expected cert: FILE and key: FILE");
        }
        ListenerTls {
            certificates,
            min_version: match tls.min_version {
                file::TlsVersion::Tls12 => TlsVersion::Tls12,
                file::TlsVersion::Tls13 => TlsVersion::Tls13,
            },
            client_ca: tls
                .client_ca
                .as_ref()
                .map(|ca| self.existing_file(&path.key("client_ca"), ca)),
        }
    }

    pub(super) fn client_tls(&mut self, path: &Path, tls: &file::ClientTls) -> ClientTls {
        if let Some(sni) = &tls.sni
            && let Err(message) = super::super::scalar::host_name(sni)
        {
            self.fault(
                &path.key("sni"),
                format!("{message}; expected a name such as api.internal"),
            );
        }
        ClientTls {
            sni: tls.sni.clone(),
            ca: tls.ca.as_ref().map(|ca| self.existing_file(&path.key("ca"), ca)),
            certificate: self.certificate(path, tls.cert.as_deref(), tls.key.as_deref()),
            danger_skip_verify: tls.danger_skip_verify,
        }
    }

    fn header_prefix(&mut self, path: &Path, prefix: &str) {
        let characters = prefix
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
        let taken = NOT_OURS.iter().find(|name| name.starts_with(prefix));
        let message = if !characters || !prefix.ends_with('-') || prefix.len() < 2 || prefix.len() > 40 {
            "expected lower case letters, digits and -, with - at the end, such as x-tollgate-".to_owned()
        } else if let Some(name) = taken {
            format!("{name} begins with it, and would be taken from clients")
        } else {
            return;
        };
        self.fault(path, format!("bad prefix \"{prefix}\": {message}"));
    }

    fn feed(&mut self, path: &Path, feed: Option<&file::Feed>, has_control: bool) -> Feed {
        let Some(feed) = feed else {
            if !has_control {
                self.fault(
                    path,
                    "missing; expected {url: …, token_file: …}, or {file: …} for a static key file",
                );
            }
            return Feed {
                source: FeedSource::Control,
                max_staleness: None,
            };
        };
        let max_staleness = feed.max_staleness.map(|span| {
            self.span(
                &path.key("max_staleness"),
                span,
                LEAST_STALENESS,
                Duration::from_secs(365 * 24 * 3600),
            )
        });
        let source = match (&feed.url, &feed.file) {
            (Some(_), Some(_)) => {
                self.fault(
                    &path.key("file"),
                    "given together with `url`; keys come from one of the two",
                );
                FeedSource::Control
            }
            (Some(url), None) => {
                let token = self.secret(path, "token", feed.token.as_ref(), feed.token_file.as_deref());
                if feed.tls.is_some() && url.0.starts_with("http://") {
                    self.fault(&path.key("tls"), "needs a url that begins with https://");
                }
                let tls = feed.tls.as_ref().map(|tls| self.client_tls(&path.key("tls"), tls));
                if tls.as_ref().is_some_and(|tls| tls.sni.is_some()) {
                    self.fault_of_key(
                        &path.key("tls").key("sni"),
                        "the host of `url` is what is asked for and verified; write the name there",
                    );
                }
                FeedSource::Url {
                    url: url.0.clone(),
                    token,
                    tls,
                }
            }
            (None, Some(file)) => {
                for (name, given) in [
                    ("token", feed.token.is_some()),
                    ("token_file", feed.token_file.is_some()),
                    ("tls", feed.tls.is_some()),
                ] {
                    if given {
                        self.fault_of_key(&path.key(name), "goes with `url`; a file needs none");
                    }
                }
                if feed.max_staleness.is_some() {
                    self.fault_of_key(
                        &path.key("max_staleness"),
                        "goes with `url`; a file does not grow stale",
                    );
                }
                FeedSource::File {
                    path: self.existing_file(&path.key("file"), file),
                }
            }
            (None, None) => {
                let only_staleness = feed.token.is_none() && feed.token_file.is_none() && feed.tls.is_none();
                if !(has_control && only_staleness) {
                    self.fault(path, "neither `url` nor `file`: expected one of them");
                }
                FeedSource::Control
            }
        };
        Feed { source, max_staleness }
    }

    fn limits(&mut self, path: &Path, limits: &file::Limits) -> Limits {
        let head_bytes = limits.head_bytes.0;
        if !(1_024..=1 << 20).contains(&head_bytes) {
            self.fault(
                &path.key("head_bytes"),
                format!("must be from 1024 to 1048576 (1 MiB), found {head_bytes}"),
            );
        }
        let written = self.places.was_written(&path.key("target_bytes"));
        let target_bytes = if written {
            limits.target_bytes.0
        } else {
            limits.target_bytes.0.min(head_bytes)
        };
        if !self.is_faulty(&path.key("head_bytes")) && !(256..=head_bytes).contains(&target_bytes) {
            self.fault(
                &path.key("target_bytes"),
                format!("must be from 256 to head_bytes ({head_bytes}), found {target_bytes}"),
            );
        }
        let each_path = path.key("connections_per_address");
        let each = match self.places.was_written(&each_path) {
            true => limits.connections_per_address,
            false => limits.connections_per_address.min(limits.connections),
        };
        if each > limits.connections {
            self.fault(
                &each_path,
                format!("{each} is more than connections in all ({})", limits.connections),
            );
        }
        Limits {
            head_bytes: usize::try_from(head_bytes).unwrap_or(usize::MAX),
            head_fields: limits.head_fields as usize,
            target_bytes: usize::try_from(target_bytes).unwrap_or(usize::MAX),
            head_deadline: self.timeout(&path.key("head_deadline"), limits.head_deadline),
            handshake_deadline: self.timeout(&path.key("handshake_deadline"), limits.handshake_deadline),
            idle_timeout: self.timeout(&path.key("idle_timeout"), limits.idle_timeout),
            body_grace: self.timeout(&path.key("body_grace"), limits.body_grace),
            response_grace: self.timeout(&path.key("response_grace"), limits.response_grace),
            min_bytes_per_second: limits.min_bytes_per_second,
            upgraded_idle: self.timeout(&path.key("upgraded_idle"), limits.upgraded_idle),
            connections: limits.connections as usize,
            connections_per_address: each as usize,
            requests_per_connection: limits.requests_per_connection,
            h2_streams: limits.h2_streams,
            h2_resets_per_minute: limits.h2_resets_per_minute,
            h2_control_frames_per_second: limits.h2_control_frames_per_second,
            upstream_pool: limits.upstream_pool as usize,
        }
    }

    fn failed_attempts(&mut self, path: &Path, attempts: &file::FailedAttempts) -> FailedAttempts {
        let window = self.span(
            &path.key("window"),
            attempts.window,
            Duration::from_secs(1),
            Duration::from_secs(24 * 3600),
        );
        FailedAttempts {
            limit: attempts.limit,
            window,
        }
    }

    /// No two listeners of the process on one address.
    pub(super) fn listeners_apart(&mut self, file: &file::File) {
        let root = Path::root();
        let mut listeners: Vec<(Path, &str)> = Vec::new();
        for (index, listener) in file.gate.iter().flat_map(|gate| &gate.listen).enumerate() {
            listeners.push((
                root.key("gate").key("listen").index(index).key("address"),
                &listener.address.0,
            ));
        }
        if let Some(control) = &file.control {
            let path = root.key("control").key("listen");
            match &control.listen {
                file::ControlListen::Address(address) => listeners.push((path, &address.0)),
                file::ControlListen::Listener(listener) => listeners.push((path.key("address"), &listener.address.0)),
            }
        }
        if let Some(admin) = &file.admin {
            listeners.push((root.key("admin").key("listen"), &admin.listen.0));
        }
        for (index, (path, address)) in listeners.iter().enumerate() {
            let clash = listeners[..index]
                .iter()
                .find(|(other, theirs)| same_socket(theirs, address) && !self.is_faulty(other));
            if let Some((other, _)) = clash {
                self.fault(path, format!("\"{address}\" is taken by {}", other.as_str()));
            }
        }
    }
}

/// Whether two `HOST:PORT` cannot both be listened on.
fn same_socket(a: &str, b: &str) -> bool {
    let split = |text: &str| {
        let (host, port) = text.rsplit_once(':')?;
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let host = if host == "localhost" { "127.0.0.1" } else { host };
        Some((host.parse::<IpAddr>().ok()?, port.parse::<u16>().ok()?))
    };
    let (Some((host_a, port_a)), Some((host_b, port_b))) = (split(a), split(b)) else {
        return false;
    };
    port_a == port_b && port_a != 0 && (host_a == host_b || host_a.is_unspecified() || host_b.is_unspecified())
}
