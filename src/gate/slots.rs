//! The memory of the keys: one slot per secret, a cache line each, in chunks that never move, named by a number.
//!
//! Slots outlive snapshots, because windows do. The first secret of a key lies in the key's *owner* slot, which also
//! holds the key's id and leads to its windows (`places.rs`); further secrets (a rotation's) lie in slots that point to it.
//! What few slots have, and no decision asks for, lies in maps beside them.
//!
//! # Who may touch what
//! A reader finds a slot by what is in force (`snapshot.rs`) and holds on to that for one decision. A writer works on
//! slots that readers are in, so:
//! - what changes while a slot is in use changes as one atomic each: the number of the terms (all that may be said of
//!   the secret, at once: `terms.rs`) and that of the place of the key's windows;
//! - a secret is taken out by zeroing its digest, and put in with the digest last. The words of a digest are stored with
//!   release and loaded with acquire, so whoever finds all of a digest finds the terms that were stored before it, or
//!   later ones of the same secret. One that is caught half-way matches nobody's secret;
//! - whoever found a digest looks at it once more after loading the terms: were the secret replaced meanwhile by another
//!   one of the same key, the terms might be the other's, and then the digest is another, too;
//! - a slot is given to another key only after the last reader who could be in it has left (`retired.rs`).

use super::key::{KeyId, SecretDigest, ShortId};
use super::places::{NO_PLACE, PlaceId};
use super::terms::{NO_TERMS, TermsId};
use std::collections::HashMap;
use std::sync::atomic::{
    AtomicU16, AtomicU32, AtomicU64,
    Ordering::{AcqRel, Acquire, Relaxed, Release},
};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

/// The number of a slot.
pub(super) type SlotId = u32;
/// No slot.
pub(super) const NONE: SlotId = u32::MAX;

/// A little less than 2 MiB of slots, because the allocator hands out pieces of this size in whole units of 256 KiB: a
/// round number of slots, of which each piece has something of its own to say besides, would cost one unit more. Larger
/// chunks save a hundredth, and cost every small gate as much as they are large. A multiple of the 64 marks in a word.
const CHUNK: usize = 32_704;
/// 32,704 × 2,048 = 67 million secrets. A bound, so that the table of chunks never has to move.
const CHUNKS: usize = 2_048;

/// All slots.
#[derive(Debug)]
pub(super) struct Slots {
    chunks: Box<[OnceLock<Chunk>]>,
    /// Of owner slots whose keys' ids are too long for them. No decision looks here: the terms have the id, too.
    long_ids: Mutex<HashMap<SlotId, Arc<str>>>,
    /// From each of a key's slots to the next, where there are several. Used by writers only.
    siblings: Mutex<HashMap<SlotId, SlotId, ahash::RandomState>>,
}

/// In the table of chunks itself, so that the way to a slot is one load shorter.
#[derive(Debug)]
struct Chunk {
    slots: Box<[Slot]>,
    /// The places of the keys' windows, of owner slots.
    places: Box<[AtomicU16]>,
    marks: Box<Marks>,
}

#[derive(Debug)]
struct Marks {
    permits: Bitmap,
    changed: Bitmap,
    live: Bitmap,
}

/// One secret, and the key itself where it is the owner.
#[derive(Debug)]
#[repr(C, align(64))]
pub(super) struct Slot {
    digest: [AtomicU64; 4],
    /// What kind of slot it is, in the first byte, and the id of the key or the number of its owner slot.
    name: [AtomicU64; 3],
    terms: AtomicU32,
    /// Unix time of the last permit, in seconds; 0 for none yet.
    pub last_used_s: AtomicU32,
}

/// Which slots of a chunk have something to tell.
#[derive(Debug)]
struct Bitmap([AtomicU64; CHUNK / 64]);

/// Which of the bitmaps is meant.
#[derive(Clone, Copy, Debug)]
pub(super) enum Mark {
    /// Permits or refusals were counted since the meter's last look.
    Permits,
    /// Windows changed since the journal's last look.
    Windows,
    /// The key has windows at all.
    Live,
}

impl Slots {
    pub fn new() -> Self {
        Slots {
            chunks: (0..CHUNKS).map(|_| OnceLock::new()).collect(),
            long_ids: Mutex::default(),
            siblings: Mutex::default(),
        }
    }

    /// The slot with this number; `None` if it was never allocated.
    #[inline]
    pub fn get(&self, id: SlotId) -> Option<&Slot> {
        self.chunk(id)?.slots.get(id as usize % CHUNK)
    }

    /// The place of the windows of the key in slot `owner`, or [`NO_PLACE`].
    pub fn place(&self, owner: SlotId) -> PlaceId {
        self.place_cell(owner).map_or(NO_PLACE, |place| place.load(Acquire))
    }

    /// Changes the place of a key's windows.
    ///
    /// # Errors
    /// What it is, where that is not `before`.
    pub fn set_place(&self, owner: SlotId, before: PlaceId, after: PlaceId) -> Result<(), PlaceId> {
        let cell = self.place_cell(owner).ok_or(NO_PLACE)?;
        cell.compare_exchange(before, after, AcqRel, Acquire).map(|_| ())
    }

    fn place_cell(&self, owner: SlotId) -> Option<&AtomicU16> {
        self.chunk(owner)?.places.get(owner as usize % CHUNK)
    }

    /// Makes room for the slot `id`. `false`: beyond what the table can hold.
    pub fn allocate(&self, id: SlotId) -> bool {
        let Some(cell) = self.chunks.get(chunk_of(id)) else {
            return false;
        };
        cell.get_or_init(|| Chunk {
            slots: (0..CHUNK).map(|_| Slot::empty()).collect(),
            places: (0..CHUNK).map(|_| AtomicU16::new(NO_PLACE)).collect(),
            marks: Box::new(Marks {
                permits: Bitmap::empty(),
                changed: Bitmap::empty(),
                live: Bitmap::empty(),
            }),
        });
        true
    }

    /// The slot of the key's next secret.
    pub fn sibling_of(&self, id: SlotId) -> Option<SlotId> {
        self.siblings().get(&id).copied()
    }

    /// Sets the slot of the key's next secret.
    pub fn set_sibling(&self, id: SlotId, next: Option<SlotId>) {
        match next {
            Some(next) => self.siblings().insert(id, next),
            None => self.siblings().remove(&id),
        };
    }

    fn siblings(&self) -> MutexGuard<'_, HashMap<SlotId, SlotId, ahash::RandomState>> {
        self.siblings.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The id of the key in an owner slot.
    pub fn key_id(&self, owner: SlotId) -> KeyId {
        match self.get(owner) {
            Some(slot) if slot.has_long_id() => {
                let long_ids = self.long_ids.lock().unwrap_or_else(|e| e.into_inner());
                long_ids.get(&owner).cloned().map_or_else(|| "".into(), KeyId::Long)
            }
            Some(slot) => KeyId::Short(slot.short_id()),
            None => "".into(),
        }
    }

    /// Makes a slot the owner slot of a key.
    pub fn set_key_id(&self, owner: SlotId, id: &KeyId) {
        let Some(slot) = self.get(owner) else { return };
        slot.set_name(match id {
            KeyId::Short(id) => id.0,
            KeyId::Long(id) => {
                let mut long_ids = self.long_ids.lock().unwrap_or_else(|e| e.into_inner());
                long_ids.insert(owner, id.clone());
                [[LONG_ID; 8]; 3]
            }
        });
    }

    /// Makes a slot, which has no terms, as good as new.
    pub fn clear(&self, id: SlotId) {
        if let Some(slot) = self.get(id) {
            if slot.has_long_id() {
                let mut long_ids = self.long_ids.lock().unwrap_or_else(|e| e.into_inner());
                long_ids.remove(&id);
            }
            self.set_sibling(id, None);
            slot.clear();
        }
    }

    /// Marks an owner slot.
    #[inline]
    pub fn mark(&self, id: SlotId, mark: Mark) {
        if let Some(chunk) = self.chunk(id) {
            chunk.bitmap(mark).set(id as usize % CHUNK);
        }
    }

    /// Takes all marks of one kind and calls `each` for them.
    pub fn drain(&self, mark: Mark, mut each: impl FnMut(SlotId, &Slot)) {
        for (index, chunk) in self.chunks.iter().enumerate() {
            // Chunks are allocated in order, so the first gap is the end.
            let Some(chunk) = chunk.get() else { return };
            chunk
                .bitmap(mark)
                .drain(|bit| each((index * CHUNK + bit) as SlotId, &chunk.slots[bit]));
        }
    }

    #[inline]
    fn chunk(&self, id: SlotId) -> Option<&Chunk> {
        self.chunks.get(chunk_of(id))?.get()
    }
}

/// The chunk that a slot is in.
#[inline]
pub(super) fn chunk_of(id: SlotId) -> usize {
    id as usize / CHUNK
}

impl Chunk {
    fn bitmap(&self, mark: Mark) -> &Bitmap {
        match mark {
            Mark::Permits => &self.marks.permits,
            Mark::Windows => &self.marks.changed,
            Mark::Live => &self.marks.live,
        }
    }
}

impl Bitmap {
    const fn empty() -> Self {
        Bitmap([const { AtomicU64::new(0) }; CHUNK / 64])
    }

    fn set(&self, bit: usize) {
        let (word, mask) = (&self.0[bit / 64], 1 << (bit % 64));
        // A plain load first: in a busy second most marks are there already, and a load shares the cache line.
        if word.load(Relaxed) & mask == 0 {
            word.fetch_or(mask, Relaxed);
        }
    }

    fn drain(&self, mut each: impl FnMut(usize)) {
        for (index, word) in self.0.iter().enumerate() {
            if word.load(Relaxed) == 0 {
                continue;
            }
            let mut bits = word.swap(0, Relaxed);
            while bits != 0 {
                each(index * 64 + bits.trailing_zeros() as usize);
                bits &= bits - 1;
            }
        }
    }
}

impl Slot {
    fn empty() -> Self {
        let slot = Slot {
            digest: Default::default(),
            name: Default::default(),
            terms: AtomicU32::new(NO_TERMS),
            last_used_s: AtomicU32::new(0),
        };
        slot.set_name([[FREE; 8]; 3]);
        slot
    }

    /// The number of what may be said of the secret, or [`NO_TERMS`].
    #[inline]
    pub fn terms(&self) -> TermsId {
        self.terms.load(Acquire)
    }

    /// Gives it other terms; those it had. For [`super::terms::TermsTable::give`], which counts.
    pub fn set_terms(&self, terms: TermsId) -> TermsId {
        self.terms.swap(terms, AcqRel)
    }

    /// Whether this slot holds the secret with this digest.
    #[inline]
    pub fn holds(&self, digest: &SecretDigest) -> bool {
        words(digest)
            .iter()
            .zip(&self.digest)
            .fold(true, |same, (word, held)| same & (*word == held.load(Acquire)))
    }

    /// Whether a secret lies in the slot at all.
    pub fn holds_secret(&self) -> bool {
        self.digest() != SecretDigest::NONE
    }

    /// The digest of the slot's secret, or [`SecretDigest::NONE`].
    pub fn digest(&self) -> SecretDigest {
        let mut bytes = [0; 32];
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(&self.digest) {
            chunk.copy_from_slice(&word.load(Acquire).to_ne_bytes());
        }
        SecretDigest(bytes)
    }

    /// Puts a secret in. Its terms are there already.
    pub fn put(&self, digest: &SecretDigest) {
        self.set_digest(digest);
    }

    /// Takes the secret out: nobody finds it from now on, whatever map still leads here.
    pub fn take_out(&self) {
        self.set_digest(&SecretDigest::NONE);
        self.last_used_s.store(0, Relaxed);
    }

    fn set_digest(&self, digest: &SecretDigest) {
        for (word, held) in words(digest).iter().zip(&self.digest) {
            held.store(*word, Release);
        }
    }

    /// The slot of the key that this slot, whose number is `own`, belongs to: itself if it is the owner. `None` if the
    /// slot is free.
    #[inline]
    pub fn owner(&self, own: SlotId) -> Option<SlotId> {
        let word = self.name[0].load(Relaxed).to_ne_bytes();
        match word[0] {
            FREE => None,
            OF_ANOTHER => Some(SlotId::from_ne_bytes([word[4], word[5], word[6], word[7]])),
            _ => Some(own),
        }
    }

    /// Makes it a slot for one more secret of the key in slot `owner`.
    pub fn set_owner(&self, owner: SlotId) {
        let [a, b, c, d] = owner.to_ne_bytes();
        let first = [OF_ANOTHER, 0, 0, 0, a, b, c, d];
        self.set_name([first, [0; 8], [0; 8]]);
    }

    /// The id of the key; only of an owner slot, and of no use where that has a long one.
    #[inline]
    pub fn short_id(&self) -> ShortId {
        ShortId(self.name.each_ref().map(|word| word.load(Relaxed).to_ne_bytes()))
    }

    /// Whether the key's id lies elsewhere, because it is longer than [`KeyId::SHORT`].
    fn has_long_id(&self) -> bool {
        self.name[0].load(Relaxed).to_ne_bytes()[0] == LONG_ID
    }

    fn set_name(&self, name: [[u8; 8]; 3]) {
        for (bytes, word) in name.into_iter().zip(&self.name) {
            word.store(u64::from_ne_bytes(bytes), Relaxed);
        }
    }

    fn clear(&self) {
        self.take_out();
        self.set_name([[FREE; 8]; 3]);
    }
}

/// First bytes of a slot's name that are no inline id's length.
const LONG_ID: u8 = u8::MAX;
const OF_ANOTHER: u8 = u8::MAX - 1;
const FREE: u8 = u8::MAX - 2;

fn words(digest: &SecretDigest) -> [u64; 4] {
    let mut words = [0; 4];
    for (word, chunk) in words.iter_mut().zip(digest.0.chunks_exact(8)) {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(chunk);
        *word = u64::from_ne_bytes(bytes);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_a_cache_line() {
        assert_eq!(size_of::<Slot>(), 64);
    }

    #[test]
    fn what_is_put_into_a_slot_comes_out() {
        let slot = Slot::empty();
        assert_eq!((slot.owner(7), slot.holds_secret()), (None, false));
        let slots = Slots::new();
        assert!(slots.allocate(7));
        for id in ["key_0123456789012345678", "key_01234567890123456789"] {
            slots.set_key_id(7, &KeyId::from(id));
            assert_eq!(slots.key_id(7).as_str(), id);
        }
        slots.clear(7);
        assert!(slots.long_ids.into_inner().unwrap().is_empty());
        slot.set_name(ShortId::NONE.0);
        assert_eq!(slot.owner(7), Some(7));
        let digest = SecretDigest::of(b"a secret");
        assert_eq!(slot.set_terms(5), NO_TERMS);
        slot.put(&digest);
        assert_eq!(slot.terms(), 5);
        assert!(slot.holds(&digest) && slot.digest() == digest);
        assert!(!slot.holds(&SecretDigest::of(b"another")));
        slot.take_out();
        assert!(!slot.holds(&digest) && !slot.holds_secret());
        slot.set_owner(0x0102_0304);
        assert_eq!(slot.owner(7), Some(0x0102_0304));
        slot.clear();
        assert_eq!(slot.owner(7), None);
    }

    #[test]
    fn marks_are_taken_once() {
        let slots = Slots::new();
        assert!(slots.allocate(0) && slots.allocate(CHUNK as SlotId));
        let ids = [0, 63, 64, CHUNK - 1, CHUNK, CHUNK + 900].map(|id| id as SlotId);
        for id in ids {
            slots.mark(id, Mark::Permits);
            slots.mark(id, Mark::Permits);
        }
        let taken = |mark| {
            let mut ids = vec![];
            slots.drain(mark, |id, _| ids.push(id));
            ids
        };
        assert_eq!(taken(Mark::Windows), [] as [SlotId; 0]);
        assert_eq!(taken(Mark::Permits), ids);
        assert_eq!(taken(Mark::Permits), [] as [SlotId; 0]);
    }
}
