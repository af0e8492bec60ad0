//! The configuration, as each module wants to be told it.

use crate::config::{self, Config, FeedSource, UpstreamTarget};
use crate::gate::limit::Limit;
use crate::proxy::client_address::IpNet;
use crate::proxy::edge::{EdgeSettings, Http2Settings};
use crate::tls::{CertificateFiles, ClientFiles, TlsSettings};
use crate::{control, feed, gate, meter, proxy};
use http::Method;
use std::net::{SocketAddr, ToSocketAddrs};
use std::time::Duration;

use super::AppError;

/// Addresses that are known only once the process listens.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bound {
    /// Where the control plane of this process listens.
    pub control: Option<SocketAddr>,
}

/// The gate's settings.
pub fn gate(config: &Config) -> Result<gate::Settings, AppError> {
    let Some(gate) = &config.gate else {
        return Err(AppError::internal("no gate is configured"));
    };
    let tier = |tier: &config::Tier| Ok((tier.name.clone(), limit(tier.limit, tier.window)?));
    let plan = |plan: &config::Plan| {
        let own = config.tiers.iter().filter_map(|tier| {
            let permits = plan.limits.get(&tier.name)?;
            Some(limit(*permits, tier.window).map(|limit| (tier.name.clone(), limit)))
        });
        let tiers = own.collect::<Result<_, AppError>>()?;
        Ok(gate::PlanSettings {
            name: plan.name.clone(),
            max_in_flight: plan.max_in_flight,
            tiers,
        })
    };
    let catch_all = config.routes.iter().find(|route| route.is_catch_all());
    Ok(gate::Settings {
        environments: config
            .keys
            .environments
            .iter()
            .map(|environment| gate::EnvironmentSettings {
                name: environment.name.clone(),
                prefix: environment.prefix.clone(),
                billed: environment.billed,
            })
            .collect(),
        checksum: match config.keys.checksum {
            config::Checksum::Required => gate::key::Checksum::Required,
            config::Checksum::Optional => gate::key::Checksum::Optional,
        },
        foreign: match config.keys.foreign {
            config::Foreign::Refuse => gate::key::Foreign::Refuse,
            config::Foreign::Accept => gate::key::Foreign::Accept,
        },
        tiers: config.tiers.iter().map(tier).collect::<Result<_, AppError>>()?,
        plans: config.plans.iter().map(plan).collect::<Result<_, AppError>>()?,
        routes: config.routes.iter().map(route).collect::<Result<_, AppError>>()?,
        default_upstream: catch_all
            .or(config.routes.last())
            .map_or_else(String::new, |route| route.upstream.clone()),
        failed_attempts: gate::FailedAttemptsSettings {
            limit: gate.failed_attempts.limit,
            window: gate.failed_attempts.window,
        },
    })
}

fn route(route: &config::Route) -> Result<gate::RouteSettings, AppError> {
    let methods = route.methods.iter().map(|method| Method::from_bytes(method.as_bytes()));
    let methods = methods
        .collect::<Result<_, _>>()
        .map_err(|error| AppError::internal(error.to_string()))?;
    Ok(gate::RouteSettings {
        name: route.name.clone(),
        pattern: gate::Pattern {
            host: route.host.clone(),
            methods,
            path: route.path.to_string(),
        },
        access: match &route.access {
            config::Access::Public { limit: public } => gate::AccessSettings::Public {
                limit: public.map(|public| limit(public.limit, public.window)).transpose()?,
            },
            config::Access::Key {
                scope,
                tier,
                environments,
            } => gate::AccessSettings::Keyed {
                scope: scope.clone(),
                tier: tier.clone(),
                environments: (!environments.is_empty()).then(|| environments.clone()),
            },
        },
        upstream: route.upstream.clone(),
        sandbox_upstream: route.sandbox_upstream.clone(),
        upgrade: route.upgrade,
    })
}

fn limit(permits: u32, window: Duration) -> Result<Limit, AppError> {
    Limit::new(permits, window.as_millis() as u64).map_err(|error| AppError::internal(error.to_string()))
}

/// The proxy's settings. Names of upstream servers are resolved here, and the files of their TLS read.
pub fn proxy(config: &Config, bound: Bound) -> Result<proxy::Settings, AppError> {
    let Some(gate) = &config.gate else {
        return Err(AppError::internal("no gate is configured"));
    };
    let upstream = |upstream: &config::Upstream| self::upstream(config, upstream, bound);
    Ok(proxy::Settings {
        header_prefix: gate.header_prefix.clone(),
        response: proxy::ResponseSettings {
            realm: gate.realm.clone(),
            rate_limit: gate.rate_limit_headers.standard,
            legacy_rate_limit: gate.rate_limit_headers.legacy,
        },
        upstreams: config.upstreams.iter().map(upstream).collect::<Result<_, AppError>>()?,
        upstream_pool: gate.limits.upstream_pool,
        trusted_proxies: networks(gate),
        count_keys: config.admin.as_ref().is_some_and(|admin| admin.key_labels),
    })
}

fn upstream(config: &Config, upstream: &config::Upstream, bound: Bound) -> Result<proxy::UpstreamSettings, AppError> {
    let mut settings = proxy::UpstreamSettings {
        name: upstream.name.clone(),
        servers: vec![],
        balance: proxy::Balance::RoundRobin,
        tls: None,
        http2: false,
        timeouts: proxy::Timeouts {
            connect: upstream.timeouts.connect,
            read: upstream.timeouts.read,
            write: upstream.timeouts.write,
            idle: upstream.timeouts.idle,
        },
        retries: upstream.retries,
        health: None,
    };
    match &upstream.target {
        UpstreamTarget::Control => {
            let address = bound.control.ok_or_else(|| AppError::internal("no control plane"))?;
            settings.servers.push(proxy::ServerSettings {
                host: address.ip().to_string(),
                address,
                weight: 1,
            });
            settings.tls = to_own_control(config)?;
        }
        UpstreamTarget::Servers(servers) => {
            for server in &servers.servers {
                let host = server.address.rsplit_once(':').map_or("", |(host, _)| host);
                settings
                    .servers
                    .extend(
                        resolve(&upstream.name, &server.address)?.map(|address| proxy::ServerSettings {
                            host: host.to_owned(),
                            address,
                            weight: server.weight,
                        }),
                    );
            }
            settings.balance = match servers.balance {
                config::Balance::RoundRobin => proxy::Balance::RoundRobin,
                config::Balance::Random => proxy::Balance::Random,
            };
            settings.http2 = servers.protocol == config::Protocol::Http2;
            settings.tls = servers.tls.as_ref().map(upstream_tls).transpose()?;
            if settings.tls.as_ref().is_some_and(|tls| tls.danger_skip_verify) {
                log::warn!(
                    "upstreams.{}.tls.danger_skip_verify: anybody can pretend to be this upstream",
                    upstream.name
                );
            }
            settings.health = servers.health.as_ref().map(|health| proxy::HealthSettings {
                path: health.path.clone(),
                every: health.every,
                timeout: health.timeout,
                unhealthy_after: health.unhealthy_after,
                healthy_after: health.healthy_after,
            });
        }
    }
    Ok(settings)
}

fn upstream_tls(tls: &config::ClientTls) -> Result<proxy::UpstreamTls, AppError> {
    let identity = tls.certificate.as_ref().map(certificate_files);
    Ok(proxy::UpstreamTls {
        server_name: tls.sni.clone(),
        files: ClientFiles::load(tls.ca.as_deref(), identity.as_ref())?,
        danger_skip_verify: tls.danger_skip_verify,
    })
}

/// How requests reach the control plane of this process: as its feed does, where it listens with TLS.
fn to_own_control(config: &Config) -> Result<Option<proxy::UpstreamTls>, AppError> {
    let has_tls = config.control.as_ref().is_some_and(|control| control.tls.is_some());
    let Some(gate) = config.gate.as_ref().filter(|_| has_tls) else {
        return Ok(None);
    };
    let FeedSource::Url { url, tls, .. } = &gate.feed.source else {
        return Err(AppError::internal("the feed of a control plane with TLS is no URL"));
    };
    let mut settings = tls.as_ref().map(upstream_tls).transpose()?.unwrap_or_default();
    let authority = url.split("://").last().unwrap_or(url);
    let host = match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        _ => authority,
    };
    settings.server_name = Some(host.trim_matches(['[', ']']).to_owned());
    Ok(Some(settings))
}

fn certificate_files(files: &config::Certificate) -> CertificateFiles {
    CertificateFiles {
        chain: files.cert.clone(),
        key: files.key.clone(),
    }
}

fn networks(gate: &config::Gate) -> Vec<IpNet> {
    let network = |network: &config::Network| format!("{}/{}", network.address, network.prefix_length).parse().ok();
    gate.trusted_proxies.iter().filter_map(network).collect()
}

/// The strict edge of one listener.
pub fn edge(config: &Config, listener: &config::Listener) -> EdgeSettings {
    config
        .gate
        .as_ref()
        .map_or_else(EdgeSettings::default, |gate| edge_settings(gate, listener))
}

fn edge_settings(gate: &config::Gate, listener: &config::Listener) -> EdgeSettings {
    let (limits, defaults) = (&gate.limits, EdgeSettings::default());
    EdgeSettings {
        head_bytes: limits.head_bytes,
        head_fields: limits.head_fields,
        target_bytes: limits.target_bytes,
        head_deadline: limits.head_deadline,
        handshake_deadline: limits.handshake_deadline,
        idle_timeout: limits.idle_timeout,
        body_grace: limits.body_grace,
        response_grace: limits.response_grace,
        min_bytes_per_second: limits.min_bytes_per_second,
        upgraded_idle: limits.upgraded_idle,
        connections: limits.connections,
        connections_per_address: limits.connections_per_address,
        requests_per_connection: limits.requests_per_connection,
        http2: Http2Settings {
            concurrent_streams: limits.h2_streams,
            resets_per_minute: limits.h2_resets_per_minute,
            control_frames_per_second: limits.h2_control_frames_per_second,
            ..defaults.http2
        },
        h2c: listener.http2 && listener.tls.is_none(),
        trusted_proxies: networks(gate),
        proxy_protocol: listener.proxy_protocol,
        ..defaults
    }
}

/// The certificates of a listener of the gate that has any.
pub fn tls(listener: &config::Listener) -> Option<TlsSettings> {
    listener.tls.as_ref().map(|tls| listener_tls(tls, listener.http2))
}

/// The certificates of the control plane's listener, if it has any.
pub fn control_tls(config: &Config) -> Option<TlsSettings> {
    let tls = config.control.as_ref()?.tls.as_ref()?;
    Some(listener_tls(tls, true))
}

fn listener_tls(tls: &config::ListenerTls, http2: bool) -> TlsSettings {
    TlsSettings {
        certificates: tls.certificates.iter().map(certificate_files).collect(),
        http2,
        only_tls13: tls.min_version == config::TlsVersion::Tls13,
        client_authorities: tls.client_ca.clone(),
    }
}

/// The first address of a server: several of one name are the same machine on IPv4 and IPv6 more often than two.
fn resolve(upstream: &str, address: &str) -> Result<Option<SocketAddr>, AppError> {
    let mut resolved = address
        .to_socket_addrs()
        .map_err(|error| AppError::Failed(format!("upstream {upstream:?}: {address} cannot be resolved: {error}")))?;
    Ok(resolved.next())
}

/// Where the keys come from, and how usage gets back.
pub fn feed(config: &Config, bound: Bound) -> Result<feed::Settings, AppError> {
    let Some(gate) = &config.gate else {
        return Err(AppError::internal("no gate is configured"));
    };
    let source = match (&gate.feed.source, &config.control, bound.control) {
        (FeedSource::File { path }, ..) => feed::Source::File(path.clone()),
        (FeedSource::Url { url, token, tls }, ..) => http_source(url, token.expose(), tls.as_ref())?,
        (FeedSource::Control, Some(control), Some(address)) => {
            http_source(&format!("http://{address}"), control.feed_token.expose(), None)?
        }
        (FeedSource::Control, ..) => {
            return Err(AppError::internal("the feed names a control plane that is not there"));
        }
    };
    let mut settings = feed::Settings::new(&gate.name, source, &gate.state_dir);
    settings.max_staleness = gate.feed.max_staleness;
    Ok(settings)
}

fn http_source(url: &str, token: &str, tls: Option<&config::ClientTls>) -> Result<feed::Source, AppError> {
    let token = feed::Token::new(token)
        .ok_or_else(|| AppError::Failed("the feed token must be visible ASCII characters".to_owned()))?;
    let tls = feed::Tls {
        ca: tls.and_then(|tls| tls.ca.clone()),
        identity: tls
            .and_then(|tls| tls.certificate.as_ref())
            .map(|certificate| (certificate.cert.clone(), certificate.key.clone())),
        danger_skip_verify: tls.is_some_and(|tls| tls.danger_skip_verify),
    };
    let client = feed::http_client(url, &tls).map_err(|error| AppError::Failed(error.to_string()))?;
    Ok(feed::Source::http(url, token, client))
}

/// Where usage is posted: to whoever serves the keys, and nowhere if that is a file.
pub fn usage_goes_to(source: &feed::Source) -> Option<meter::Control> {
    match source {
        feed::Source::Http { url, token, client, .. } => Some(meter::Control {
            url: url.clone(),
            authorization: token.authorization(),
            client: client.clone(),
        }),
        feed::Source::File(_) => None,
    }
}

/// The control plane's settings, where the process has one.
pub fn control(config: &Config) -> Option<control::Settings> {
    let own = config.control.as_ref()?;
    let tier = |name: &str, limit: u32, window: Duration| control::Tier {
        name: name.to_owned(),
        limit,
        window_ms: window.as_millis() as u64,
    };
    let plan = |plan: &config::Plan| control::Plan {
        name: plan.name.clone(),
        max_in_flight: plan.max_in_flight,
        tiers: config
            .tiers
            .iter()
            .map(|common| {
                let limit = plan.limits.get(&common.name).copied().unwrap_or(common.limit);
                tier(&common.name, limit, common.window)
            })
            .collect(),
    };
    let mut settings = control::Settings {
        database: match &own.database {
            config::Database::Sqlite { path } => format!("sqlite://{}", path.display()),
            config::Database::Postgres { url } => url.expose().to_owned(),
        },
        feed_token: own.feed_token.expose().to_owned(),
        admin_token: own.admin_token.expose().to_owned(),
        public_url: own.public_url.clone(),
        registration: match own.registration {
            config::Registration::Open => control::Registration::Open,
            config::Registration::Invite => control::Registration::Invite,
            config::Registration::Off => control::Registration::Off,
        },
        environments: config
            .keys
            .environments
            .iter()
            .map(|environment| control::Environment {
                name: environment.name.clone(),
                prefix: environment.prefix.clone(),
                billed: environment.billed,
            })
            .collect(),
        scopes: config
            .scopes
            .iter()
            .map(|scope| control::Scope {
                name: scope.name.clone(),
                description: scope.description.clone().unwrap_or_default(),
            })
            .collect(),
        tiers: config
            .tiers
            .iter()
            .map(|own| tier(&own.name, own.limit, own.window))
            .collect(),
        plans: config.plans.iter().map(plan).collect(),
        default_plan: own.default_plan.clone(),
        default_grace_ms: config.keys.rotation.default_grace.as_millis() as i64,
        max_grace_ms: config.keys.rotation.max_grace.as_millis() as i64,
        registrations_per_hour: own.registrations_per_hour,
        login_attempts: own.login_attempts,
        retention: control::Retention {
            audit: own.retention.audit,
            usage_by_minute: own.retention.usage_by_minute,
        },
        ..control::Settings::default()
    };
    let networks = own.trusted_proxies.iter();
    settings
        .trusted_proxies
        .extend(networks.filter_map(|network| control::Network::new(network.address, network.prefix_length)));
    Some(settings)
}
