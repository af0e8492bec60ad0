//! The memory of the keys: one 80-byte slot per secret, in chunks that never move, named by a number.
//!
//! Slots outlive snapshots, because windows do. The first secret of a key lies in the key's *owner* slot, which also
//! holds the key's id and windows; further secrets (a rotation's) lie in slots that point to it.
//!
//! # Who may touch what
//! A reader finds a slot by what is in force (`snapshot.rs`) and holds on to that for one decision. A writer works on
//! slots that readers are in, so:
//! - what changes while a slot is in use changes through one atomic pointer each: `terms` (all that may be said of the
//!   secret, at once) and `windows`;
//! - a secret is taken out by zeroing its digest, and put in with the digest last. The words of a digest are stored with
//!   release and loaded with acquire, so whoever finds all of a digest finds the terms that were stored before it, or
//!   later ones of the same secret. One that is caught half-way matches nobody's secret;
//! - whoever found a digest looks at it once more after loading the terms: were the secret replaced meanwhile by another
//!   one of the same key, the terms might be the other's, and then the digest is another, too;
//! - a slot is given to another key only after the last reader who could be in it has left (`retired.rs`).

use super::key::{KeyId, SecretDigest};
use super::quota::KeyWindows;
use super::terms::Terms;
use arc_swap::ArcSwapOption;
use std::sync::atomic::{
    AtomicU32, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};
use std::sync::{Arc, OnceLock};

/// The number of a slot.
pub(super) type SlotId = u32;
/// No slot.
pub(super) const NONE: SlotId = u32::MAX;

/// 1.25 MiB of slots, whole units of an allocator's 64 KiB: with 4,096 slots to a chunk a tenth of the memory was lost to its
/// rounding, and chunks four times as large save no more, but cost every small gate 4 MiB.
const CHUNK: usize = 16_384;
/// 16,384 × 4,096 = 67 million secrets. A bound, so that the table of chunks never has to move.
const CHUNKS: usize = 4_096;

/// All slots.
#[derive(Debug)]
pub(super) struct Slots {
    chunks: Box<[OnceLock<Box<Chunk>>]>,
}

#[derive(Debug)]
struct Chunk {
    slots: Box<[Slot]>,
    permits: Bitmap,
    windows: Bitmap,
    live: Bitmap,
}

/// One secret, and the key itself where it is the owner.
#[derive(Debug)]
#[repr(C)]
pub(super) struct Slot {
    digest: [AtomicU64; 4],
    /// What kind of slot it is, in the first byte, and the id of the key or the number of its owner slot.
    name: [AtomicU64; 3],
    pub terms: ArcSwapOption<Terms>,
    pub windows: ArcSwapOption<KeyWindows>,
    /// The key's next secret; used by writers only.
    pub sibling: AtomicU32,
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
        }
    }

    /// The slot with this number; `None` if it was never allocated.
    #[inline]
    pub fn get(&self, id: SlotId) -> Option<&Slot> {
        self.chunk(id)?.slots.get(id as usize % CHUNK)
    }

    /// Makes room for the slot `id`. `false`: beyond what the table can hold.
    pub fn allocate(&self, id: SlotId) -> bool {
        let Some(cell) = self.chunks.get(id as usize / CHUNK) else {
            return false;
        };
        cell.get_or_init(|| {
            Box::new(Chunk {
                slots: (0..CHUNK).map(|_| Slot::empty()).collect(),
                permits: Bitmap::empty(),
                windows: Bitmap::empty(),
                live: Bitmap::empty(),
            })
        });
        true
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
        self.chunks.get(id as usize / CHUNK)?.get().map(|chunk| &**chunk)
    }
}

impl Chunk {
    fn bitmap(&self, mark: Mark) -> &Bitmap {
        match mark {
            Mark::Permits => &self.permits,
            Mark::Windows => &self.windows,
            Mark::Live => &self.live,
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
            terms: ArcSwapOption::empty(),
            windows: ArcSwapOption::empty(),
            sibling: AtomicU32::new(NONE),
            last_used_s: AtomicU32::new(0),
        };
        slot.set_name([FREE; 24]);
        slot
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

    /// Puts a secret in.
    pub fn put(&self, digest: &SecretDigest, terms: Arc<Terms>) {
        self.terms.store(Some(terms));
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
        let mut name = [OF_ANOTHER; 24];
        name[4..8].copy_from_slice(&owner.to_ne_bytes());
        self.set_name(name);
    }

    /// The id of the key; only of an owner slot. Ids beyond [`KeyId::INLINE`] bytes lie in the terms.
    #[inline]
    pub fn key_id(&self) -> KeyId {
        let mut bytes = [0; 24];
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(&self.name) {
            chunk.copy_from_slice(&word.load(Relaxed).to_ne_bytes());
        }
        let [len, inline @ ..] = bytes;
        if usize::from(len) <= KeyId::INLINE {
            return KeyId::Inline { len, bytes: inline };
        }
        let terms = self.terms.load();
        terms
            .as_ref()
            .and_then(|terms| terms.long_id.clone())
            .map_or_else(|| "".into(), KeyId::Shared)
    }

    /// Makes it the owner slot of a key.
    pub fn set_key_id(&self, id: &KeyId) {
        let mut name = [LONG_ID; 24];
        if let KeyId::Inline { len, bytes } = id {
            name[0] = *len;
            name[1..].copy_from_slice(bytes);
        }
        self.set_name(name);
    }

    fn set_name(&self, name: [u8; 24]) {
        for (chunk, word) in name.chunks_exact(8).zip(&self.name) {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(chunk);
            word.store(u64::from_ne_bytes(bytes), Relaxed);
        }
    }

    /// Makes the slot as good as new.
    pub fn clear(&self) {
        self.take_out();
        self.set_name([FREE; 24]);
        self.sibling.store(NONE, Relaxed);
        self.terms.store(None);
        self.windows.store(None);
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
    fn a_slot_is_80_bytes() {
        assert_eq!(size_of::<Slot>(), 80);
    }

    #[test]
    fn what_is_put_into_a_slot_comes_out() {
        let slot = Slot::empty();
        assert_eq!((slot.owner(7), slot.holds_secret()), (None, false));
        slot.set_key_id(&KeyId::from("key_0123456789012345678"));
        assert_eq!(slot.key_id().as_str(), "key_0123456789012345678");
        assert_eq!(slot.owner(7), Some(7));
        let digest = SecretDigest::of(b"a secret");
        slot.put(&digest, Arc::new(Terms::of_unknown_key(None)));
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
