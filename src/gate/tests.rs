//! The decision, step by step; how keys come and go under it is in `changes`.

mod changes;

use super::key::checksum;
use super::places::NO_PLACE;
use super::*;
use crate::clock::Clock;
use http::HeaderValue;
use std::time::Duration;

const START_MS: i64 = 1_800_000_000_000;

fn secret(n: u32) -> String {
    let payload = format!("pxk_live_{n:030}");
    let digits = checksum(payload.as_bytes());
    payload + std::str::from_utf8(&digits).unwrap()
}

fn key(n: u32, revision: u64) -> KeyUpdate {
    KeyUpdate {
        revision,
        id: format!("key_{n}").into(),
        organization: "org_1".into(),
        environment: "live".into(),
        scopes: vec!["things:read".into()],
        plan: "starter".into(),
        secrets: vec![with_secret(n, None)],
        expires_at_ms: None,
        disabled: false,
        revoked: false,
    }
}

fn with_secret(n: u32, not_after_ms: Option<i64>) -> SecretUpdate {
    SecretUpdate {
        digest: SecretDigest::of(secret(n).as_bytes()).0,
        not_after_ms,
    }
}

fn limit(permits: u32) -> Limit {
    Limit::new(permits, 3_600_000).unwrap()
}

fn keyed(name: &str, path: &str, scope: Option<&str>, tier: &str, environments: Option<&[&str]>) -> RouteSettings {
    RouteSettings {
        name: name.into(),
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
        sandbox_upstream: Some("sandbox".into()),
        upgrade: false,
    }
}

fn settings() -> Settings {
    let environment = |name: &str, billed| EnvironmentSettings {
        name: name.into(),
        prefix: format!("pxk_{name}_"),
        billed,
    };
    Settings {
        environments: vec![environment("live", true), environment("test", false)],
        checksum: key::Checksum::Required,
        foreign: key::Foreign::Refuse,
        tiers: vec![("default".into(), limit(3)), ("narrow".into(), limit(1))],
        plans: vec![
            PlanSettings {
                name: "starter".into(),
                max_in_flight: Some(2),
                tiers: vec![],
            },
            PlanSettings {
                name: "wide".into(),
                max_in_flight: None,
                tiers: vec![("default".into(), limit(5000))],
            },
        ],
        routes: vec![
            keyed("things", "/things/**", Some("things:read"), "default", None),
            keyed("narrow", "/narrow", None, "narrow", None),
            keyed("admin", "/admin", Some("admin:all"), "default", None),
            keyed("sandboxed", "/sandboxed", None, "default", Some(&["test"])),
            RouteSettings {
                access: AccessSettings::Public { limit: Some(limit(2)) },
                ..keyed("register", "/register", None, "default", None)
            },
        ],
        default_upstream: "up".into(),
        failed_attempts: FailedAttemptsSettings {
            limit: 5,
            window: Duration::from_secs(60),
        },
    }
}

struct Fixture {
    gate: Gate,
    clock: Clock,
}

impl Fixture {
    fn new(keys: impl IntoIterator<Item = KeyUpdate>) -> Self {
        let fixture = Fixture {
            gate: Gate::new(settings()).unwrap(),
            clock: Clock::manual(START_MS),
        };
        fixture.resync(keys, 10).unwrap();
        fixture
    }

    fn resync(&self, keys: impl IntoIterator<Item = KeyUpdate>, revision: u64) -> Result<(), KeyError> {
        let mut resync = self.gate.resync(10)?;
        for key in keys {
            resync.add(&key)?;
        }
        resync.commit(revision)
    }

    fn ask(&self, path: &str, api_key: &str) -> Result<Permit, Refusal> {
        let mut headers = HeaderMap::new();
        headers.insert("x-api-key", HeaderValue::from_str(api_key).unwrap());
        self.ask_with(path, &headers)
    }

    fn ask_with(&self, path: &str, headers: &HeaderMap) -> Result<Permit, Refusal> {
        let client = "192.0.2.1".parse().unwrap();
        let head = RequestHead {
            method: &Method::GET,
            host: "api.example.com",
            path,
            headers,
            client,
        };
        self.gate.check(&head, self.clock.now())
    }

    fn reason(&self, path: &str, n: u32) -> Result<(), &'static str> {
        self.ask(path, &secret(n))
            .map(drop)
            .map_err(|refusal| refusal.reason.code())
    }
}

#[test]
fn a_key_passes_where_its_scope_allows_and_is_named() {
    let fixture = Fixture::new([key(1, 1)]);
    let permit = fixture.ask("/things/7", &secret(1)).unwrap();
    let holder = permit.holder().unwrap();
    assert_eq!(
        (holder.key_id(), holder.organization(), holder.environment()),
        ("key_1", "org_1", "live")
    );
    assert_eq!(permit.upstream(), "up");
    assert_eq!(permit.rate().unwrap().remaining, 2);
    assert_eq!(fixture.reason("/admin", 1), Err("INSUFFICIENT_SCOPE"));
    assert_eq!(fixture.reason("/sandboxed", 1), Err("ENVIRONMENT_NOT_ALLOWED"));
    assert_eq!(
        fixture.reason("/elsewhere", 1),
        Ok(()),
        "no rule: any valid key, tier default"
    );
}

#[test]
fn keys_of_environments_that_are_not_billed_go_to_the_sandbox() {
    let fixture = Fixture::new([KeyUpdate {
        environment: "test".into(),
        ..key(1, 1)
    }]);
    assert_eq!(fixture.ask("/things/7", &secret(1)).unwrap().upstream(), "sandbox");
}

#[test]
fn each_wrong_credential_has_its_reason() {
    let at = |ms| Some(START_MS + ms);
    let fixture = Fixture::new([
        KeyUpdate {
            revoked: true,
            ..key(1, 1)
        },
        KeyUpdate {
            expires_at_ms: at(0),
            ..key(2, 1)
        },
        KeyUpdate {
            disabled: true,
            ..key(3, 1)
        },
        KeyUpdate {
            secrets: vec![with_secret(4, at(0)), with_secret(5, at(1))],
            ..key(4, 1)
        },
    ]);
    assert_eq!(
        fixture.ask_with("/things", &HeaderMap::new()).unwrap_err().reason,
        Reason::MissingKey
    );
    assert_eq!(fixture.ask("/things", "junk").unwrap_err().reason, Reason::MalformedKey);
    assert_eq!(
        fixture.ask("/things", &secret(99)).unwrap_err().reason,
        Reason::UnknownKey
    );
    assert_eq!(fixture.reason("/things", 1), Err("REVOKED_API_KEY"));
    assert_eq!(fixture.reason("/things", 2), Err("EXPIRED_API_KEY"));
    assert_eq!(fixture.reason("/things", 3), Err("DISABLED_API_KEY"));
    assert_eq!(fixture.reason("/things", 4), Err("REVOKED_API_KEY"), "past its grace");
    assert_eq!(fixture.reason("/things", 5), Ok(()), "one millisecond of grace left");
    fixture.clock.advance(Duration::from_millis(1));
    assert_eq!(fixture.reason("/things", 5), Err("REVOKED_API_KEY"));
}

#[test]
fn an_address_that_keeps_failing_is_slowed_and_a_valid_key_is_not() {
    let fixture = Fixture::new([key(1, 1)]);
    for _ in 0..5 {
        assert_eq!(fixture.reason("/things", 99), Err("INVALID_API_KEY"));
    }
    assert_eq!(fixture.reason("/things", 99), Err("TOO_MANY_FAILED_ATTEMPTS"));
    assert_eq!(fixture.reason("/things", 1), Ok(()));
}

#[test]
fn a_gate_without_keys_is_not_ready_and_lets_nobody_in() {
    let fixture = Fixture {
        gate: Gate::new(settings()).unwrap(),
        clock: Clock::manual(START_MS),
    };
    assert_eq!(fixture.reason("/things", 1), Err("NOT_READY"));
    assert_eq!(fixture.gate.apply(key(1, 1)), Err(KeyError::NoSnapshot));
    fixture.resync([key(1, 1)], 1).unwrap();
    assert_eq!(fixture.reason("/things", 1), Ok(()));
    fixture.gate.set_stale(true);
    assert_eq!(fixture.reason("/things", 1), Err("NOT_READY"));
}

#[test]
fn the_tiers_of_a_key_and_the_keys_of_a_tier_are_counted_apart() {
    let fixture = Fixture::new([key(1, 1), key(2, 1)]);
    assert_eq!(fixture.reason("/narrow", 1), Ok(()));
    let refusal = fixture.ask("/narrow", &secret(1)).unwrap_err();
    assert_eq!(refusal.reason.code(), "RATE_LIMITED");
    assert_eq!(
        refusal.rate().map(|rate| (rate.remaining, &*rate.tier.name)),
        Some((0, "narrow"))
    );
    assert_eq!(fixture.reason("/things", 1), Ok(()));
    assert_eq!(fixture.reason("/narrow", 2), Ok(()));
}

#[test]
fn the_cap_holds_while_permits_live_and_refusing_spends_nothing() {
    let fixture = Fixture::new([key(1, 1)]);
    let held = [
        fixture.ask("/things", &secret(1)).unwrap(),
        fixture.ask("/things", &secret(1)).unwrap(),
    ];
    assert_eq!(fixture.reason("/things", 1), Err("TOO_MANY_IN_FLIGHT"));
    drop(held);
    let third = fixture.ask("/things", &secret(1)).unwrap();
    assert_eq!(third.rate().unwrap().remaining, 0, "the refused one took no permit");
    drop(third);
    assert_eq!(fixture.reason("/things", 1), Err("RATE_LIMITED"));
    let other = fixture.ask("/narrow", &secret(1)).unwrap();
    drop(other);
}

#[test]
fn rotation_refresh_and_a_changed_limit_find_the_same_windows() {
    let fixture = Fixture::new([key(1, 1)]);
    assert_eq!(fixture.reason("/things", 1), Ok(()));
    let rotated = KeyUpdate {
        secrets: vec![with_secret(1, Some(START_MS + 1000)), with_secret(2, None)],
        ..key(1, 11)
    };
    fixture.gate.apply(rotated.clone()).unwrap();
    assert_eq!(fixture.ask("/things", &secret(2)).unwrap().rate().unwrap().remaining, 1);
    fixture.resync([rotated], 12).unwrap();
    assert_eq!(fixture.ask("/things", &secret(1)).unwrap().rate().unwrap().remaining, 0);
    assert_eq!(fixture.reason("/things", 2), Err("RATE_LIMITED"));
    let wide = KeyUpdate {
        plan: "wide".into(),
        secrets: vec![with_secret(2, None)],
        ..key(1, 13)
    };
    fixture.gate.apply(wide).unwrap();
    assert_eq!(
        fixture.ask("/things", &secret(2)).unwrap().rate().unwrap().remaining,
        4996
    );
    assert_eq!(
        fixture.reason("/things", 1),
        Err("INVALID_API_KEY"),
        "a secret that is gone is unknown"
    );
    let mut shorter = settings();
    shorter.tiers[0].1 = Limit::new(5, 60_000).unwrap();
    shorter.plans[1].tiers.clear();
    fixture.gate.reload(shorter).unwrap();
    assert_eq!(
        fixture.ask("/things", &secret(2)).unwrap().rate().unwrap().remaining,
        0,
        "counts outlive the length"
    );
}

#[test]
fn every_permit_is_drained_once_even_of_keys_that_are_gone() {
    let fixture = Fixture::new([
        key(1, 1),
        KeyUpdate {
            plan: "wide".into(),
            ..key(2, 1)
        },
    ]);
    assert_eq!(fixture.reason("/things", 1), Ok(()));
    assert_eq!(fixture.reason("/narrow", 1), Ok(()));
    assert_eq!(fixture.reason("/narrow", 1), Err("RATE_LIMITED"));
    for _ in 0..100 {
        assert_eq!(fixture.reason("/things", 2), Ok(()));
    }
    fixture.gate.forget("key_2", 11).unwrap();
    let drain = || {
        let (mut uses, mut secrets) = (vec![], vec![]);
        fixture.gate.drain_permits(
            &mut |u| uses.push((u.key_id.to_string(), u.tier, u.permits, u.limited)),
            &mut |s| secrets.push(s),
        );
        uses.sort();
        (uses, secrets.len())
    };
    let expected = [
        ("key_1", "default", 1, 0),
        ("key_1", "narrow", 1, 1),
        ("key_2", "default", 100, 0),
    ];
    assert_eq!(
        drain(),
        (expected.map(|(k, t, p, l)| (k.into(), t.into(), p, l)).to_vec(), 2)
    );
    assert_eq!(drain(), (vec![], 0));
    assert_eq!(fixture.reason("/things", 1), Ok(()));
    assert_eq!(drain().0, [("key_1".into(), "default".into(), 1, 0)]);
}

#[test]
fn journalled_windows_come_back_before_their_key_does() {
    let first = Fixture::new([key(1, 1)]);
    assert_eq!(
        [first.reason("/things", 1), first.reason("/things", 1)],
        [Ok(()), Ok(())]
    );
    let mut states = vec![];
    first.gate.drain_windows(first.clock.now(), &mut |state| {
        states.push((state.key_id.to_owned(), state.tier.to_owned(), state.counts.clone()))
    });
    assert_eq!(states.len(), 1);
    let second = Fixture {
        gate: Gate::new(settings()).unwrap(),
        clock: first.clock.clone(),
    };
    for (key_id, tier, counts) in &states {
        second.gate.restore_window(key_id, tier, counts, second.clock.now());
    }
    second.resync([key(1, 1)], 1).unwrap();
    assert_eq!(second.ask("/things", &secret(1)).unwrap().rate().unwrap().remaining, 0);
    assert_eq!(second.reason("/things", 1), Err("RATE_LIMITED"));
}

#[test]
fn idle_windows_are_given_back_and_their_counts_are_not_lost() {
    let fixture = Fixture::new([key(1, 1)]);
    assert_eq!(fixture.reason("/things", 1), Ok(()));
    fixture.gate.give_back_idle(fixture.clock.now());
    assert_ne!(fixture.gate.slots.place(0), NO_PLACE, "not idle yet");
    fixture.clock.advance(Duration::from_secs(2 * 3600));
    fixture.gate.give_back_idle(fixture.clock.now());
    assert_eq!(fixture.gate.slots.place(0), NO_PLACE);
    let mut permits = 0;
    fixture.gate.drain_permits(&mut |u| permits += u.permits, &mut |_| ());
    assert_eq!(permits, 1);
    assert_eq!(fixture.ask("/things", &secret(1)).unwrap().rate().unwrap().remaining, 2);
}

#[test]
fn public_rules_are_limited_by_address_and_need_no_key() {
    let fixture = Fixture::new([]);
    let none = HeaderMap::new();
    assert!(fixture.ask_with("/register", &none).unwrap().holder().is_none());
    assert_eq!(
        fixture.ask_with("/register", &none).unwrap().rate().unwrap().remaining,
        0
    );
    assert_eq!(
        fixture.ask_with("/register", &none).unwrap_err().reason.code(),
        "RATE_LIMITED"
    );
}
