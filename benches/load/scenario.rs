//! What is measured.

/// How a gate is set up. Scenarios of the same setup share one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Setup {
    pub keys: u32,
    pub workers: u16,
    pub access_log: bool,
}

/// How clients speak to the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Http1,
    Http1Tls,
    /// Over TLS, chosen by ALPN.
    Http2,
}

impl Protocol {
    pub fn is_http1(self) -> bool {
        self != Protocol::Http2
    }

    pub fn is_tls(self) -> bool {
        self != Protocol::Http1
    }
}

/// What a request shows for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Credential {
    /// Every request another key, all of them in use.
    Valid,
    /// Nothing that could be a key.
    Junk,
    /// Well-formed, checksum and all, and in nobody's records.
    Unknown,
    /// None: the rule is public.
    None,
}

#[derive(Clone, Debug)]
pub struct Scenario {
    pub name: &'static str,
    pub setup: Setup,
    pub protocol: Protocol,
    pub path: &'static str,
    pub credential: Credential,
    /// The status that every answer must have; `None`: any.
    pub status: Option<u16>,
}

const ONE: Setup = Setup {
    keys: 10_000,
    workers: 1,
    access_log: false,
};
const MANY: Setup = Setup { keys: 1_000_000, ..ONE };
const LOGGED: Setup = Setup {
    access_log: true,
    ..ONE
};
const TWO: Setup = Setup { workers: 2, ..ONE };

/// All scenarios, in the order of the table. Paths are those of [`super::gate`]'s rules and [`super::origin`]'s bodies.
pub fn all() -> Vec<Scenario> {
    use Credential::{Junk, None, Unknown, Valid};
    use Protocol::{Http1, Http1Tls, Http2};
    let row = |name, setup, protocol, path, credential, status| Scenario {
        name,
        setup,
        protocol,
        path,
        credential,
        status: Some(status),
    };
    vec![
        row("public rule, no key", ONE, Http1, "/public/0", None, 200),
        row("10 k keys", ONE, Http1, "/v1/0", Valid, 200),
        row("10 k keys, 1 KB", ONE, Http1, "/v1/1024", Valid, 200),
        row("10 k keys, 100 KB", ONE, Http1, "/v1/102400", Valid, 200),
        row("1 M keys", MANY, Http1, "/v1/0", Valid, 200),
        row("1 M keys, 1 KB", MANY, Http1, "/v1/1024", Valid, 200),
        row("10 k keys, TLS", ONE, Http1Tls, "/v1/0", Valid, 200),
        row("10 k keys, TLS, 100 KB", ONE, Http1Tls, "/v1/102400", Valid, 200),
        row("10 k keys, HTTP/2", ONE, Http2, "/v1/0", Valid, 200),
        row("10 k keys, HTTP/2, 100 KB", ONE, Http2, "/v1/102400", Valid, 200),
        row("401: no key's form", ONE, Http1, "/v1/0", Junk, 401),
        row("401: nobody's key, 10 k keys", ONE, Http1, "/v1/0", Unknown, 401),
        row("401: nobody's key, 1 M keys", MANY, Http1, "/v1/0", Unknown, 401),
        row("403: scope missing", ONE, Http1, "/admin/0", Valid, 403),
        row("429: over the limit", ONE, Http1, "/spent/0", Valid, 429),
        row("10 k keys, access log", LOGGED, Http1, "/v1/0", Valid, 200),
        row("10 k keys, two workers", TWO, Http1, "/v1/0", Valid, 200),
    ]
}

impl Scenario {
    /// The same to warm up with: the keys that are to be over their limit are not, the first time.
    pub fn warming_up(&self) -> Self {
        Scenario {
            status: Option::None,
            ..self.clone()
        }
    }
}
