//! The two ways that lead from an edge to an upstream. What must hold whichever it is, is tested over both.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::prelude::HttpPeer;
use pingora::proxy::{FailToProxy, ProxyHttp, Session, http_proxy};
use pingora::server::configuration::ServerConf;
use tollgate::clock::Clock;
use tollgate::gate::{
    AccessSettings, FailedAttemptsSettings, Gate, Pattern, RouteSettings, Settings as GateSettings, key, limit,
};
use tollgate::proxy::client_address::{IpNet, TrustedProxies, forwarded_fields};
use tollgate::proxy::edge::{
    Edge, EdgeObserver, EdgeRefusal, EdgeSettings, end_body_once, filter_upgrade, guard_refusal, remove_claims,
};
use tollgate::proxy::guard::ConnectionInfo;
use tollgate::proxy::{Balance, Proxy, ResponseSettings, ServerSettings, Settings, Timeouts, UpstreamSettings};
use tollgate::tls::ListenerTls;

/// How a plain request goes to its upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// By a [`Forwarder`], as all requests of an edge without a direct way.
    Pingora,
    /// Directly by the gate's own proxy, which is [`Direct`] here. What is not plain goes Pingora's way from there.
    Direct,
}

pub const BOTH_WAYS: [Way; 2] = [Way::Pingora, Way::Direct];

/// Runs each of these tests twice, as `name::by_pingora` and `name::directly`.
macro_rules! over_both_ways {
    ($($test:ident),+ $(,)?) => {$(
        mod $test {
            use crate::ways::Way;

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn by_pingora() {
                super::$test(Way::Pingora).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn directly() {
                super::$test(Way::Direct).await;
            }
        }
    )+};
}
pub(crate) use over_both_ways;

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Way::Pingora => "by Pingora",
            Way::Direct => "directly",
        })
    }
}

impl Way {
    /// An escaped message, as it is compared. The forwarder passes a head on as it came. The gate sends what it does
    /// directly with names in lower case, takes keys off, and says whose request it is: there only the values count,
    /// and the order of those that share a name.
    pub fn comparable(self, message: &str) -> String {
        let Some((head, body)) = message.split_once(EMPTY_LINE).filter(|_| self == Way::Direct) else {
            return message.to_owned();
        };
        let mut lines = head.split(LINE_END);
        let request_line = lines.next().unwrap_or_default();
        let mut fields: Vec<String> = lines
            .map(with_lower_case_name)
            .filter(|line| !is_of_gate(line))
            .collect();
        fields.sort_by(|one, other| name_of(one).cmp(name_of(other)));
        fields.insert(0, request_line.to_owned());
        format!("{}{EMPTY_LINE}{body}", fields.join(LINE_END))
    }
}

/// Whether an escaped message came directly: only that way writes names in lower case, whatever the client wrote.
pub fn went_directly(message: &str) -> bool {
    message.contains("\\r\\nhost: ")
}

const LINE_END: &str = "\\r\\n";
const EMPTY_LINE: &str = "\\r\\n\\r\\n";

fn with_lower_case_name(line: &str) -> String {
    let name = name_of(line);
    name.to_ascii_lowercase() + &line[name.len()..]
}

fn name_of(line: &str) -> &str {
    line.split(':').next().unwrap_or_default()
}

/// What the gate takes off, and what it says. Not what a client claims under the same name.
fn is_of_gate(line: &str) -> bool {
    const SAID: [&str; 2] = ["x-forwarded-for: 127.0.0.1", "x-forwarded-proto: http"];
    SAID.contains(&line) || ["x-request-id", "x-api-key"].contains(&name_of(line))
}

fn conf() -> Arc<ServerConf> {
    Arc::new(ServerConf {
        threads: 2,
        ..ServerConf::default()
    })
}

/// What a real `ProxyHttp` behind an edge has to do, and nothing else.
pub struct Forwarder {
    trusted: TrustedProxies,
    pub upstream: Arc<AtomicU16>,
    /// Upgraded connections are kept while this is 0.
    pub revoked: Arc<AtomicUsize>,
}

impl Forwarder {
    /// Forwards to this port of 127.0.0.1.
    pub fn new(settings: &EdgeSettings, upstream: u16) -> Self {
        Forwarder {
            trusted: TrustedProxies::new(settings.trusted_proxies.clone()),
            upstream: Arc::new(AtomicU16::new(upstream)),
            revoked: Arc::new(AtomicUsize::new(0)),
        }
    }

    /// An edge before it.
    pub fn edge(
        self,
        settings: EdgeSettings,
        tls: Option<Arc<ListenerTls>>,
        observer: Arc<dyn EdgeObserver>,
    ) -> Edge<Self> {
        Edge::new(settings, Arc::new(http_proxy(&conf(), self)), tls, observer)
    }
}

async fn answer(session: &mut Session, refusal: &EdgeRefusal) -> u16 {
    let mut head = ResponseHeader::build(refusal.status, Some(3)).unwrap();
    let body = format!(
        r#"{{"success":false,"error":{{"code":"{}","message":"{}"}}}}"#,
        refusal.code, refusal.why
    );
    head.insert_header("content-type", "application/json").unwrap();
    head.insert_header("content-length", body.len()).unwrap();
    let _ = session.write_response_header(Box::new(head), false).await;
    let _ = session.write_response_body(Some(Bytes::from(body)), true).await;
    refusal.status
}

#[async_trait]
impl ProxyHttp for Forwarder {
    type CTX = ();

    fn new_ctx(&self) {}

    async fn request_filter(&self, session: &mut Session, _: &mut ()) -> pingora::Result<bool> {
        let peer = session
            .client_addr()
            .and_then(|addr| addr.as_inet())
            .expect("a TCP peer")
            .ip();
        let is_tls = ConnectionInfo::of(session.digest())
            .expect("the edge attaches it")
            .is_tls;
        let (_, chain, proto) = forwarded_fields(peer, is_tls, &session.req_header().headers, &self.trusted);
        let may_upgrade = session.req_header().uri.path().starts_with("/ws");
        let request = session.req_header_mut();
        let wants_forwarding = request.headers.contains_key("x-show-client");
        filter_upgrade(request, may_upgrade);
        remove_claims(request);
        if wants_forwarding {
            request.insert_header("x-forwarded-for", chain)?;
            request.insert_header("x-forwarded-proto", proto)?;
        }
        if may_upgrade {
            let revoked = self.revoked.clone();
            ConnectionInfo::of(session.digest())
                .expect("the edge attaches it")
                .keep_while(move || revoked.load(Ordering::Relaxed) == 0);
        }
        Ok(false)
    }

    async fn request_body_filter(
        &self,
        _: &mut Session,
        body: &mut Option<Bytes>,
        end_of_stream: bool,
        _: &mut (),
    ) -> pingora::Result<()> {
        end_body_once(body, end_of_stream);
        Ok(())
    }

    async fn upstream_peer(&self, _: &mut Session, _: &mut ()) -> pingora::Result<Box<HttpPeer>> {
        let port = self.upstream.load(Ordering::SeqCst);
        Ok(Box::new(HttpPeer::new(("127.0.0.1", port), false, String::new())))
    }

    async fn fail_to_proxy(&self, session: &mut Session, error: &pingora::Error, _: &mut ()) -> FailToProxy {
        let code = match guard_refusal(error) {
            Some(refusal) if session.response_written().is_none() => answer(session, &refusal).await,
            Some(_) => 0,
            None if *error.esource() == pingora::ErrorSource::Upstream => {
                let _ = session.respond_error(502).await;
                502
            }
            None => 0,
        };
        FailToProxy {
            error_code: code,
            can_reuse_downstream: false,
        }
    }

    async fn logging(&self, _: &mut Session, _: Option<&pingora::Error>, _: &mut ()) {}

    fn suppress_error_log(&self, _: &Session, _: &(), _: &pingora::Error) -> bool {
        true
    }

    fn request_summary(&self, _: &Session, _: &()) -> String {
        String::new()
    }

    async fn upstream_request_filter(&self, _: &mut Session, _: &mut RequestHeader, _: &mut ()) -> pingora::Result<()> {
        Ok(())
    }
}

/// The gate's own proxy. Everybody may go where they like, but for paths under `/keyed`.
pub struct Direct {
    proxy: Proxy,
    trusted: Vec<IpNet>,
}

impl Direct {
    /// Forwards to this port of 127.0.0.1.
    pub fn new(settings: &EdgeSettings, upstream: u16) -> Self {
        let trusted = settings.trusted_proxies.clone();
        let mut rules = public_rules(&[("all", "/**")]);
        rules.insert(0, keyed_rule());
        let gate = Arc::new(gate(rules));
        let proxy = Proxy::new(&proxy_settings(&trusted, upstream), gate, Clock::system(), None);
        Direct {
            proxy: proxy.expect("a prefix that is fit for a header"),
            trusted,
        }
    }

    /// Requests go to this port from now on.
    pub fn forward_to(&self, port: u16) {
        let settings = proxy_settings(&self.trusted, port);
        self.proxy.reload(&settings).expect("the prefix that it had");
    }

    /// An edge before it, as the gate's listeners have it.
    pub fn edge(
        &self,
        settings: EdgeSettings,
        tls: Option<Arc<ListenerTls>>,
        observer: Arc<dyn EdgeObserver>,
    ) -> Edge<Proxy> {
        let whole = Arc::new(http_proxy(&conf(), self.proxy.clone()));
        Edge::new(settings, whole, tls, observer).going_directly(self.proxy.clone())
    }
}

fn proxy_settings(trusted: &[IpNet], upstream: u16) -> Settings {
    let minute = Duration::from_secs(60);
    Settings {
        header_prefix: "x-tollgate-".into(),
        response: ResponseSettings::default(),
        upstreams: vec![UpstreamSettings {
            name: "up".into(),
            servers: vec![ServerSettings {
                host: "127.0.0.1".into(),
                address: ([127, 0, 0, 1], upstream).into(),
                weight: 1,
            }],
            balance: Balance::RoundRobin,
            tls: None,
            http2: false,
            timeouts: Timeouts {
                connect: minute,
                read: minute,
                write: minute,
                idle: minute,
            },
            retries: 1,
            health: None,
        }],
        trusted_proxies: trusted.to_vec(),
        upstream_pool: 16,
        count_keys: false,
    }
}

/// A rule for holders of keys, of whom there are none.
fn keyed_rule() -> RouteSettings {
    let mut rule = public_rules(&[("keyed", "/keyed/**")]).remove(0);
    rule.access = AccessSettings::Keyed {
        scope: None,
        tier: "default".into(),
        environments: None,
    };
    rule
}

/// Rules for everybody, each a name and a pattern.
pub fn public_rules(rules: &[(&str, &str)]) -> Vec<RouteSettings> {
    let rule = |(name, path): &(&str, &str)| RouteSettings {
        name: (*name).to_owned(),
        pattern: Pattern {
            path: (*path).to_owned(),
            ..Pattern::default()
        },
        access: AccessSettings::Public { limit: None },
        upstream: "up".into(),
        sandbox_upstream: None,
        upgrade: false,
    };
    rules.iter().map(rule).collect()
}

/// A gate with these rules, and without keys.
pub fn gate(routes: Vec<RouteSettings>) -> Gate {
    Gate::new(GateSettings {
        environments: vec![],
        checksum: key::Checksum::Required,
        foreign: key::Foreign::Refuse,
        tiers: vec![("default".into(), limit::Limit::new(100, 3_600_000).unwrap())],
        plans: vec![],
        routes,
        default_upstream: "up".into(),
        failed_attempts: FailedAttemptsSettings::default(),
    })
    .unwrap()
}
