//! Who is listening: wakes the feed when something changed, knows which gates there are and what they have applied.
//!
//! Where several processes share a store, each hub hears of the others' gates by [`Hub::merge`] and tells of its own by
//! [`Hub::take_unsaved`]; the store puts them in order. So an acknowledgement counts whichever process it reached. What
//! is on its way is missing meanwhile: a gate may look behind that is not, never the other way round.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};

use super::model::{Applied, GateState};
use super::store::GateReport;

/// Shared by the service, the feed's connections and the operator's page.
pub struct Hub {
    /// The newest revision that is committed.
    revision: watch::Sender<u64>,
    /// Counts acknowledgements and goings, so that waiters look again.
    news: watch::Sender<u64>,
    /// Set once, at shutdown: the feed's connections would otherwise never end.
    closing: watch::Sender<bool>,
    gates: Mutex<BTreeMap<String, Gate>>,
    /// Told when a gate has said something that is not saved.
    unsaved: Notify,
    live_for_ms: i64,
}

#[derive(Default)]
struct Gate {
    version: Option<String>,
    revision: u64,
    /// A revision that it claims and that we never made, from a later life of a database that was restored since. It
    /// says nothing about what the gate knows of ours.
    claimed: u64,
    last_heard_at_ms: i64,
    /// Connections to this process.
    connections: u32,
    /// Another process says that it holds a connection.
    connected_elsewhere: bool,
    /// Changed since it was last written to the store.
    unsaved: bool,
    /// It has said since then what revision it has …
    said: bool,
    /// … and that it begins anew with it.
    begins: bool,
}

impl Hub {
    /// Begins at `revision`, with the gates that an earlier process knew. They count as live for a while, so that a
    /// restart does not make anybody believe that a gate has applied what it has not.
    pub fn new(revision: u64, known: Vec<GateState>, live_for: Duration) -> Self {
        let gates = known
            .into_iter()
            .map(|gate| {
                let mut known = Gate::default();
                let name = gate.name.clone();
                known.become_as(gate);
                (name, known)
            })
            .collect();
        Self {
            revision: watch::Sender::new(revision),
            news: watch::Sender::new(0),
            closing: watch::Sender::new(false),
            gates: Mutex::new(gates),
            unsaved: Notify::new(),
            live_for_ms: live_for.as_millis() as i64,
        }
    }

    /// The newest committed revision.
    pub fn revision(&self) -> u64 {
        *self.revision.borrow()
    }

    /// Says that `revision` is committed, and wakes the feed.
    pub fn publish(&self, revision: u64) {
        self.revision.send_if_modified(|newest| {
            let newer = revision > *newest;
            *newest = revision.max(*newest);
            newer
        });
    }

    /// Follows the newest revision.
    pub fn revisions(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    /// Ends every connection of the feed.
    pub fn close(&self) {
        self.closing.send_replace(true);
    }

    /// Becomes true at shutdown.
    pub fn closing(&self) -> watch::Receiver<bool> {
        self.closing.subscribe()
    }

    /// A gate has connected and says that it has `revision`, which may be less than it once had: its spool may be gone.
    /// It counts as connected until the returned value is dropped.
    pub fn connect(self: &Arc<Self>, name: &str, revision: u64, now_ms: i64) -> Connected {
        let newest = self.revision();
        let mut gates = self.lock();
        let gate = gate(&mut gates, name);
        let is_ours = revision <= newest;
        gate.revision = if is_ours { revision } else { 0 };
        gate.claimed = if is_ours { 0 } else { revision };
        gate.last_heard_at_ms = now_ms;
        gate.connections += 1;
        (gate.unsaved, gate.said, gate.begins) = (true, true, true);
        drop(gates);
        self.unsaved.notify_one();
        Connected {
            hub: Arc::clone(self),
            name: name.to_owned(),
        }
    }

    /// A gate has shown itself.
    pub fn heard(&self, name: &str, now_ms: i64) {
        let mut gates = self.lock();
        let gate = gate(&mut gates, name);
        gate.last_heard_at_ms = gate.last_heard_at_ms.max(now_ms);
        gate.unsaved = true;
    }

    /// A gate has applied everything up to `revision`.
    pub fn acknowledge(&self, name: &str, revision: u64, version: Option<String>, now_ms: i64) {
        let newest = self.revision();
        let mut gates = self.lock();
        let gate = gate(&mut gates, name);
        // Acknowledgements may overtake each other.
        if revision <= newest {
            gate.revision = gate.revision.max(revision);
            gate.claimed = 0;
        } else {
            gate.claimed = gate.claimed.max(revision);
        }
        gate.last_heard_at_ms = gate.last_heard_at_ms.max(now_ms);
        gate.version = version.or(gate.version.take());
        (gate.unsaved, gate.said) = (true, true);
        drop(gates);
        self.unsaved.notify_one();
        self.news.send_modify(|count| *count += 1);
    }

    /// Forgets a gate that was taken out of service; answers false if it is connected to this process.
    pub fn forget(&self, name: &str) -> bool {
        let mut gates = self.lock();
        if gates.get(name).is_some_and(|gate| gate.connections > 0) {
            return false;
        }
        gates.remove(name);
        true
    }

    /// The highest revision that any gate has or claims.
    pub fn highest_claim(&self) -> u64 {
        self.lock()
            .values()
            .map(|gate| gate.revision.max(gate.claimed))
            .max()
            .unwrap_or(0)
    }

    /// Every gate that is known.
    pub fn states(&self, now_ms: i64) -> Vec<GateState> {
        self.lock()
            .iter()
            .map(|(name, gate)| self.state(name, gate, now_ms))
            .collect()
    }

    /// What gates have said since the last call, to be written to the store; and, if `refresh`, that those that are
    /// connected still are.
    pub fn take_unsaved(&self, refresh: bool, now_ms: i64) -> Unsaved<'_> {
        let mut gates = self.lock();
        let unsaved = gates
            .iter_mut()
            .filter(|(_, gate)| gate.unsaved || (refresh && gate.connections > 0));
        let reports = unsaved
            .map(|(name, gate)| {
                gate.unsaved = false;
                let connected = gate.connections > 0;
                GateReport {
                    name: name.clone(),
                    version: gate.version.clone(),
                    said: std::mem::take(&mut gate.said).then_some(gate.revision),
                    begins: std::mem::take(&mut gate.begins),
                    claimed: gate.claimed,
                    last_heard_at_ms: if connected { now_ms } else { gate.last_heard_at_ms },
                    connected,
                }
            })
            .collect();
        Unsaved { hub: self, reports }
    }

    /// Waits until a gate has said something that is not saved.
    pub async fn unsaved(&self) {
        self.unsaved.notified().await;
    }

    /// What the store knows of some gates. What a gate has said here and is not saved yet is newer, and comes back.
    pub fn merge(&self, states: Vec<GateState>) {
        let mut gates = self.lock();
        for state in states {
            gate(&mut gates, &state.name).become_as(state);
        }
        drop(gates);
        self.news.send_modify(|count| *count += 1);
    }

    /// What the store knows of all gates: one that it does not know was forgotten by another process.
    pub fn merge_all(&self, states: Vec<GateState>) {
        self.lock().retain(|name, gate| {
            gate.unsaved || gate.connections > 0 || states.iter().any(|state| state.name == *name)
        });
        self.merge(states);
    }

    /// Who has applied `revision`, and who has not.
    pub fn applied(&self, revision: u64, now_ms: i64) -> Applied {
        let mut applied = Applied::default();
        for (name, gate) in self.lock().iter() {
            let list = if gate.revision >= revision {
                &mut applied.gates
            } else if self.is_live(gate, now_ms) {
                &mut applied.pending
            } else if now_ms - gate.last_heard_at_ms <= SILENT_FOR_MS {
                &mut applied.silent
            } else {
                continue;
            };
            list.push(name.clone());
        }
        applied
    }

    /// Wakes when an acknowledgement came.
    pub fn news(&self) -> watch::Receiver<u64> {
        self.news.subscribe()
    }

    fn state(&self, name: &str, gate: &Gate, now_ms: i64) -> GateState {
        let live = self.is_live(gate, now_ms);
        let connected_here = gate.connections > 0;
        GateState {
            name: name.to_owned(),
            version: gate.version.clone(),
            revision: gate.revision,
            claimed: gate.claimed,
            last_heard_at_ms: if connected_here { now_ms } else { gate.last_heard_at_ms },
            // A process that was killed says for ever that it is connected, but says so anew only while it lives.
            connected: connected_here || (gate.connected_elsewhere && live),
            live,
        }
    }

    fn is_live(&self, gate: &Gate, now_ms: i64) -> bool {
        gate.connections > 0 || now_ms - gate.last_heard_at_ms <= self.live_for_ms
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Gate>> {
        // Nothing under the lock can panic halfway through a change, so a poisoned map is a whole map.
        self.gates.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reports to be written to the store. Dropped before they are [`saved`](Unsaved::saved), they are taken again with the
/// next.
pub struct Unsaved<'a> {
    hub: &'a Hub,
    reports: Vec<GateReport>,
}

impl Unsaved<'_> {
    /// They are in the store.
    pub fn saved(mut self) {
        self.reports.clear();
    }
}

impl std::ops::Deref for Unsaved<'_> {
    type Target = [GateReport];

    fn deref(&self) -> &[GateReport] {
        &self.reports
    }
}

impl Drop for Unsaved<'_> {
    fn drop(&mut self) {
        let mut gates = self.hub.lock();
        for report in &self.reports {
            if let Some(gate) = gates.get_mut(&report.name) {
                gate.unsaved = true;
                gate.said |= report.said.is_some();
                gate.begins |= report.begins;
            }
        }
    }
}

/// A gate's connection to the feed.
pub struct Connected {
    hub: Arc<Hub>,
    name: String,
}

impl Connected {
    /// The connection ends at `now_ms`.
    pub fn end(self, now_ms: i64) {
        self.hub.heard(&self.name, now_ms);
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        let mut gates = self.hub.lock();
        if let Some(gate) = gates.get_mut(&self.name) {
            gate.connections = gate.connections.saturating_sub(1);
            gate.unsaved = true;
        }
        drop(gates);
        self.hub.unsaved.notify_one();
        self.hub.news.send_modify(|count| *count += 1);
    }
}

impl Gate {
    /// Takes over what the store knows, where nothing newer waits to be saved.
    fn become_as(&mut self, state: GateState) {
        self.connected_elsewhere = state.connected;
        self.last_heard_at_ms = self.last_heard_at_ms.max(state.last_heard_at_ms);
        if !self.said {
            self.revision = state.revision;
            self.claimed = state.claimed;
            self.version = state.version.or(self.version.take());
        }
    }
}

fn gate<'a>(gates: &'a mut BTreeMap<String, Gate>, name: &str) -> &'a mut Gate {
    gates.entry(name.to_owned()).or_default()
}

/// How long a gate that fell silent is still named where a change is not acknowledged by it.
const SILENT_FOR_MS: i64 = 24 * 3_600_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gate_is_pending_while_live_then_silent_then_forgotten() {
        let hub = Arc::new(Hub::new(7, vec![], Duration::from_secs(15)));
        let connected = hub.connect("gate-1", 6, 1_000);
        assert_eq!(hub.applied(7, 900_000).pending, ["gate-1"]);
        connected.end(900_000);
        assert_eq!(hub.applied(7, 915_000).pending, ["gate-1"]);
        assert_eq!(hub.applied(7, 915_001).silent, ["gate-1"]);
        assert_eq!(hub.applied(7, 900_001 + SILENT_FOR_MS), Applied::default());
        hub.acknowledge("gate-1", 7, Some("0.1.0".into()), 900_002);
        hub.acknowledge("gate-1", 5, None, 900_003);
        assert_eq!(hub.applied(7, 900_003).gates, ["gate-1"]);
        // It comes back without its spool.
        let _again = hub.connect("gate-1", 0, 900_004);
        assert_eq!(hub.applied(7, 900_004).pending, ["gate-1"]);
        assert_eq!(hub.states(900_004)[0].version.as_deref(), Some("0.1.0"));
        assert!(!hub.forget("gate-1"));
    }

    #[test]
    fn an_acknowledgement_to_another_process_counts_here() {
        let (one, other) = (
            Arc::new(Hub::new(7, vec![], Duration::from_secs(15))),
            Arc::new(Hub::new(7, vec![], Duration::from_secs(15))),
        );
        let as_stored = |report: &GateReport| GateState {
            name: report.name.clone(),
            version: report.version.clone(),
            revision: report.said.unwrap_or(0),
            claimed: report.claimed,
            last_heard_at_ms: report.last_heard_at_ms,
            connected: report.connected,
            live: false,
        };
        let connected = one.connect("gate-1", 6, 1_000);
        let take = |hub: &Hub, now_ms| {
            let taken = hub.take_unsaved(false, now_ms);
            let reports = taken.to_vec();
            taken.saved();
            reports
        };
        let told = take(&one, 1_000);
        assert!(told[0].begins && told[0].connected && told[0].said == Some(6));
        assert!(take(&one, 1_000).is_empty());
        other.merge(told.iter().map(as_stored).collect());
        assert_eq!(other.applied(7, 1_000).pending, ["gate-1"]);
        assert!(other.states(1_000)[0].connected && other.states(1_000)[0].live);
        // The balancer sends its acknowledgement to the other one.
        other.acknowledge("gate-1", 7, None, 1_100);
        let told = take(&other, 1_100);
        assert!(!told[0].begins && !told[0].connected && told[0].said == Some(7));
        one.merge(vec![as_stored(&told[0])]);
        assert_eq!(one.applied(7, 1_100).gates, ["gate-1"]);
        // Hearing that it lives says nothing of what it has applied.
        other.heard("gate-1", 1_200);
        assert_eq!(take(&other, 1_200)[0].said, None);
        // What was said here and is not saved is not overwritten.
        one.acknowledge("gate-1", 8, None, 1_300);
        one.publish(8);
        one.acknowledge("gate-1", 8, None, 1_300);
        one.merge(vec![as_stored(&told[0])]);
        assert_eq!(one.applied(8, 1_300).gates, ["gate-1"]);
        // A report that could not be saved is made again.
        let told = one.take_unsaved(false, 1_300).to_vec();
        assert_eq!(told[0].said, Some(8));
        assert_eq!(take(&one, 1_300), told);
        // Forgotten elsewhere: here too, unless it is connected.
        one.merge_all(vec![]);
        assert_eq!(one.states(1_300).len(), 1);
        connected.end(1_400);
        take(&one, 1_400);
        one.merge_all(vec![]);
        assert!(one.states(1_400).is_empty());
        // A process that died says no more that a gate is connected to it.
        assert!(!other.states(16_201)[0].connected);
    }

    #[test]
    fn a_revision_that_we_never_made_is_no_acknowledgement() {
        let hub = Arc::new(Hub::new(7, vec![], Duration::from_secs(15)));
        let _connected = hub.connect("gate-1", 90, 0);
        hub.acknowledge("gate-1", 90, None, 0);
        assert_eq!(hub.applied(7, 0).pending, ["gate-1"]);
        assert_eq!(hub.highest_claim(), 90);
        hub.publish(91);
        hub.acknowledge("gate-1", 91, None, 0);
        assert_eq!(hub.applied(91, 0).gates, ["gate-1"]);
    }

    #[test]
    fn an_older_revision_is_not_published() {
        let hub = Hub::new(7, vec![], Duration::from_secs(15));
        hub.publish(5);
        assert_eq!(hub.revision(), 7);
        hub.publish(9);
        assert_eq!(*hub.revisions().borrow(), 9);
    }
}
