//! A gate with keys, for whoever wants to ask it something.
#![allow(
    dead_code,
    reason = "every test and bench that includes this file uses another part of it"
)]

use http::{HeaderMap, HeaderName, HeaderValue, Method};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;
use tollgate::clock::Now;
use tollgate::gate::key::{Checksum, Foreign, SecretDigest, checksum};
use tollgate::gate::limit::Limit;
use tollgate::gate::{
    AccessSettings, EnvironmentSettings, FailedAttemptsSettings, Gate, KeyUpdate, Pattern, Permit, PlanSettings,
    Refusal, RequestHead, RouteSettings, SecretUpdate, Settings,
};

/// The wall time that manual clocks start at, in Unix milliseconds.
pub const START_MS: i64 = 1_800_000_000_000;
/// A client that does nothing wrong.
pub const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));

/// The secret number `n`: well-formed, checksum and all.
pub fn secret(n: u32) -> String {
    let payload = format!("pxk_live_{n:030}");
    let digits = checksum(payload.as_bytes());
    payload + std::str::from_utf8(&digits).expect("base62 digits are ASCII")
}

/// One secret of a key, without an end.
pub fn secret_update(n: u32) -> SecretUpdate {
    SecretUpdate {
        digest: SecretDigest::of(secret(n).as_bytes()).0,
        not_after_ms: None,
    }
}

/// The key number `n`, with the secret of the same number.
pub fn key(n: u32, revision: u64) -> KeyUpdate {
    KeyUpdate {
        revision,
        id: format!("key_{n}").into(),
        organization: "org_1".into(),
        environment: "live".into(),
        scopes: vec!["things:read".into()],
        plan: "starter".into(),
        secrets: vec![secret_update(n)],
        expires_at_ms: None,
        disabled: false,
        revoked: false,
    }
}

/// So many permits an hour.
pub fn hourly(permits: u32) -> Limit {
    Limit::new(permits, 3_600_000).expect("a limit within the bounds")
}

/// A rule for holders of keys.
pub fn keyed(path: &str, scope: Option<&str>, tier: &str, environments: Option<&[&str]>) -> RouteSettings {
    RouteSettings {
        name: path.into(),
        pattern: Pattern {
            path: path.into(),
            ..Pattern::default()
        },
        access: AccessSettings::Keyed {
            scope: scope.map(str::to_owned),
            tier: tier.into(),
            environments: environments.map(|all| all.iter().map(|e| (*e).to_owned()).collect()),
        },
        upstream: "up".into(),
        sandbox_upstream: None,
        upgrade: false,
    }
}

/// A rule for anybody.
pub fn public(path: &str, limit: Option<Limit>) -> RouteSettings {
    RouteSettings {
        access: AccessSettings::Public { limit },
        ..keyed(path, None, "default", None)
    }
}

/// One tier of `permits` an hour, one plan, two environments and no rules.
pub fn settings(permits: u32) -> Settings {
    let environment = |name: &str, billed| EnvironmentSettings {
        name: name.into(),
        prefix: format!("pxk_{name}_"),
        billed,
    };
    Settings {
        environments: vec![environment("live", true), environment("test", false)],
        checksum: Checksum::Required,
        foreign: Foreign::Refuse,
        tiers: vec![("default".into(), hourly(permits))],
        plans: vec![PlanSettings {
            name: "starter".into(),
            ..PlanSettings::default()
        }],
        routes: vec![],
        default_upstream: "up".into(),
        failed_attempts: FailedAttemptsSettings {
            limit: u32::MAX >> 1,
            window: Duration::from_secs(60),
        },
    }
}

/// A gate with these settings and keys, at revision 1.
pub fn gate(settings: Settings, keys: impl IntoIterator<Item = KeyUpdate>) -> Gate {
    let gate = Gate::new(settings).expect("the settings agree with themselves");
    resync(&gate, keys, 1);
    gate
}

/// A full resync.
pub fn resync(gate: &Gate, keys: impl IntoIterator<Item = KeyUpdate>, revision: u64) {
    let keys = keys.into_iter();
    let mut resync = gate.resync(keys.size_hint().0).expect("no other writer");
    for key in keys {
        resync.add(&key).expect("a key without faults");
    }
    resync.commit(revision).expect("a newer revision");
}

/// Header fields.
pub fn headers(fields: &[(&'static str, &str)]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in fields {
        let value = HeaderValue::from_str(value).expect("a header value");
        headers.append(HeaderName::from_static(name), value);
    }
    headers
}

/// The header fields of a request with the secret number `n`.
pub fn with_secret(n: u32) -> HeaderMap {
    headers(&[("x-api-key", &secret(n))])
}

/// Asks the gate.
pub fn ask(gate: &Gate, path: &str, headers: &HeaderMap, client: IpAddr, now: Now) -> Result<Permit, Refusal> {
    let head = RequestHead {
        method: &Method::GET,
        host: "api.example",
        path,
        headers,
        client,
    };
    gate.check(&head, now)
}
