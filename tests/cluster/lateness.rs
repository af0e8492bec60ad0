//! Whose fault it is where a request waits longer than it may: the machine's. `cluster_sim` shows in virtual time that none
//! does; here time is real, and a gate's thread has to share two busy processors.
//!
//! On the gate's own thread a timer ticks beside the requests. In all the time by which a request was late, that timer
//! was late too: nothing on that thread ran when it should.

use crate::harness::{Redis, Wire, free_port};
use crate::sharing_gate::{Asked, SharingGate};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::runtime::{self, Handle};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tollgate::clock::Clock;
use tollgate::cluster::coordinator::Settings;
use tollgate::cluster::protocol::OnLoss;
use tollgate::cluster::valkey::{Place, Valkey};
use tollgate::gate::limit::Limit;

const WAIT: Duration = Duration::from_millis(20);
/// How often the timer ticks, and the finest that the runtime's timers are.
const TICK: Duration = Duration::from_millis(1);
/// Threads that do nothing else than to be in the way.
const IN_THE_WAY: usize = 8;
const LASTING: Duration = Duration::from_secs(4);
const EVERY: Duration = Duration::from_millis(5);

/// A tick of the timer: when it was due, and when it came.
#[derive(Clone, Copy, Debug)]
struct Tick {
    due: Instant,
    came: Instant,
}

#[test]
fn who_waits_too_long_waits_for_a_processor() {
    let dir = tempfile::tempdir().unwrap();
    let redis = Redis::start(dir.path(), free_port(), &[]);
    let others = runtime::Runtime::new().unwrap();
    let wire = others.block_on(Wire::to(redis.port));
    // Slow, not lost: all who find nothing reserved wait to the end.
    wire.delay(Duration::from_millis(150));
    let is_over = AtomicBool::new(false);
    let (asked, ticks) = std::thread::scope(|threads| {
        for _ in 0..IN_THE_WAY {
            threads.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        let gate = threads.spawn(|| {
            let own = runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let lived = own.block_on(live(wire.port));
            is_over.store(true, Ordering::Relaxed);
            lived
        });
        gate.join().unwrap()
    });
    let waits = asked.iter().map(|asked| asked.answered - asked.came);
    let in_vain = asked
        .iter()
        .filter(|asked| !asked.passed && asked.answered - asked.came + TICK >= WAIT);
    let late = asked.iter().filter(|asked| asked.answered > asked.came + WAIT);
    let unexplained = late.clone().map(|asked| unexplained(asked, &ticks)).max();
    println!(
        "{} requests, {} refused at the end of their wait, {} late; longest wait {:?} of {WAIT:?}; latest tick {:?}; most \
         that no late tick explains {:?}",
        asked.len(),
        in_vain.clone().count(),
        late.count(),
        waits.max().unwrap(),
        ticks.iter().map(|tick| tick.came - tick.due).max().unwrap(),
        unexplained.unwrap_or_default(),
    );
    assert!(in_vain.count() > 100, "hardly any waited to the end");
    assert!(unexplained.unwrap_or_default() <= 5 * TICK);
}

/// A gate under load on this thread, and the timer.
async fn live(port: u16) -> (Vec<Asked>, Vec<Tick>) {
    let lost_after = Duration::from_secs(5);
    let store = Valkey::new(
        &Place::Server(format!("redis://127.0.0.1:{port}")),
        "tollgate:",
        lost_after,
    )
    .unwrap();
    let settings = Settings {
        id: 1,
        name: "gate".into(),
        on_loss: OnLoss::Closed,
        lost_after,
        max_clock_skew: Duration::from_millis(5),
        longest_window_ms: 2_000,
    };
    let limit = Limit::new(100, settings.longest_window_ms).unwrap();
    let gate = SharingGate::start(&settings, limit, WAIT, Arc::new(store), &Clock::system(), |limits| {
        Arc::new(limits)
    });
    let ticking = Handle::current().spawn(tick(Instant::now() + LASTING + 2 * WAIT));
    let (begin, mut requests) = (Instant::now(), JoinSet::new());
    let mut next = begin;
    while next < begin + LASTING {
        sleep_until(next).await;
        requests.spawn(gate.request(1));
        next += EVERY;
    }
    (requests.join_all().await, ticking.await.unwrap())
}

async fn tick(end: Instant) -> Vec<Tick> {
    let mut ticks = vec![];
    while Instant::now() < end {
        let due = Instant::now() + TICK;
        sleep_until(due).await;
        ticks.push(Tick {
            due,
            came: Instant::now(),
        });
    }
    ticks
}

/// For how long a request was late while the timer was not.
fn unexplained(asked: &Asked, ticks: &[Tick]) -> Duration {
    let (from, to) = (asked.came + WAIT, asked.answered);
    // From the tick before: in between, nobody knows.
    let late = ticks.iter().filter(|tick| tick.came - tick.due > TICK);
    let explained = late.map(|tick| tick.came.min(to).saturating_duration_since((tick.due - TICK).max(from)));
    (to - from).saturating_sub(explained.sum())
}
