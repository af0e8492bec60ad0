//! A full snapshot: built aside, then put in force whole, or not at all.

use super::Gate;
use super::key::SecretDigest;
use super::pages::SecretsBuilder;
use super::slots::SlotId;
use super::snapshot::Snapshot;
use super::terms::TermsId;
use super::update::{KeyError, KeyUpdate};
use super::writer::Writer;
use crate::courtesy::Courtesy;
use std::fmt;

impl Gate {
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
            secrets: Some(SecretsBuilder::with_capacity(expected_keys)),
            staged: vec![],
            new_keys: SlotSet::default(),
            new_secrets: vec![],
            filled: vec![],
            keys: SlotSet::default(),
            holding: SlotSet::default(),
        })
    }
}

/// A full snapshot in the making.
pub struct Resync<'g> {
    gate: &'g Gate,
    /// Taken out for as long as the resync lasts, so that no other writer can come between.
    writer: Option<Box<Writer>>,
    secrets: Option<SecretsBuilder>,
    /// New terms of slots that are in use now; those whose terms stay are not among them.
    staged: Vec<(SlotId, TermsId)>,
    /// The owner slots of keys that were not there before.
    new_keys: SlotSet,
    /// Slots of further secrets, to be attached to their owners.
    new_secrets: Vec<(SlotId, SlotId)>,
    /// Owner slots that were there, without a secret of their own, and have one now.
    filled: Vec<SlotId>,
    /// The owner slots of all keys in the new snapshot.
    keys: SlotSet,
    /// The slots that the new snapshot leads to.
    holding: SlotSet,
}

impl Resync<'_> {
    /// Adds one key. Whether it was not added before: a key that comes twice has the secrets of both.
    ///
    /// # Errors
    /// [`KeyError`]; the snapshot is then not to be committed.
    pub fn add(&mut self, update: &KeyUpdate) -> Result<bool, KeyError> {
        let (Some(writer), Some(secrets)) = (&mut self.writer, &mut self.secrets) else {
            return Err(KeyError::Busy);
        };
        let gate = self.gate;
        let (owner, new) = writer.find_or_add(&gate.slots, &update.id)?;
        if new {
            self.new_keys.insert(owner);
        }
        let first = self.keys.insert(owner);
        for secret in &update.secrets {
            let digest = SecretDigest(secret.digest);
            let terms = writer.terms.of(&gate.names, update, secret.not_after_ms)?;
            let held = gate.secret_slots(owner).find(|(_, slot)| slot.holds(&digest));
            let id = match held {
                Some((id, slot)) => {
                    // Nobody else changes terms while a resync has the writer.
                    if slot.terms() != terms {
                        self.staged.push((id, terms));
                    }
                    id
                }
                None => {
                    let owner_slot = gate.slots.get(owner).ok_or(KeyError::TooMany)?;
                    let id = if owner_slot.holds_secret() {
                        let id = writer.add_secret_slot(&gate.slots, owner)?;
                        self.new_secrets.push((owner, id));
                        id
                    } else {
                        if !new {
                            self.filled.push(owner);
                        }
                        owner
                    };
                    if let Some(slot) = gate.slots.get(id) {
                        writer.terms.give(slot, terms);
                        slot.put(&digest);
                    }
                    id
                }
            };
            self.holding.insert(id);
            if !secrets.put(&gate.slots, &digest, id) {
                return Err(KeyError::SecretTaken { id: update.id.clone() });
            }
        }
        Ok(first)
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
        let (Some(mut writer), Some(secrets)) = (self.writer.take(), self.secrets.take()) else {
            return Err(KeyError::Busy);
        };
        let gate = self.gate;
        let _reclaiming = gate.reclaiming();
        let snapshot = Snapshot::new(revision, secrets.build());
        gate.put_keys_in_force(&mut writer, Some(snapshot), vec![]);
        for (id, terms) in self.staged.drain(..) {
            if let Some(slot) = gate.slots.get(id) {
                writer.terms.give(slot, terms);
            }
        }
        for (owner, id) in self.new_secrets.drain(..) {
            gate.attach(owner, id);
        }
        let free = self.take_leave(&mut writer);
        // No map leads to what was taken out.
        writer.gone.clear();
        writer.terms.forget_unused();
        gate.put_keys_in_force(&mut writer, None, free);
        gate.use_again(&mut writer);
        gate.return_writer(writer);
        Ok(())
    }

    /// Takes out what is not in the new snapshot; the slots that are free by that.
    fn take_leave(&self, writer: &mut Writer) -> Vec<SlotId> {
        let gate = self.gate;
        let (mut leaving_keys, mut free) = (vec![], vec![]);
        let mut courtesy = Courtesy::every(SLOTS_AT_ONCE);
        for id in writer.slot_ids() {
            courtesy.step();
            let Some((slot, owner)) = gate.slots.get(id).and_then(|slot| Some((slot, slot.owner(id)?))) else {
                continue;
            };
            if !self.keys.contains(owner) {
                // A key that only a journal named has windows and no secret: it is kept until it is known. Slots that are
                // free already, or soon, have none either.
                if id == owner && gate.secret_slots(owner).any(|(_, slot)| slot.holds_secret()) {
                    leaving_keys.push(owner);
                }
            } else if !self.holding.contains(id) && slot.holds_secret() {
                slot.take_out();
                if id != owner {
                    gate.detach(owner, id);
                    free.push(id);
                }
            }
        }
        for owner in leaving_keys {
            gate.release_key(writer, owner, &mut free);
        }
        free
    }
}

impl Drop for Resync<'_> {
    /// Undoes what a resync did that was not committed: nothing leads to its slots.
    fn drop(&mut self) {
        let Some(mut writer) = self.writer.take() else { return };
        let gate = self.gate;
        let _reclaiming = gate.reclaiming();
        let mut free: Vec<SlotId> = self.new_secrets.drain(..).map(|(_, id)| id).collect();
        for id in free.iter().chain(&self.filled) {
            if let Some(slot) = gate.slots.get(*id) {
                slot.take_out();
            }
        }
        for owner in writer.slot_ids().filter(|id| self.new_keys.contains(*id)) {
            gate.release_key(&mut writer, owner, &mut free);
        }
        gate.put_keys_in_force(&mut writer, None, free);
        gate.use_again(&mut writer);
        gate.return_writer(writer);
    }
}

impl Gate {
    fn return_writer(&self, writer: Box<Writer>) {
        *self.writer.lock().unwrap_or_else(|e| e.into_inner()) = Some(writer);
    }
}

impl fmt::Debug for Resync<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resync").finish_non_exhaustive()
    }
}

/// Slots that are looked at between two offers of the processor.
const SLOTS_AT_ONCE: u32 = 4096;

/// A set of slots, a bit for each.
#[derive(Default)]
struct SlotSet(Vec<u64>);

impl SlotSet {
    /// Puts it in; whether it was not in yet.
    fn insert(&mut self, id: SlotId) -> bool {
        let (word, bit) = (id as usize / 64, 1 << (id % 64));
        if self.0.len() <= word {
            self.0.resize(word + 1, 0);
        }
        let new = self.0[word] & bit == 0;
        self.0[word] |= bit;
        new
    }

    fn contains(&self, id: SlotId) -> bool {
        self.0
            .get(id as usize / 64)
            .is_some_and(|word| word >> (id % 64) & 1 == 1)
    }
}
