//! Whose fault it is where a request waits longer than it may: the machine's. `cluster_sim` shows in virtual time that none
//! does; here time is real, and a gate's thread has to share two busy processors.
//!
//! On the gate's own thread a timer ticks beside the requests. The thread runs what is ready in the order in which it
//! became so. So a request whose time is over comes up before the timer does for the second time after that, however
//! late either is; one that waited for anything else would come up after it.

use crate::harness::{Redis, Wire, free_port};
use crate::sharing_gate::{Asked, SharingGate};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::runtime;
use tokio::sync::oneshot;
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
const IN_THE_WAY: usize = 4;
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
    let waited = |asked: &Asked| asked.answered - asked.came;
    let to_the_end = asked.iter().filter(|asked| waited(asked) + TICK >= WAIT).count();
    let too_long = asked.iter().filter(|asked| waited(asked) > WAIT);
    let at_fault: Vec<_> = too_long.clone().filter(|asked| is_at_fault(asked, &ticks)).collect();
    println!(
        "{} requests, {to_the_end} waited to the end, {} of them too long, {} when the timer was not late; longest wait {:?} \
         of {WAIT:?}; latest tick {:?}",
        asked.len(),
        too_long.count(),
        at_fault.len(),
        asked.iter().map(waited).max().unwrap(),
        ticks.iter().map(|tick| tick.came - tick.due).max().unwrap(),
    );
    assert!(to_the_end > 100, "hardly any waited to the end");
    assert!(at_fault.is_empty(), "{at_fault:?}");
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
    let (stop, stopped) = oneshot::channel();
    let ticking = tokio::spawn(tick(stopped));
    let (mut next, mut requests) = (Instant::now(), JoinSet::new());
    let end = next + LASTING;
    while next < end {
        sleep_until(next).await;
        requests.spawn(gate.request(1));
        next += EVERY;
    }
    let asked = requests.join_all().await;
    sleep_until(Instant::now() + WAIT + 5 * TICK).await;
    stop.send(()).unwrap();
    (asked, ticking.await.unwrap())
}

async fn tick(mut stopped: oneshot::Receiver<()>) -> Vec<Tick> {
    let mut ticks = vec![];
    while stopped.try_recv().is_err() {
        let due = Instant::now() + TICK;
        sleep_until(due).await;
        let came = Instant::now();
        ticks.push(Tick { due, came });
    }
    ticks
}

/// Whether the request came up after the timer had for the second time.
fn is_at_fault(asked: &Asked, ticks: &[Tick]) -> bool {
    let mut after = ticks.iter().filter(|tick| tick.due >= asked.came + WAIT);
    after.nth(1).is_some_and(|second| asked.answered > second.came)
}
