//! From a change's answer to its effect in two gates, and what is said of a gate that is cut off.

use crate::between::{Cable, Wire};
use crate::fleet::{Fleet, Gate, Key, size};
use crate::harness::{PATIENCE, client};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const OK: StatusCode = StatusCode::OK;
const REFUSED: StatusCode = StatusCode::UNAUTHORIZED;

/// A key is switched off and on; each time both gates are asked from the answer on until they do as it says.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_have_their_effect_in_every_gate_when_they_are_answered() {
    let changes = size(10_000, 600);
    let fleet = Fleet::new().await;
    let control = fleet.control();
    let gates = [fleet.gate("gate-1", &control.url), fleet.gate("gate-2", &control.url)];
    let account = control.account("effect@example.com").await;
    let mut keys = vec![];
    for n in 0..20 {
        keys.push(account.create_key(&format!("key {n}"), "live").await);
    }
    for gate in &gates {
        gate.ready().await;
        gate.until_it_says(OK, &keys[19].secret).await;
    }
    let asking = client();
    let mut effects = Vec::with_capacity(changes * 2);
    let mut at_once = 0;
    for n in 0..changes {
        let key = &keys[n % keys.len()];
        let disabled = (n / keys.len()) % 2 == 0;
        // Half of the changes wait for acknowledgements: then the first request must see them.
        let waits = n % 2 == 0;
        let wait = if waits { "?wait=all&wait_seconds=20" } else { "" };
        let path = format!("/keys/{}{wait}", key.id);
        let changed = account.call(Method::PATCH, &path, json!({"disabled": disabled})).await;
        let answered = Instant::now();
        if waits {
            assert_eq!(
                changed["applied"],
                json!({"gates": ["gate-1", "gate-2"], "pending": [], "silent": []})
            );
        }
        let expected = if disabled { REFUSED } else { OK };
        for gate in &gates {
            let mut tries = 0;
            while gate.ask(&asking, "/any", &key.secret).await != expected {
                tries += 1;
                assert!(!waits, "acknowledged, and not in force");
                assert!(answered.elapsed() < PATIENCE, "change {n} has no effect");
            }
            at_once += u32::from(tries == 0);
            effects.push(answered.elapsed());
        }
    }
    effects.sort_unstable();
    let at = |part: usize| effects[(effects.len() * part / 1_000).min(effects.len() - 1)];
    println!(
        "{changes} changes, two gates: from the answer to the answer of the first request that sees it: median {:?}, p99 {:?}, \
         worst {:?}; the very first request saw it in {at_once} of {}",
        at(500),
        at(990),
        at(1_000),
        effects.len()
    );
    if size(1, 0) == 1 {
        assert!(at(990) < Duration::from_millis(100), "{:?}", at(990));
    }
}

#[derive(Clone, Copy, Debug)]
enum CutOff {
    /// The wire to it stalls; it serves on.
    Wire,
    /// The whole process stands still.
    Process,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gate_behind_a_stalled_wire_is_named_and_the_others_obey() {
    is_named(CutOff::Wire).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gate_that_stands_still_is_named_and_the_others_obey() {
    is_named(CutOff::Process).await;
}

async fn is_named(cut_off: CutOff) {
    let fleet = Fleet::new().await;
    let control = fleet.control();
    let cable = Cable::to(&control.url).await;
    let gates = [fleet.gate("gate-1", &control.url), fleet.gate("gate-2", &cable.url)];
    let account = control.account("cut@example.com").await;
    let (doomed, other) = (
        account.create_key("doomed", "live").await,
        account.create_key("other", "live").await,
    );
    for gate in &gates {
        gate.until_it_says(OK, &doomed.secret).await;
        gate.until_it_says(OK, &other.secret).await;
    }
    // Long enough for the gate that is there, on a machine that has much else to do.
    let path = format!("/keys/{}?wait=all&wait_seconds=4", doomed.id);
    match cut_off {
        CutOff::Wire => cable.set(Wire::Stalls),
        CutOff::Process => gates[1].process.signal("STOP"),
    }
    let revoked = account.call(Method::DELETE, &path, Value::Null).await;
    assert_eq!(
        revoked["applied"],
        json!({"gates": ["gate-1"], "pending": ["gate-2"], "silent": []})
    );
    never_passes(&gates[0], &doomed, 200).await;
    if matches!(cut_off, CutOff::Wire) {
        // It said nothing, and it does not know.
        let seen = gates[1].ask(&client(), "/any", &doomed.secret).await;
        assert_eq!(seen, OK, "nobody has told gate-2");
    }
    match cut_off {
        CutOff::Wire => cable.set(Wire::Passes),
        CutOff::Process => gates[1].process.signal("CONT"),
    }
    // Asked again, the answer comes once gate-2 has it too.
    let path = format!("/keys/{}?wait=all&wait_seconds=30", doomed.id);
    let again = account.call(Method::DELETE, &path, Value::Null).await;
    assert_eq!(
        again["applied"],
        json!({"gates": ["gate-1", "gate-2"], "pending": [], "silent": []})
    );
    for gate in &gates {
        never_passes(gate, &doomed, 200).await;
        assert_eq!(gate.ask(&client(), "/any", &other.secret).await, OK);
    }
    let told = control.gates().await;
    assert!(
        told["items"].as_array().unwrap().iter().all(|gate| gate["lag"] == 0),
        "{told}"
    );
}

async fn never_passes(gate: &Gate, key: &Key, requests: usize) {
    let asking = client();
    for _ in 0..requests {
        assert_eq!(gate.ask(&asking, "/any", &key.secret).await, REFUSED);
    }
}
