//! The scripts, in a real server, against their twins in Rust.

use super::*;
use crate::cluster::memory::{Hash, MemoryStore};
use crate::cluster::protocol::{FieldId, History};
use std::process::{Child, Command, Stdio};

/// A server of its own in a directory of its own, reached by a socket in it.
struct Server {
    process: Child,
    directory: tempfile::TempDir,
}

impl Server {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let process = Command::new("redis-server")
            .args(["--port", "0", "--save", "", "--appendonly", "no", "--unixsocket", "s"])
            .current_dir(directory.path())
            .stdout(Stdio::null())
            .spawn()
            .expect("redis-server is installed (`make test` installs it)");
        Server { process, directory }
    }

    async fn connect(&self) -> MultiplexedConnection {
        let url = format!("redis+unix://{}", self.directory.path().join("s").display());
        let client = redis::Client::open(url).unwrap();
        for _ in 0..500 {
            if let Ok(connection) = client.get_multiplexed_async_connection().await {
                return connection;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("redis-server did not come up");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// splitmix64.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }
}

/// A gate that asks as gates do, some of whose answers are lost, or come after the next call was sent.
struct Asker {
    id: FieldId,
    sequence: u64,
    /// What it was granted and has not given back.
    granted: u64,
    /// All that it heard to have been granted.
    heard: u64,
    spent: u64,
    label: u64,
    base: u64,
    stamps: Vec<(u64, u64)>,
    known: bool,
}

#[tokio::test]
async fn the_script_and_its_twin_give_the_same_answers() {
    let server = Server::start();
    let mut connection = server.connect().await;
    let (mut done, mut unknown, mut overtaken, mut granted, mut swept, mut over) = (0, 0, 0, 0, 0, 0);
    let mut handed_over = 0;
    for round in 0..60 {
        let mut random = Random(round);
        let window_ms = [1_000, 10_000, 3_600_000][random.below(3) as usize];
        let limit = [1, 5, 100, 5_000][random.below(4) as usize];
        let keep_ms = [0, 50][random.below(2) as usize];
        let mut twin = Hash::default();
        let name = format!("w{round}");
        let mut now_ms = 1_700_000_000_000 + random.below(1_000_000);
        let mut askers: Vec<Asker> = (0..4)
            .map(|n| Asker {
                id: FieldId {
                    process: random.below(u64::MAX),
                    window: n,
                },
                sequence: 0,
                granted: 0,
                heard: 0,
                spent: 0,
                label: 0,
                base: 0,
                stamps: vec![],
                known: false,
            })
            .collect();
        for _ in 0..120 {
            now_ms += match random.below(20) {
                0 => random.below(window_ms * 3),
                1 => 0,
                _ => random.below(window_ms / 20),
            };
            // Clocks of servers differ.
            let at_ms = now_ms - random.below(2) * random.below(keep_ms + 1);
            let which = random.below(4) as usize;
            let asker = &mut askers[which];
            asker.sequence += u64::from(random.below(10) > 0);
            asker.spent += random.below(asker.granted - asker.spent + 1);
            let lapses = random.below(3) == 0;
            if lapses {
                asker.granted = asker.spent;
            }
            let ask = Ask {
                id: asker.id,
                sequence: asker.sequence,
                limit,
                window_ms,
                spent: asker.spent,
                reserved: (asker.granted - asker.spent) as u32,
                granted: asker.heard,
                afresh: random.below(10) == 0,
                held_until: asker.label,
                spent_until: if random.below(8) == 0 { 0 } else { asker.label },
                want: random.below(u64::from(limit) / 4 + 3) as u32,
                hold_ms: random.below(window_ms / 8),
                slack_ms: random.below(2) * keep_ms,
                keep_ms,
                history: (!asker.known || random.below(20) == 0).then(|| History {
                    base: asker.base,
                    counts: asker.stamps.clone(),
                }),
            };
            let mut call = redis::cmd("EVAL");
            call.arg(WINDOW).arg(1).arg(&name);
            ask_arguments(&mut call, &ask, at_ms);
            // The server would let it expire by its own clock, which has nothing to do with the test's. Only what is over
            // by the script's own time goes, in the server at once.
            let mut both = redis::pipe();
            both.atomic().add_command(call).cmd("PERSIST").arg(&name).ignore();
            both.cmd("EXISTS").arg(&name);
            let (real, exists): (Value, bool) = both.query_async(&mut connection).await.unwrap();
            let real = read_answer(&real).unwrap();
            let expected = twin.apply(&ask, at_ms);
            if matches!(expected, Answer::Done(_)) && !exists {
                // The script may let it live a little longer, where what counted last was moved to earlier.
                assert!(twin.is_over(at_ms), "round {round}: {ask:?} at {at_ms}");
                over += 1;
                twin = Hash::default();
            }
            match (real, expected) {
                (Answer::Done(mut real), Answer::Done(mut expected)) => {
                    done += 1;
                    let fresh = real.granted - ask.granted;
                    granted += fresh;
                    handed_over += u32::from(fresh > u64::from(ask.want));
                    // The script looks for the oldest only where somebody has to wait for it.
                    if fresh >= u64::from(ask.want) {
                        assert!(real.leaves_ms <= expected.leaves_ms);
                        (real.leaves_ms, expected.leaves_ms) = (0, 0);
                    }
                    assert_eq!(real, expected, "round {round}: {ask:?} at {at_ms}");
                    if random.below(5) > 0 {
                        asker.known = true;
                        asker.stamps.push((real.stamp, asker.spent - asker.base));
                        asker.base = asker.spent;
                        asker.label = real.label;
                        asker.granted += fresh;
                        asker.heard = real.granted;
                    }
                }
                (real, expected) => {
                    assert_eq!(real, expected, "round {round}: {ask:?} at {at_ms}");
                    unknown += u32::from(real == Answer::Unknown);
                    overtaken += u32::from(real == Answer::Overtaken);
                    asker.known &= real != Answer::Unknown;
                }
            }
        }
        let fields: Vec<String> = redis::cmd("HKEYS")
            .arg(&name)
            .query_async(&mut connection)
            .await
            .unwrap();
        swept += u32::from(fields.iter().filter(|field| field.starts_with('g')).count() < 4);
    }
    assert!(done > 3_000 && granted > 1_000, "{done} calls, {granted} permits");
    assert!(
        unknown > 10 && overtaken > 100 && swept > 0 && over > 0 && handed_over > 100,
        "{unknown} unknown, {overtaken} overtaken, {swept} swept, {over} over, {handed_over} handed over"
    );
}

#[tokio::test]
async fn gates_hear_of_each_other_as_in_the_twin() {
    let server = Server::start();
    let mut connection = server.connect().await;
    let (mut twin, mut random, mut now_ms) = (MemoryStore::new(""), Random(7), 1_700_000_000_000);
    let mut versions = [None; 5];
    let mut lists = 0;
    for n in 0..2_000 {
        now_ms += random.below(300);
        let which = random.below(5);
        let hello = Hello {
            id: which + 1,
            name: format!("gate {which}").as_str().into(),
            candidate: format!("content-{n}"),
            refilled: ["-", "content.run"][random.below(2) as usize].to_owned(),
            seen: random.below(10),
            unresolved_ms: random.below(2) * now_ms,
            left: random.below(10) == 0,
            version: versions[which as usize].filter(|_| random.below(5) > 0),
            forget_ms: 2_000,
        };
        let mut call = redis::cmd("EVAL");
        call.arg(GATES).arg(1).arg("gates");
        hello_arguments(&mut call, &hello, now_ms);
        let mut real = read_census(&call.query_async(&mut connection).await.unwrap()).unwrap();
        if let Some(gates) = &mut real.gates {
            gates.sort_by_key(|entry| entry.joined);
            lists += 1;
        }
        let batch = Batch {
            hello: Some(hello),
            ..Batch::default()
        };
        let answer = twin.exchange(&batch, now_ms);
        assert_eq!(Some(&real), answer.census.as_ref(), "call {n}");
        assert_eq!(answer.token.as_deref(), Some("content-0"));
        versions[which as usize] = Some(real.version);
        if random.below(300) == 0 {
            now_ms += 10_000;
        }
    }
    assert!(lists > 200, "{lists}");
    let mut who = redis::cmd("EVAL");
    who.arg(IDENTITY).arg(1).arg("gates");
    let (token, run_id): (String, String) = who.query_async(&mut connection).await.unwrap();
    assert_eq!((token.as_str(), run_id.len()), ("content-0", 40));
}

#[tokio::test]
async fn a_store_that_evicts_is_not_fit() {
    let server = Server::start();
    let mut connection = server.connect().await;
    let url = format!("redis+unix://{}", server.directory.path().join("s").display());
    let valkey = Valkey::new(&Place::Server(url), "t:", Duration::from_secs(5)).unwrap();
    assert_eq!(valkey.check().await, Ok(vec![]));
    let mut set = redis::cmd("CONFIG");
    set.arg("SET").arg("maxmemory-policy").arg("allkeys-lru");
    set.query_async::<()>(&mut connection).await.unwrap();
    assert!(matches!(valkey.check().await, Err(StoreError::Unfit(_))));
}
