//! The memory of the keys: one 88-byte slot per secret, in chunks that never move, named by a number.
//!
//! A slot is found through the snapshot's map and read under that map's shard lock; a writer unlinks a slot from
//! the map, under the same lock, before it writes the slot's plain fields again. That gives every Relaxed load in
//! here its happens-before. What changes while a slot is linked changes through one atomic pointer: `terms` (all
//! that may be said of the secret, at once) and `windows`.
//!
//! Slots outlive snapshots, because windows do. The first secret of a key lies in the key's *owner* slot, which also
//! holds the key's id and windows; further secrets (a rotation's) lie in slots that point to it.

use super::key::{KeyId, SecretDigest};
use super::quota::KeyWindows;
use super::snapshot::Terms;
use arc_swap::ArcSwapOption;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

/// The number of a slot.
pub(super) type SlotId = u32;
/// No slot.
pub(super) const NONE: SlotId = u32::MAX;

/// 22 × 64 KiB of slots, whole units of the allocator's: with 4,096 slots a chunk a tenth of the memory was lost in its
/// rounding.
const CHUNK: usize = 16_384;
/// 16,384 × 4,096 = 67 million secrets. A bound, so that the table of chunks never has to move.
const CHUNKS: usize = 4096;

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
pub(super) struct Slot {
    digest: [AtomicU64; 4],
    id: [AtomicU64; 3],
    /// The slot of the key: this one, if it is the owner.
    pub owner: AtomicU32,
    /// The key's next secret; used by writers only.
    pub sibling: AtomicU32,
    /// Unix time of the last permit, in seconds; 0 for none yet.
    pub last_used_s: AtomicU32,
    /// 1 while a map leads here; used by writers only.
    pub linked: AtomicU32,
    pub terms: ArcSwapOption<Terms>,
    pub windows: ArcSwapOption<KeyWindows>,
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
        Slot {
            digest: Default::default(),
            id: Default::default(),
            owner: AtomicU32::new(NONE),
            sibling: AtomicU32::new(NONE),
            last_used_s: AtomicU32::new(0),
            linked: AtomicU32::new(0),
            terms: ArcSwapOption::empty(),
            windows: ArcSwapOption::empty(),
        }
    }

    /// Whether this slot holds the secret with this digest.
    #[inline]
    pub fn holds(&self, digest: &SecretDigest) -> bool {
        words(digest)
            .iter()
            .zip(&self.digest)
            .all(|(word, held)| *word == held.load(Relaxed))
    }

    /// The digest of the slot's secret.
    pub fn digest(&self) -> SecretDigest {
        let mut bytes = [0; 32];
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(&self.digest) {
            chunk.copy_from_slice(&word.load(Relaxed).to_ne_bytes());
        }
        SecretDigest(bytes)
    }

    /// Puts a secret in; only while the slot is not linked.
    pub fn set_digest(&self, digest: &SecretDigest) {
        for (word, held) in words(digest).iter().zip(&self.digest) {
            held.store(*word, Relaxed);
        }
    }

    /// The id of the key; only of an owner slot. Ids beyond [`KeyId::INLINE`] bytes lie in the terms.
    #[inline]
    pub fn key_id(&self) -> KeyId {
        let mut bytes = [0; 24];
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(&self.id) {
            chunk.copy_from_slice(&word.load(Relaxed).to_ne_bytes());
        }
        let [len, inline @ ..] = bytes;
        if len == LONG_ID {
            let terms = self.terms.load();
            return terms
                .as_ref()
                .and_then(|terms| terms.long_id.clone())
                .map_or_else(|| "".into(), KeyId::Shared);
        }
        KeyId::Inline { len, bytes: inline }
    }

    /// Sets the id; only while nothing is linked to the key.
    pub fn set_key_id(&self, id: &KeyId) {
        let mut packed = [0; 24];
        match id {
            KeyId::Inline { len, bytes } => {
                packed[0] = *len;
                packed[1..].copy_from_slice(bytes);
            }
            KeyId::Shared(_) => packed[0] = LONG_ID,
        }
        for (chunk, word) in packed.chunks_exact(8).zip(&self.id) {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(chunk);
            word.store(u64::from_ne_bytes(bytes), Relaxed);
        }
    }

    /// Makes the slot as good as new.
    pub fn clear(&self) {
        self.set_digest(&SecretDigest([0; 32]));
        self.set_key_id(&KeyId::from(""));
        self.owner.store(NONE, Relaxed);
        self.sibling.store(NONE, Relaxed);
        self.last_used_s.store(0, Relaxed);
        self.linked.store(0, Relaxed);
        self.terms.store(None);
        self.windows.store(None);
    }
}

/// A length byte that no inline id has.
const LONG_ID: u8 = u8::MAX;

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
    fn a_slot_is_88_bytes() {
        assert_eq!(size_of::<Slot>(), 88);
    }

    #[test]
    fn what_is_put_into_a_slot_comes_out() {
        let slot = Slot::empty();
        let digest = SecretDigest::of(b"a secret");
        slot.set_digest(&digest);
        assert!(slot.holds(&digest) && slot.digest() == digest);
        assert!(!slot.holds(&SecretDigest::of(b"another")));
        slot.set_key_id(&KeyId::from("key_0123456789012345678"));
        assert_eq!(slot.key_id().as_str(), "key_0123456789012345678");
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
