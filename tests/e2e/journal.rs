//! A quota that is half spent stays so, however the process ends.

use crate::gate::{Gate, Spec, Upstream, secret};
use std::fs;
use std::sync::Arc;
use tollgate::clock::Clock;
use tollgate::config::{self, Config};
use tollgate::gate as decision;
use tollgate::meter::{JournalOutcome, Meter, Settings};

/// Five stops, five upgrades and five kills in one window: what passes in all is the limit, and at most what the last
/// moments before each kill had counted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quota_half_spent_outlives_stops_upgrades_and_kills() {
    const LIMIT: u64 = 3_000;
    let upstream = Upstream::start(1).await;
    let mut spec = Spec::new(upstream.address);
    spec.probe_limit = LIMIT as u32;
    let mut gate = Gate::start(spec);
    let (mut passed, mut unsure, mut forgiven) = (0_u64, 0_u64, 0_u64);
    let spend = async |gate: &Gate, count: u64| {
        for _ in 0..count {
            assert_eq!(gate.ask("/probe/a", 0).await.status(), 200);
        }
    };
    spend(&gate, LIMIT / 2).await;
    passed += LIMIT / 2;
    for round in 0..5_u64 {
        for end in ["TERM", "upgrade", "KILL"] {
            spend(&gate, 10 + round).await;
            passed += 10 + round;
            if end == "KILL" {
                // All of it is on the disk; what comes after may not be.
                until_journalled(&gate, passed - forgiven).await;
                let last = 1 + 7 * round;
                spend(&gate, last).await;
                passed += last;
                unsure += last;
            }
            tokio::task::block_in_place(|| match end {
                "upgrade" => drop(gate.upgrade()),
                signal => {
                    gate.signal(signal);
                    gate.wait();
                    gate.start_again();
                }
            });
            let left = gate.left_after_one_more("/probe/a", 0).await;
            passed += 1;
            let counted = LIMIT - left;
            assert!(
                counted <= passed,
                "{end}: {counted} of {passed}: nothing is counted twice"
            );
            let now_forgiven = passed - counted;
            if end == "KILL" {
                assert!(
                    now_forgiven - forgiven <= 1 + 7 * round,
                    "{end}: {now_forgiven}, before it {forgiven}"
                );
            } else {
                assert_eq!(now_forgiven, forgiven, "{end} forgives nothing");
            }
            forgiven = now_forgiven;
        }
    }
    // To the end of the quota.
    let mut refused = false;
    for _ in 0..=LIMIT {
        if gate.ask("/probe/a", 0).await.status() == 429 {
            refused = true;
            break;
        }
        passed += 1;
    }
    assert!(refused);
    println!(
        "limit {LIMIT}: {passed} passed in all, {forgiven} forgiven of {unsure} in the last moments before 5 kills"
    );
    assert_eq!(passed, LIMIT + forgiven);
    assert!(forgiven <= unsure);
}

/// Waits until the journal on the disk has so many permits, by reading a copy as a start would.
async fn until_journalled(gate: &Gate, permits: u64) {
    crate::gate::eventually("the journal", async || {
        let copy = tempfile::tempdir().unwrap();
        fs::copy(
            gate.state().join("windows.journal"),
            copy.path().join("windows.journal"),
        )
        .unwrap();
        restored(gate, copy.path()) >= permits
    })
    .await;
}

fn restored(gate: &Gate, state: &std::path::Path) -> u64 {
    let config: Config = config::load(&gate.path("tollgate.yaml"), &config::process_env).unwrap();
    let tiers = config.tiers.iter().map(|tier| {
        let limit = decision::limit::Limit::new(tier.limit, tier.window.as_millis() as u64).unwrap();
        (tier.name.clone(), limit)
    });
    let settings = decision::Settings {
        environments: vec![],
        checksum: decision::key::Checksum::Optional,
        foreign: decision::key::Foreign::Accept,
        tiers: tiers.collect(),
        plans: vec![],
        routes: vec![],
        default_upstream: String::new(),
        failed_attempts: decision::FailedAttemptsSettings {
            limit: 10,
            window: std::time::Duration::from_secs(60),
        },
    };
    let decider = Arc::new(decision::Gate::new(settings).unwrap());
    let meter = Meter::new(Settings::new("reader", None, state), decider, Clock::system()).unwrap();
    match meter.load_journal() {
        JournalOutcome::Restored { permits, .. } => permits,
        JournalOutcome::Missing => 0,
        JournalOutcome::Unusable { reason } => panic!("{reason}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_or_truncated_journal_is_believed_up_to_the_damage_and_said_so() {
    let upstream = Upstream::start(1).await;
    let mut spec = Spec::new(upstream.address);
    (spec.keys, spec.probe_limit) = (3, 100);
    let mut gate = Gate::start(spec);
    for key in 0..3 {
        for _ in 0..10 {
            assert_eq!(gate.ask("/probe/a", key).await.status(), 200, "{}", secret(key));
        }
    }
    let stop = |gate: &mut Gate| {
        gate.signal("TERM");
        gate.wait();
    };
    tokio::task::block_in_place(|| stop(&mut gate));
    let journal = gate.state().join("windows.journal");
    let whole = fs::read(&journal).unwrap();
    let cut = whole[..whole.len() - 5].to_vec();
    let mut flipped = whole.clone();
    *flipped.last_mut().unwrap() ^= 0x40;
    let mut other = whole.clone();
    other[..8].copy_from_slice(b"NOTOURS!");
    let cases = [
        ("cut off", cut, "(cut off)"),
        ("a bit turned in the last record", flipped, "(damaged)"),
        ("not ours", other, "(not a journal of this version)"),
        ("empty", vec![], "(not a journal of this version)"),
    ];
    for (case, bytes, said) in cases {
        fs::write(&journal, &bytes).unwrap();
        fs::write(gate.path("log"), "").unwrap();
        tokio::task::block_in_place(|| gate.start_again());
        let log = gate.log();
        let line = log.lines().find(|line| line.contains("meter:")).unwrap_or_default();
        assert!(
            line.contains("WARN") && line.contains("it is ignored") && line.contains(said),
            "{case}: {log}"
        );
        let mut left = vec![];
        for key in 0..3 {
            left.push(gate.left_after_one_more("/probe/a", key).await);
        }
        left.sort_unstable();
        let expected = if said.contains("version") {
            [99, 99, 99]
        } else {
            [89, 89, 99]
        };
        assert_eq!(left, expected, "{case}: what came before the damage counts");
        tokio::task::block_in_place(|| stop(&mut gate));
    }
}
