//! The one writer's side of the slots: which key has which, and which are free.

use super::key::{KeyId, SecretDigest};
use super::parts;
use super::slots::{NONE, Slot, SlotId, Slots};
use super::terms::{NO_TERMS, TermsTable};
use super::update::KeyError;
use hashbrown::HashTable;
use std::fmt;

/// What only a writer needs to know.
pub(super) struct Writer {
    /// The owner slots, by the ids of their keys; of many keys, in several tables.
    ids: Box<[HashTable<SlotId>]>,
    hasher: ahash::RandomState,
    free: Vec<SlotId>,
    next: SlotId,
    pub terms: TermsTable,
    /// Secrets that were taken out and to which a map may still lead.
    pub gone: Vec<(SecretDigest, SlotId)>,
}

impl Writer {
    pub fn new() -> Self {
        Writer {
            ids: Box::new([HashTable::new()]),
            hasher: ahash::RandomState::new(),
            free: vec![],
            next: 0,
            terms: TermsTable::default(),
            gone: vec![],
        }
    }

    /// How many keys have a slot.
    pub fn len(&self) -> usize {
        self.ids.iter().map(HashTable::len).sum()
    }

    /// Makes room for so many keys in all, spread as befits their number.
    pub fn reserve(&mut self, slots: &Slots, keys: usize) {
        if self.ids.iter().map(HashTable::capacity).sum::<usize>() >= keys {
            return;
        }
        let parts = parts::number_for(keys);
        let capacity = parts::share_of(keys, parts);
        let held = std::mem::take(&mut self.ids);
        self.ids = (0..parts).map(|_| HashTable::with_capacity(capacity)).collect();
        for id in held.into_iter().flatten() {
            self.put(slots, hash_of(&self.hasher, slots, id), id);
        }
    }

    fn put(&mut self, slots: &Slots, hash: u64, owner: SlotId) {
        let hasher = &self.hasher;
        self.ids[part_of(hash, self.ids.len())].insert_unique(hash, owner, |held| hash_of(hasher, slots, *held));
    }

    /// The owner slot of a key.
    pub fn find(&self, slots: &Slots, id: &str) -> Option<SlotId> {
        self.find_hashed(slots, id, self.hasher.hash_one(id))
    }

    fn find_hashed(&self, slots: &Slots, id: &str, hash: u64) -> Option<SlotId> {
        let same = |held: &SlotId| slots.key_id(*held).as_str() == id;
        self.ids[part_of(hash, self.ids.len())].find(hash, same).copied()
    }

    /// The owner slot of a key, made if it is new; and whether it is.
    pub fn find_or_add(&mut self, slots: &Slots, id: &str) -> Result<(SlotId, bool), KeyError> {
        let hash = self.hasher.hash_one(id);
        if let Some(found) = self.find_hashed(slots, id, hash) {
            return Ok((found, false));
        }
        let (owner, _) = self.take_slot(slots)?;
        slots.set_key_id(owner, &KeyId::from(id));
        self.put(slots, hash, owner);
        Ok((owner, true))
    }

    /// A slot for one more secret of the key.
    pub fn add_secret_slot(&mut self, slots: &Slots, owner: SlotId) -> Result<SlotId, KeyError> {
        let (id, slot) = self.take_slot(slots)?;
        slot.set_owner(owner);
        Ok(id)
    }

    fn take_slot<'s>(&mut self, slots: &'s Slots) -> Result<(SlotId, &'s Slot), KeyError> {
        let id = match self.free.pop() {
            Some(id) => id,
            None => {
                if self.next == NONE || !slots.allocate(self.next) {
                    return Err(KeyError::TooMany);
                }
                self.next += 1;
                self.next - 1
            }
        };
        slots.get(id).map(|slot| (id, slot)).ok_or(KeyError::TooMany)
    }

    /// Makes a slot free, which no reader can be in.
    pub fn free(&mut self, slots: &Slots, id: SlotId) {
        if let Some(slot) = slots.get(id) {
            self.terms.give(slot, NO_TERMS);
        }
        slots.clear(id);
        self.free.push(id);
    }

    /// Forgets that the key has an owner slot.
    pub fn remove(&mut self, slots: &Slots, id: &str) {
        let hash = self.hasher.hash_one(id);
        let same = |held: &SlotId| slots.key_id(*held).as_str() == id;
        let part = part_of(hash, self.ids.len());
        if let Ok(entry) = self.ids[part].find_entry(hash, same) {
            entry.remove();
        }
    }

    /// All slots that were ever taken.
    pub fn slot_ids(&self) -> std::ops::Range<SlotId> {
        0..self.next
    }
}

impl fmt::Debug for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writer")
            .field("keys", &self.len())
            .finish_non_exhaustive()
    }
}

fn hash_of(hasher: &ahash::RandomState, slots: &Slots, id: SlotId) -> u64 {
    hasher.hash_one(slots.key_id(id).as_str())
}

/// By bits that a table does not use itself: it has the highest seven and the lowest.
fn part_of(hash: u64, parts: usize) -> usize {
    parts::of((hash >> 25) as u32, parts)
}
