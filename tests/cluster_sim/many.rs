//! One gate with very many windows: nothing is done for all of them in one go, because requests wait for it.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;
use tollgate::cluster::coordinator::{Coordinator, Settings};
use tollgate::cluster::memory::MemoryStore;
use tollgate::cluster::protocol::{Batch, OnLoss};
use tollgate::gate::limit::Limit;
use tollgate::gate::reservation::Reservation;

const MS: u64 = 1_000_000;
const WINDOW_MS: u64 = 3_600_000;
/// More than meet a new store in one go, twice over.
const WINDOWS: usize = 3_000;
/// What the coordinator calls `MET_AT_ONCE`.
const AT_ONCE: usize = 1_024;

struct World {
    coordinator: Coordinator,
    store: MemoryStore,
    now_ns: u64,
}

impl World {
    fn new() -> Self {
        let settings = Settings {
            id: 7,
            name: "gate".into(),
            on_loss: OnLoss::Closed,
            lost_after: Duration::from_millis(500),
            max_clock_skew: Duration::from_millis(50),
            longest_window_ms: WINDOW_MS,
        };
        World {
            coordinator: Coordinator::new(settings, MS),
            store: MemoryStore::new("first"),
            now_ns: MS,
        }
    }

    fn exchange(&mut self, number: u64, batch: &Batch) {
        let answer = self.store.exchange(batch, self.now_ns / MS);
        self.coordinator.answered(number, Some(&answer), self.now_ns);
    }

    /// What is to be sent now, without a tick before it.
    fn batches(&mut self) -> Vec<(u64, Batch)> {
        std::iter::from_fn(|| self.coordinator.next_batch(self.now_ns)).collect()
    }

    /// Lets time go on by a millisecond, and everything happen that is due. Answers the windows that were told.
    fn turn(&mut self) -> Vec<Arc<str>> {
        self.now_ns += MS;
        self.coordinator.tick(self.now_ns);
        let mut told = vec![];
        for (number, batch) in self.batches() {
            told.extend(batch.asks.iter().map(|(name, _)| name.clone()));
            self.exchange(number, &batch);
        }
        told
    }
}

impl World {
    /// With windows that each hold permits of the first store.
    fn with_permits() -> (Self, Vec<Arc<Reservation>>) {
        let mut world = World::new();
        let limit = Limit::new(1_000, WINDOW_MS).unwrap();
        let reservations: Vec<_> = (0..WINDOWS)
            .map(|n| Arc::new(Reservation::new(&format!("key_{n}"), "default", limit)))
            .collect();
        for reservation in &reservations {
            let name = reservation.name().clone();
            let slot = world
                .coordinator
                .open(name, WINDOW_MS, reservation.clone(), world.now_ns);
            assert!(world.coordinator.want(slot, reservation, world.now_ns));
        }
        for _ in 0..2_000 {
            world.turn();
            if reservations.iter().all(|reservation| reservation.left() > 0) {
                assert_eq!(world.coordinator.counts().identities, 1);
                return (world, reservations);
            }
        }
        panic!("not every window was granted something");
    }

    /// Another store takes the place of the first, and the next sign of life finds it.
    fn meet_another_store(&mut self) {
        self.store = MemoryStore::new("second");
        for _ in 0..2_000 {
            self.now_ns += MS;
            self.coordinator.tick(self.now_ns);
            for (number, batch) in self.batches() {
                self.exchange(number, &batch);
            }
            if self.coordinator.counts().identities == 2 {
                return;
            }
        }
        panic!("the second store was not found");
    }
}

#[test]
fn a_new_store_is_told_of_many_windows_piece_by_piece() {
    let (mut world, _reservations) = World::with_permits();
    world.meet_another_store();
    let batches = world.batches();
    let asked: usize = batches.iter().map(|(_, batch)| batch.asks.len()).sum();
    assert!((1..=AT_ONCE).contains(&asked), "{asked} windows in one go");
    assert!(world.coordinator.next_due_ns() <= world.now_ns, "there are more");
    let mut told = HashSet::new();
    for (number, batch) in batches {
        told.extend(batch.asks.iter().map(|(name, _)| name.clone()));
        world.exchange(number, &batch);
    }
    // Until it knows all, no grant of it counts.
    for _ in 0..20_000 {
        if world.coordinator.grants_count(WINDOW_MS, world.now_ns) {
            break;
        }
        told.extend(world.turn());
    }
    assert!(world.coordinator.grants_count(WINDOW_MS, world.now_ns));
    assert_eq!(
        told.len(),
        WINDOWS,
        "grants counted before the store knew of every window"
    );
}

#[test]
fn a_gate_says_that_it_leaves_once_the_store_knows_everything() {
    let (mut world, _reservations) = World::with_permits();
    world.meet_another_store();
    world.coordinator.leave(world.now_ns);
    let mut told = HashSet::new();
    for _ in 0..2_000 {
        world.now_ns += MS;
        world.coordinator.tick(world.now_ns);
        for (number, batch) in world.batches() {
            if batch.hello.as_ref().is_some_and(|hello| hello.left) {
                assert_eq!(told.len(), WINDOWS, "it said goodbye before");
            }
            told.extend(batch.asks.iter().map(|(name, _)| name.clone()));
            world.exchange(number, &batch);
        }
        if world.coordinator.has_left() {
            return;
        }
    }
    panic!("it has not left; {} windows were told", told.len());
}
