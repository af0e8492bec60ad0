//! How keys get into the gate: one change in place, or a full resync built aside and swapped.
//!
//! One writer at a time, the feed's task. Readers never wait for it longer than one entry of the map takes.

use super::Gate;
use super::key::SecretDigest;
use super::slots::{NONE, Slot, SlotId};
use super::snapshot::{KeyError, KeyUpdate, SecretUpdate, Snapshot, Terms, Writer};
use std::fmt;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

impl Gate {
    /// The revision of the keys in force; `None` before the first snapshot.
    pub fn revision(&self) -> Option<u64> {
        self.snapshot.load().as_ref().map(|snapshot| snapshot.revision())
    }

    /// How many keys the gate knows.
    pub fn key_count(&self) -> usize {
        self.with_writer(|writer| writer.len()).unwrap_or(0)
    }

    /// Applies one change in place. A revision that is not above the one in force is passed over: it is in already.
    ///
    /// # Errors
    /// [`KeyError`]; the key is then as it was before.
    pub fn apply(&self, update: KeyUpdate) -> Result<(), KeyError> {
        self.with_writer(|writer| {
            // Loaded while no resync can replace it, so that no change goes into a map that is leaving.
            let snapshot = self.snapshot.load_full().ok_or(KeyError::NoSnapshot)?;
            if update.revision <= snapshot.revision() {
                return Ok(());
            }
            let _reclaiming = self.reclaiming();
            self.apply_in_place(writer, &snapshot, &update)?;
            snapshot.set_revision(update.revision);
            Ok(())
        })
        .unwrap_or(Err(KeyError::Busy))
    }

    /// Forgets a key: its secrets are unknown from now on.
    pub fn forget(&self, id: &str, revision: u64) -> Result<(), KeyError> {
        self.with_writer(|writer| {
            let snapshot = self.snapshot.load_full().ok_or(KeyError::NoSnapshot)?;
            if revision > snapshot.revision() {
                if let Some(owner) = writer.find(&self.slots, id) {
                    let _reclaiming = self.reclaiming();
                    self.forget_key(writer, &snapshot, owner);
                }
                snapshot.set_revision(revision);
            }
            Ok(())
        })
        .unwrap_or(Err(KeyError::Busy))
    }

    /// Starts a full snapshot, built aside. Dropped without [`Resync::commit`], nothing has happened.
    ///
    /// # Errors
    /// [`KeyError::Busy`] while another one is being built.
    pub fn resync(&self, expected_keys: usize) -> Result<Resync<'_>, KeyError> {
        let mut writer = self
            .writer
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .take()
            .ok_or(KeyError::Busy)?;
        writer.reserve(&self.slots, expected_keys);
        Ok(Resync {
            gate: self,
            writer: Some(writer),
            snapshot: Some(Snapshot::with_capacity(expected_keys)),
            staged: vec![],
            new_keys: vec![],
            new_secrets: vec![],
            marked: vec![],
        })
    }

    /// Every key as an update again, and the revision that was in force when this began. Changes go on meanwhile: of a
    /// key that is changed, either form may come. `None`: there is no snapshot yet, or a full one is being built.
    pub fn export_keys(&self, each: &mut dyn FnMut(KeyUpdate)) -> Option<u64> {
        let revision = self.revision()?;
        let mut next = 0;
        loop {
            let end = self.with_writer(|writer| {
                let end = writer.slot_ids().end;
                let upto = end.min(next + EXPORTED_AT_ONCE);
                for id in next..upto {
                    let is_owner = self.slots.get(id).is_some_and(|slot| slot.owner.load(Relaxed) == id);
                    if let Some(update) = is_owner.then(|| self.export_key(id, revision)).flatten() {
                        each(update);
                    }
                }
                next = upto;
                end
            })?;
            if next >= end {
                return Some(revision);
            }
            // The lock is not a fair one: without a pause a change would wait for all keys.
            std::thread::sleep(EXPORT_PAUSE);
        }
    }

    fn export_key(&self, owner: SlotId, revision: u64) -> Option<KeyUpdate> {
        let owner_slot = self.slots.get(owner)?;
        let linked: Vec<&Slot> = self
            .secret_slots(owner)
            .filter(|(_, slot)| slot.linked.load(Relaxed) == 1)
            .map(|(_, slot)| slot)
            .collect();
        let terms = linked.first()?.terms.load_full()?;
        let secrets = linked.iter().filter_map(|slot| {
            let not_after_ms = slot.terms.load().as_ref()?.not_after_ms;
            Some(SecretUpdate {
                digest: slot.digest().0,
                not_after_ms: (not_after_ms != i64::MAX).then_some(not_after_ms),
            })
        });
        Some(KeyUpdate {
            revision,
            id: owner_slot.key_id().as_str().into(),
            organization: terms.organization.clone(),
            environment: terms.environment.clone(),
            scopes: terms.scope_names.to_vec(),
            plan: terms.plan_name.clone(),
            secrets: secrets.collect(),
            expires_at_ms: (terms.expires_at_ms != i64::MAX).then_some(terms.expires_at_ms),
            disabled: terms.disabled,
            revoked: terms.revoked,
        })
    }

    /// The owner slot and those of the key's other secrets.
    fn secret_slots(&self, owner: SlotId) -> impl Iterator<Item = (SlotId, &Slot)> {
        std::iter::successors(self.slots.get(owner).map(|slot| (owner, slot)), |(_, slot)| {
            let next = slot.sibling.load(Relaxed);
            self.slots.get(next).map(|slot| (next, slot))
        })
    }

    pub(super) fn with_writer<R>(&self, act: impl FnOnce(&mut Writer) -> R) -> Option<R> {
        self.writer
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .as_mut()
            .map(|writer| act(writer))
    }

    pub(super) fn reclaiming(&self) -> MutexGuard<'_, ()> {
        self.reclaiming.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn apply_in_place(&self, writer: &mut Writer, snapshot: &Snapshot, update: &KeyUpdate) -> Result<(), KeyError> {
        let (owner, _) = writer.find_or_add(&self.slots, &update.id)?;
        // What can fail comes first.
        let mut wanted: Vec<(SecretDigest, Arc<Terms>)> = vec![];
        for secret in &update.secrets {
            let digest = SecretDigest(secret.digest);
            let held_by = snapshot.with(&self.slots, &digest, |_, slot| slot.owner.load(Relaxed));
            if held_by.is_some_and(|other| other != owner) {
                return Err(KeyError::SecretTaken { id: update.id.clone() });
            }
            wanted.push((digest, writer.terms(&self.names, update, secret.not_after_ms)?));
        }
        while let Some((id, slot)) = self.secret_slots(owner).find(|(_, slot)| {
            let digest = slot.digest();
            slot.linked.load(Relaxed) == 1 && !wanted.iter().any(|(wanted, _)| *wanted == digest)
        }) {
            snapshot.unlink(&slot.digest(), id);
            slot.linked.store(0, Relaxed);
            if id != owner {
                self.detach(owner, id);
                writer.release(&self.slots, id);
            }
        }
        for (digest, terms) in wanted {
            let held = self
                .secret_slots(owner)
                .find(|(_, slot)| slot.linked.load(Relaxed) == 1 && slot.holds(&digest));
            if let Some((_, slot)) = held {
                slot.terms.store(Some(terms));
                continue;
            }
            let owner_is_free = self.slots.get(owner).is_some_and(|slot| slot.linked.load(Relaxed) == 0);
            let id = if owner_is_free {
                owner
            } else {
                writer.add_secret_slot(&self.slots, owner)?
            };
            self.fill(id, &digest, terms);
            if id != owner {
                self.attach(owner, id);
            }
            self.link(snapshot, id, &digest);
        }
        Ok(())
    }

    fn fill(&self, id: SlotId, digest: &SecretDigest, terms: Arc<Terms>) {
        if let Some(slot) = self.slots.get(id) {
            slot.set_digest(digest);
            slot.terms.store(Some(terms));
        }
    }

    fn link(&self, snapshot: &Snapshot, id: SlotId, digest: &SecretDigest) -> bool {
        let linked = snapshot.link(&self.slots, digest, id);
        if let Some(slot) = self.slots.get(id) {
            slot.linked.store(u32::from(linked), Relaxed);
        }
        linked
    }

    fn attach(&self, owner: SlotId, id: SlotId) {
        if let (Some(owner), Some(slot)) = (self.slots.get(owner), self.slots.get(id)) {
            slot.sibling.store(owner.sibling.load(Relaxed), Relaxed);
            owner.sibling.store(id, Relaxed);
        }
    }

    fn detach(&self, owner: SlotId, id: SlotId) {
        let Some(slot) = self.slots.get(id) else { return };
        let before = self
            .secret_slots(owner)
            .find(|(_, before)| before.sibling.load(Relaxed) == id);
        if let Some((_, before)) = before {
            before.sibling.store(slot.sibling.load(Relaxed), Relaxed);
        }
    }

    fn forget_key(&self, writer: &mut Writer, snapshot: &Snapshot, owner: SlotId) {
        for (id, slot) in self.secret_slots(owner) {
            if slot.linked.swap(0, Relaxed) == 1 {
                snapshot.unlink(&slot.digest(), id);
            }
        }
        self.release_key(writer, owner);
    }

    /// Gives the slots of a key back to which no map leads any more. What it counted is kept for the meter.
    fn release_key(&self, writer: &mut Writer, owner: SlotId) {
        let Some(slot) = self.slots.get(owner) else { return };
        self.keep_counts_of(owner, slot);
        writer.remove(&self.slots, slot.key_id().as_str());
        let ids: Vec<SlotId> = self.secret_slots(owner).map(|(id, _)| id).collect();
        for id in ids {
            writer.release(&self.slots, id);
        }
    }
}

/// About a millisecond's work.
const EXPORTED_AT_ONCE: SlotId = 1024;
const EXPORT_PAUSE: Duration = Duration::from_micros(50);

/// A full snapshot in the making.
pub struct Resync<'g> {
    gate: &'g Gate,
    /// Taken out for as long as the resync lasts, so that no other writer can come between.
    writer: Option<Box<Writer>>,
    snapshot: Option<Snapshot>,
    /// New terms of slots that are in use now; those whose terms stay are not among them.
    staged: Vec<(SlotId, Arc<Terms>)>,
    /// The owner slots of keys that were not there before, as a bitmap.
    new_keys: Vec<u64>,
    new_secrets: Vec<(SlotId, SlotId)>,
    /// Slots that the new snapshot leads to, as a bitmap.
    marked: Vec<u64>,
}

impl Resync<'_> {
    /// Adds one key.
    ///
    /// # Errors
    /// [`KeyError`]; the snapshot is then not to be committed.
    pub fn add(&mut self, update: KeyUpdate) -> Result<(), KeyError> {
        let (Some(writer), Some(snapshot)) = (&mut self.writer, &self.snapshot) else {
            return Err(KeyError::Busy);
        };
        let gate = self.gate;
        let (owner, new) = writer.find_or_add(&gate.slots, &update.id)?;
        if new {
            mark(&mut self.new_keys, owner);
        }
        mark(&mut self.marked, owner);
        let mut owner_is_free = new;
        for secret in &update.secrets {
            let digest = SecretDigest(secret.digest);
            let terms = writer.terms(&gate.names, &update, secret.not_after_ms)?;
            let held = gate
                .secret_slots(owner)
                .find(|(_, slot)| slot.linked.load(Relaxed) == 1 && slot.holds(&digest));
            let id = match held {
                Some((id, slot)) if !new => {
                    // Nobody else changes terms while a resync has the writer.
                    if !slot.terms.load().as_ref().is_some_and(|held| Arc::ptr_eq(held, &terms)) {
                        self.staged.push((id, terms));
                    }
                    id
                }
                _ => {
                    let id = if owner_is_free {
                        owner
                    } else {
                        writer.add_secret_slot(&gate.slots, owner)?
                    };
                    gate.fill(id, &digest, terms);
                    if !owner_is_free {
                        self.new_secrets.push((owner, id));
                    }
                    owner_is_free = false;
                    id
                }
            };
            mark(&mut self.marked, id);
            if !snapshot.link(&gate.slots, &digest, id) {
                return Err(KeyError::SecretTaken { id: update.id });
            }
        }
        Ok(())
    }

    /// Puts the snapshot in force, whole.
    ///
    /// # Errors
    /// [`KeyError::Stale`] if a newer one is in force; nothing has happened then.
    pub fn commit(mut self, revision: u64) -> Result<(), KeyError> {
        let in_force = self.gate.revision();
        if let Some(in_force) = in_force.filter(|in_force| *in_force > revision) {
            return Err(KeyError::Stale {
                in_force,
                offered: revision,
            });
        }
        let (Some(mut writer), Some(snapshot)) = (self.writer.take(), self.snapshot.take()) else {
            return Err(KeyError::Busy);
        };
        let gate = self.gate;
        let _reclaiming = gate.reclaiming();
        snapshot.set_revision(revision);
        let old = gate.snapshot.swap(Some(Arc::new(snapshot)));
        for (id, terms) in self.staged.drain(..) {
            if let Some(slot) = gate.slots.get(id) {
                slot.terms.store(Some(terms));
            }
        }
        for (owner, id) in self.new_secrets.drain(..) {
            gate.attach(owner, id);
        }
        self.new_keys.clear();
        // Readers of the old map hold it for one decision at most; its slots are given back after the last of them.
        if let Some(old) = old {
            while Arc::strong_count(&old) > 1 {
                std::thread::yield_now();
            }
        }
        self.settle(&mut writer);
        writer.forget_unused_terms();
        *gate.writer.lock().unwrap_or_else(|e| e.into_inner()) = Some(writer);
        Ok(())
    }

    /// Links what is in the new snapshot, and gives back what is not.
    fn settle(&self, writer: &mut Writer) {
        let gate = self.gate;
        let mut gone = vec![];
        for id in writer.slot_ids() {
            let Some(slot) = gate.slots.get(id) else { continue };
            let owner = slot.owner.load(Relaxed);
            if owner == NONE {
                continue;
            }
            let kept = is_marked(&self.marked, id);
            // A key that only a journal named has windows and no secret: it is kept until it is known.
            let holds_secret = slot.digest().0 != [0; 32];
            let was_linked = slot.linked.swap(u32::from(kept && holds_secret), Relaxed) == 1;
            if !kept && (was_linked || id != owner) {
                gone.push((id, owner));
            }
        }
        for (id, owner) in gone {
            if id == owner {
                gate.release_key(writer, owner);
            } else if is_marked(&self.marked, owner) {
                gate.detach(owner, id);
                writer.release(&gate.slots, id);
            }
        }
    }
}

impl Drop for Resync<'_> {
    /// Undoes what a resync did that was not committed: nothing leads to its slots.
    fn drop(&mut self) {
        let Some(mut writer) = self.writer.take() else { return };
        let _reclaiming = self.gate.reclaiming();
        for (_, id) in self.new_secrets.drain(..) {
            writer.release(&self.gate.slots, id);
        }
        for owner in writer.slot_ids().filter(|id| is_marked(&self.new_keys, *id)) {
            self.gate.release_key(&mut writer, owner);
        }
        *self.gate.writer.lock().unwrap_or_else(|e| e.into_inner()) = Some(writer);
    }
}

impl fmt::Debug for Resync<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resync")
            .field("new_keys", &self.new_keys.len())
            .finish_non_exhaustive()
    }
}

fn mark(bitmap: &mut Vec<u64>, id: SlotId) {
    let word = id as usize / 64;
    if bitmap.len() <= word {
        bitmap.resize(word + 1, 0);
    }
    bitmap[word] |= 1 << (id % 64);
}

fn is_marked(bitmap: &[u64], id: SlotId) -> bool {
    bitmap
        .get(id as usize / 64)
        .is_some_and(|word| word >> (id % 64) & 1 == 1)
}
