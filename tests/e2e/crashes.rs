//! The control plane killed at random moments, its database locked, its disk full; a gate with a spoilt spool.

use crate::fleet::{Account, Control, Fleet, Key, Random, key, size};
use crate::harness::{PATIENCE, client};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use sqlx::{Connection as _, Executor as _, SqliteConnection};
use std::collections::BTreeMap;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const OK: StatusCode = StatusCode::OK;
const REFUSED: StatusCode = StatusCode::UNAUTHORIZED;

/// What was acknowledged of a key. Anything after it may have been done as well: its answer was lost in the kill.
#[derive(Clone, Debug)]
struct Acknowledged {
    key: Key,
    name: String,
    revoked: bool,
    /// A change was asked for after this and not answered.
    unanswered: bool,
    /// Secrets that a rotation without grace replaced.
    dead: Vec<String>,
}

type Keys = Arc<Mutex<BTreeMap<String, Acknowledged>>>;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_control_plane_killed_at_random_moments_keeps_every_acknowledged_change() {
    let kills = size(200, 12);
    let fleet = Fleet::new().await;
    let mut control = fleet.control();
    let gate = fleet.gate("gate-1", &control.url);
    gate.ready().await;
    let account = control.account("kills@example.com").await;
    let bystander = account.create_key("bystander", "live").await;
    gate.until_it_says(OK, &bystander.secret).await;
    let (keys, mut random) = (Keys::default(), Random::new());
    let changes = Arc::new(AtomicUsize::new(0));
    for kill in 0..kills {
        let killed = Arc::new(AtomicBool::new(false));
        let streams: Vec<_> = (0..3)
            .map(|stream| {
                let (account, keys, killed) = (account.clone(), Arc::clone(&keys), Arc::clone(&killed));
                let changes = Arc::clone(&changes);
                tokio::spawn(async move { change(&account, stream, kill, &keys, &killed, &changes).await })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(10 + random.below(400))).await;
        control.process.signal("KILL");
        let _ = control.process.wait(PATIENCE);
        killed.store(true, Ordering::Relaxed);
        for stream in streams {
            stream.await.unwrap();
        }
        if kill % 10 == 0 {
            assert_eq!(integrity(&fleet).await, "ok", "after kill {kill}");
        }
        // The gate serves on meanwhile.
        assert_eq!(gate.ask(&client(), "/any", &bystander.secret).await, OK);
        control = fleet.control();
        let listed = listed(&account).await;
        for (id, acknowledged) in keys.lock().unwrap().iter() {
            is_there(&listed, id, acknowledged, kill);
        }
    }
    assert_eq!(integrity(&fleet).await, "ok");
    // And so in the gate, once it has caught up: no revoked key and no replaced secret passes.
    let all = keys.lock().unwrap().clone();
    let (mut revoked, mut replaced) = (0, 0);
    let last = account.create_key("last", "live").await;
    gate.until_it_says(OK, &last.secret).await;
    let asking = client();
    for acknowledged in all.values() {
        if acknowledged.revoked {
            revoked += 1;
            assert_eq!(gate.ask(&asking, "/any", &acknowledged.key.secret).await, REFUSED);
        } else if !acknowledged.unanswered {
            assert_eq!(
                gate.ask(&asking, "/any", &acknowledged.key.secret).await,
                OK,
                "{acknowledged:?}"
            );
        }
        for dead in &acknowledged.dead {
            replaced += 1;
            assert_eq!(gate.ask(&asking, "/any", dead).await, REFUSED);
        }
    }
    println!(
        "{kills} kills, {} changes acknowledged; {} keys, {revoked} of them revoked, {replaced} secrets replaced",
        changes.load(Ordering::Relaxed),
        all.len()
    );
    assert!(
        gate.metrics().await.contains("\ntollgate_feed_source_is_behind 0"),
        "the gate never knew more than the database"
    );
}

/// Creates, renames, rotates and revokes until the control plane is gone.
async fn change(
    account: &Account,
    stream: usize,
    kill: usize,
    keys: &Keys,
    killed: &AtomicBool,
    changes: &AtomicUsize,
) {
    for round in 0.. {
        let name = format!("key {stream} {kill} {round}");
        let wanted = json!({"name": name, "environment": "live", "scopes": []});
        let Some(answer) = account.attempt(Method::POST, "/keys", wanted).await else {
            return;
        };
        let made = key(&answer);
        let (id, path) = (made.id.clone(), format!("/keys/{}", made.id));
        let acknowledged = Acknowledged {
            key: made,
            name,
            revoked: false,
            unanswered: true,
            dead: vec![],
        };
        keys.lock().unwrap().insert(id.clone(), acknowledged);
        let noted = |note: &dyn Fn(&mut Acknowledged)| {
            changes.fetch_add(1, Ordering::Relaxed);
            note(keys.lock().unwrap().get_mut(&id).expect("it was put there"));
        };
        let renamed = format!("renamed {stream} {kill} {round}");
        let Some(_) = account.attempt(Method::PATCH, &path, json!({"name": renamed})).await else {
            return;
        };
        noted(&|key| key.name = renamed.clone());
        let rotate = format!("{path}/rotate");
        let grace = json!({"gracePeriodSeconds": 0});
        let Some(rotated) = account.attempt(Method::POST, &rotate, grace).await else {
            return;
        };
        let new = key(&rotated);
        noted(&|key| {
            let old = std::mem::replace(&mut key.key, new.clone());
            key.dead.push(old.secret);
        });
        if round % 2 == 0 {
            let Some(_) = account.attempt(Method::DELETE, &path, Value::Null).await else {
                return;
            };
            noted(&|key| key.revoked = true);
        }
        noted(&|key| key.unanswered = false);
        if killed.load(Ordering::Relaxed) {
            return;
        }
    }
}

fn is_there(listed: &BTreeMap<String, Value>, id: &str, acknowledged: &Acknowledged, kill: usize) {
    let Some(found) = listed.get(id) else {
        panic!("kill {kill}: {acknowledged:?} is gone");
    };
    let revision = found["revision"].as_u64().unwrap();
    assert!(
        revision >= acknowledged.key.revision,
        "kill {kill}: {found}, {acknowledged:?}"
    );
    if acknowledged.revoked {
        assert_eq!(found["status"], "revoked", "kill {kill}: {found}");
    }
    if !acknowledged.unanswered {
        assert_eq!(found["name"], acknowledged.name.as_str(), "kill {kill}: {found}");
        assert_eq!(
            found["status"] == "revoked",
            acknowledged.revoked,
            "kill {kill}: {found}"
        );
    }
}

/// Every key of the organisation, by its id.
async fn listed(account: &Account) -> BTreeMap<String, Value> {
    let (mut keys, mut page) = (BTreeMap::new(), "/keys?limit=100".to_owned());
    loop {
        let answer = account.call(Method::GET, &page, Value::Null).await;
        for item in answer["items"].as_array().unwrap() {
            keys.insert(item["id"].as_str().unwrap().to_owned(), item.clone());
        }
        match answer["nextCursor"].as_str() {
            Some(cursor) => page = format!("/keys?limit=100&cursor={cursor}"),
            None => return keys,
        }
    }
}

async fn integrity(fleet: &Fleet) -> String {
    let mut connection = SqliteConnection::connect(&fleet.database()).await.unwrap();
    let verdict = sqlx::query_scalar("PRAGMA integrity_check")
        .fetch_one(&mut connection)
        .await
        .unwrap();
    connection.close().await.unwrap();
    verdict
}

/// Asks the gate again and again, beside whatever happens to the control plane; every answer must be 200.
fn ask_on(url: &str, secret: &str) -> (Arc<AtomicBool>, tokio::task::JoinHandle<usize>) {
    let stop = Arc::new(AtomicBool::new(false));
    let (url, secret, stopping) = (format!("{url}/any"), secret.to_owned(), Arc::clone(&stop));
    let asking = tokio::spawn(async move {
        let (client, mut answers) = (client(), 0);
        while !stopping.load(Ordering::Relaxed) {
            let answer = client.get(&url).header("x-api-key", &secret).send().await.unwrap();
            assert_eq!(answer.status(), OK, "the gate is not touched");
            answers += 1;
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        answers
    });
    (stop, asking)
}

/// The refusal of a change that could not be made.
async fn unavailable(response: reqwest::Response) {
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(response.headers()["retry-after"], "1");
    let body: Value = response.json().await.unwrap();
    assert_eq!(body["error"]["code"], "UNAVAILABLE");
    assert_eq!(
        body["error"]["message"],
        "The database is not available. Nothing was changed."
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_locked_database_is_a_503_and_the_gate_is_not_touched() {
    let fleet = Fleet::new().await;
    let control = fleet.control();
    let gate = fleet.gate("gate-1", &control.url);
    let account = control.account("locked@example.com").await;
    let key = account.create_key("key", "live").await;
    gate.until_it_says(OK, &key.secret).await;
    let before = listed(&account).await;
    let (stop, asking) = ask_on(&gate.url, &key.secret);
    let mut other = SqliteConnection::connect(&fleet.database()).await.unwrap();
    other.execute("BEGIN IMMEDIATE").await.unwrap();
    let path = format!("/keys/{}", key.id);
    for (method, path, body) in [
        (Method::DELETE, path.as_str(), Value::Null),
        (
            Method::POST,
            "/keys",
            json!({"name": "new", "environment": "live", "scopes": []}),
        ),
    ] {
        unavailable(account.send(method, path, body).await.unwrap()).await;
    }
    other.execute("ROLLBACK").await.unwrap();
    same(&before, &listed(&account).await);
    stop.store(true, Ordering::Relaxed);
    println!("{} requests passed meanwhile", asking.await.unwrap());
    account.call(Method::DELETE, &path, Value::Null).await;
    gate.until_it_says(REFUSED, &key.secret).await;
}

/// The same but for what use alone changes.
fn same(before: &BTreeMap<String, Value>, after: &BTreeMap<String, Value>) {
    let without_use = |keys: &BTreeMap<String, Value>| {
        let mut keys = keys.clone();
        for key in keys.values_mut() {
            key["lastUsedAt"] = Value::Null;
            for secret in key["secrets"].as_array_mut().unwrap() {
                secret["lastUsedAt"] = Value::Null;
            }
        }
        keys
    };
    assert_eq!(without_use(before), without_use(after));
}

/// Sets how large a file the process may write; `unlimited` is a number, too.
fn limit_files(control: &Control, bytes: &str) {
    let pid = control.process.id().to_string();
    let set = Command::new("prlimit")
        .args(["--pid", &pid, &format!("--fsize={bytes}:unlimited")])
        .status()
        .expect("prlimit is there (Debian's util-linux)");
    assert!(set.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_is_a_503_nothing_is_half_done_and_the_gate_is_not_touched() {
    let fleet = Fleet::new().await;
    // A write beyond the limit then fails, as on a full disk, and does not end the process.
    let mut control = fleet.control_under(&["sh", "-c", "trap '' XFSZ; exec \"$0\" \"$@\""]);
    let gate = fleet.gate("gate-1", &control.url);
    let account = control.account("full@example.com").await;
    let bystander = account.create_key("bystander", "live").await;
    gate.until_it_says(OK, &bystander.secret).await;
    let (stop, asking) = ask_on(&gate.url, &bystander.secret);
    let wal = fleet.path().join("tollgate.db-wal");
    let bytes = std::fs::metadata(&wal).map_or(0, |file| file.len());
    limit_files(&control, &(bytes + 100_000).to_string());
    let mut made = 0;
    let refused = loop {
        let wanted = json!({"name": format!("key {made}"), "environment": "live", "scopes": []});
        let response = account.send(Method::POST, "/keys", wanted).await.unwrap();
        if response.status() != StatusCode::CREATED {
            break response;
        }
        made += 1;
        assert!(made < 2_000, "the disk does not fill");
    };
    unavailable(refused).await;
    // Reading goes on, and what was refused has left nothing.
    let during = listed(&account).await;
    assert_eq!(
        during.values().filter(|key| key["name"] != "bystander").count(),
        made + 1,
        "with the first key"
    );
    let revoke = account
        .send(Method::DELETE, &format!("/keys/{}", bystander.id), Value::Null)
        .await;
    unavailable(revoke.unwrap()).await;
    limit_files(&control, "unlimited");
    let deadline = Instant::now() + PATIENCE;
    let wanted = json!({"name": "after", "environment": "live", "scopes": []});
    while account.attempt(Method::POST, "/keys", wanted.clone()).await.is_none() {
        assert!(Instant::now() < deadline, "it does not recover");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let after = listed(&account).await;
    assert_eq!(after.len(), during.len() + 1);
    let mut revisions: Vec<u64> = after.values().map(|key| key["revision"].as_u64().unwrap()).collect();
    revisions.sort_unstable();
    assert_eq!(
        revisions,
        (1..=after.len() as u64).collect::<Vec<_>>(),
        "no revision was lost"
    );
    stop.store(true, Ordering::Relaxed);
    println!(
        "{made} keys before the disk was full; {} requests passed meanwhile",
        asking.await.unwrap()
    );
    control.process.signal("TERM");
    assert!(control.process.wait(PATIENCE).success());
    assert_eq!(integrity(&fleet).await, "ok");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gates_take_a_restored_backup_over_as_it_is() {
    let fleet = Fleet::new().await;
    let mut control = fleet.control();
    let gate = fleet.gate("gate-1", &control.url);
    let account = control.account("restored@example.com").await;
    let before = account.create_key("before the backup", "live").await;
    let copy = fleet.path().join("copy.db");
    tollgate::control::backup(&fleet.database(), &copy).await.unwrap();
    let after = account.create_key("after the backup", "live").await;
    let path = format!("/keys/{}?wait=all", before.id);
    account.call(Method::PATCH, &path, json!({"disabled": true})).await;
    gate.until_it_says(OK, &after.secret).await;
    gate.until_it_says(REFUSED, &before.secret).await;
    control.process.signal("KILL");
    let _ = control.process.wait(PATIENCE);
    for name in ["tollgate.db", "tollgate.db-wal", "tollgate.db-shm"] {
        let _ = std::fs::remove_file(fleet.path().join(name));
    }
    std::fs::rename(copy, fleet.path().join("tollgate.db")).unwrap();
    let _control = fleet.control();
    gate.until_it_says(OK, &before.secret).await;
    gate.until_it_says(REFUSED, &after.secret).await;
    // And it goes on from there.
    let revoked = account.call(Method::DELETE, &path, Value::Null).await;
    assert_eq!(revoked["applied"]["gates"], json!(["gate-1"]));
    assert_eq!(gate.ask(&client(), "/any", &before.secret).await, REFUSED);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gate_starts_without_its_control_plane_from_a_spool_or_without_a_spoilt_one() {
    let fleet = Fleet::new().await;
    let mut control = fleet.control();
    let account = control.account("spool@example.com").await;
    let key = account.create_key("key", "live").await;
    let mut gate = fleet.gate("gate-1", &control.url);
    gate.until_it_says(OK, &key.secret).await;
    gate.process.signal("TERM");
    assert!(gate.process.wait(PATIENCE).success());
    control.process.signal("KILL");
    let _ = control.process.wait(PATIENCE);

    // Served at once, by the very first request.
    let mut gate = fleet.gate("gate-1", &control.url);
    assert_eq!(gate.ask(&client(), "/any", &key.secret).await, OK);
    gate.process.signal("KILL");
    let _ = gate.process.wait(PATIENCE);

    let spool = fleet.path().join("gate-1/keys.spool");
    let whole = std::fs::read(&spool).unwrap();
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 0x40;
    for (spoilt, line) in [
        (flipped, "it is damaged"),
        (whole[..whole.len() / 2].to_vec(), "it is cut off"),
    ] {
        std::fs::write(&spool, spoilt).unwrap();
        let mut gate = fleet.gate("gate-1", &control.url);
        let status = gate.ask(&client(), "/any", &key.secret).await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "started, and not ready");
        let log = fleet.log("gate-1");
        let said = log
            .lines()
            .any(|text| text.contains("keys.spool is not used: ") && text.contains(line));
        assert!(said, "no line says that {line}:\n{log}");
        gate.process.signal("KILL");
        let _ = gate.process.wait(PATIENCE);
    }
    let _control = fleet.control();
    let gate = fleet.gate("gate-1", &control.url);
    gate.until_it_says(OK, &key.secret).await;
}
