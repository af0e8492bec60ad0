//! Everything the gate must know about keys, in memory, at one revision: what leads from a secret to its slot.
//!
//! The map is a `DashMap` behind an `ArcSwap`, and no map is changed while it is in force: a writer builds the next one
//! aside and swaps it in, so what is published is published as a read-only view, whose lookups take **no lock at all**.
//! There is none, then, that a writer could hold, whatever it does and however long it takes.
//!
//! To copy a million entries for every change would not do. A snapshot therefore has two maps:
//! - `base`, from a full resync;
//! - `recent`, with the secrets that came since: some thousands at most, copied for each change that brings one in.
//!   When it has grown to [`RECENT_AT_MOST`], both become a new base, in a few milliseconds beside the decisions.
//!
//! Most changes touch neither. What is said of a secret changes in its slot, and a secret that is taken out leaves its way
//! in the map behind: the slot no longer holds its digest, so the way leads nowhere, and the next base is built
//! without it. For the same reason it does no harm that a slot may hold another secret by then.
//!
//! A map of many secrets is several maps (`parts.rs` says why), chosen by the same bytes that are looked up in it.
//! They lead from the first four bytes of a digest to a slot's number; the whole digest is compared in the slot. Four
//! bytes keep an entry at eight, which is what lets a million keys fit beside their slots into 128 MiB; digests
//! that share them with another one (about 116 pairs in a million) lie in a small map of their own.

use super::key::SecretDigest;
use super::parts;
use super::policy::Policy;
use super::slots::{Slot, SlotId, Slots};
use dashmap::{DashMap, ReadOnlyView};
use std::fmt;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

/// All that a request is decided by, of one moment. One load of it answers a request.
#[derive(Clone, Debug)]
pub(super) struct InForce {
    pub policy: Arc<Policy>,
    /// Absent before the first full snapshot.
    pub snapshot: Option<Snapshot>,
}

/// The keys at one revision.
#[derive(Clone)]
pub(super) struct Snapshot {
    pub revision: u64,
    base: Arc<Secrets>,
    recent: Option<Arc<Secrets>>,
}

/// Copying so many entries costs a change about as much as its share of making a new base from a million does.
const RECENT_AT_MOST: usize = 2_048;

impl Snapshot {
    pub fn new(revision: u64, base: Secrets) -> Self {
        Snapshot {
            revision,
            base: Arc::new(base),
            recent: None,
        }
    }

    /// The slot that holds the secret, if any.
    #[inline]
    pub fn find<'s>(&self, slots: &'s Slots, digest: &SecretDigest) -> Option<(SlotId, &'s Slot)> {
        let found = self.base.find(slots, digest);
        match &self.recent {
            Some(recent) if found.is_none() => recent.find(slots, digest),
            _ => found,
        }
    }

    /// This snapshot with ways to more secrets, whose slots hold them already, and without those in `gone`, which it
    /// empties if it could do without them: their slots do not hold them any more.
    pub fn with(&self, slots: &Slots, more: &[(SecretDigest, SlotId)], gone: &mut Vec<(SecretDigest, SlotId)>) -> Self {
        let mut next = self.clone();
        let recent = self.recent.as_deref();
        let held = recent.map_or(0, Secrets::len);
        if held + more.len() + gone.len() > RECENT_AT_MOST {
            let base = SecretsBuilder::from(&*self.base);
            gone.drain(..).for_each(|(digest, id)| base.remove(&digest, id));
            let living = |id: &SlotId| slots.get(*id).filter(|slot| slot.holds_secret()).map(Slot::digest);
            for id in recent.into_iter().flat_map(Secrets::slots) {
                if let Some(digest) = living(&id) {
                    base.put(slots, &digest, id);
                }
            }
            for (digest, id) in more {
                base.put(slots, digest, *id);
            }
            next.base = Arc::new(base.build());
            next.recent = None;
        } else if !more.is_empty() {
            let ways = recent.map_or_else(|| SecretsBuilder::with_capacity(0), SecretsBuilder::from);
            for (digest, id) in more {
                ways.put(slots, digest, *id);
            }
            next.recent = Some(Arc::new(ways.build()));
        }
        next
    }
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshot")
            .field("revision", &self.revision)
            .finish_non_exhaustive()
    }
}

/// Ways from secrets to slots, never changed again.
pub(super) struct Secrets {
    by_prefix: Box<[ReadOnlyView<u32, SlotId, PrefixHash>]>,
    /// Secrets whose first four bytes another one had first; absent while there are none.
    collisions: Option<ReadOnlyView<[u8; 32], SlotId, ahash::RandomState>>,
    len: usize,
}

impl Secrets {
    #[inline]
    fn find<'s>(&self, slots: &'s Slots, digest: &SecretDigest) -> Option<(SlotId, &'s Slot)> {
        let slot_of = |id: &SlotId| {
            let slot = slots.get(*id)?;
            slot.fetch();
            slot.holds(digest).then_some((*id, slot))
        };
        let prefix = prefix(digest);
        let part = self.by_prefix.get(parts::of(prefix, self.by_prefix.len()));
        let found = part.and_then(|part| part.get(&prefix)).and_then(slot_of);
        match &self.collisions {
            Some(collisions) if found.is_none() => collisions.get(&digest.0).and_then(slot_of),
            _ => found,
        }
    }

    fn len(&self) -> usize {
        self.len
    }

    fn slots(&self) -> impl Iterator<Item = SlotId> {
        let collisions = self.collisions.iter().flat_map(ReadOnlyView::values);
        let parts = self.by_prefix.iter().flat_map(ReadOnlyView::values);
        parts.chain(collisions).copied()
    }
}

/// [`Secrets`] in the making.
pub(super) struct SecretsBuilder {
    by_prefix: Box<[DashMap<u32, SlotId, PrefixHash>]>,
    collisions: DashMap<[u8; 32], SlotId, ahash::RandomState>,
}

/// Shards of a map, the fewest there can be: one thread builds it, and it is read without locks.
const SHARDS: usize = 2;

impl SecretsBuilder {
    pub fn with_capacity(secrets: usize) -> Self {
        let parts = parts::number_for(secrets, SHARDS);
        let each = || {
            let capacity = parts::share_of(secrets, parts);
            DashMap::with_capacity_and_hasher_and_shard_amount(capacity, PrefixHash::default(), SHARDS)
        };
        SecretsBuilder {
            by_prefix: (0..parts).map(|_| each()).collect(),
            collisions: DashMap::with_hasher_and_shard_amount(ahash::RandomState::new(), SHARDS),
        }
    }

    fn part(&self, prefix: u32) -> &DashMap<u32, SlotId, PrefixHash> {
        &self.by_prefix[parts::of(prefix, self.by_prefix.len())]
    }

    /// Leads the digest to the slot. `false`: another slot holds the same secret.
    pub fn put(&self, slots: &Slots, digest: &SecretDigest, id: SlotId) -> bool {
        use dashmap::Entry;
        let prefix = prefix(digest);
        match self.part(prefix).entry(prefix) {
            Entry::Vacant(entry) => {
                entry.insert(id);
                true
            }
            Entry::Occupied(entry) if *entry.get() == id => true,
            Entry::Occupied(entry) => {
                let other = slots.get(*entry.get());
                if other.is_some_and(|slot| slot.holds(digest)) {
                    return false;
                }
                drop(entry);
                *self.collisions.entry(digest.0).or_insert(id) == id
            }
        }
    }

    fn remove(&self, digest: &SecretDigest, id: SlotId) {
        let prefix = prefix(digest);
        let removed = self.part(prefix).remove_if(&prefix, |_, held| *held == id);
        if removed.is_none() {
            self.collisions.remove_if(&digest.0, |_, held| *held == id);
        }
    }

    pub fn build(self) -> Secrets {
        let len = self.by_prefix.iter().map(DashMap::len).sum::<usize>() + self.collisions.len();
        Secrets {
            by_prefix: self.by_prefix.into_iter().map(DashMap::into_read_only).collect(),
            collisions: (!self.collisions.is_empty()).then(|| self.collisions.into_read_only()),
            len,
        }
    }
}

impl From<&Secrets> for SecretsBuilder {
    fn from(secrets: &Secrets) -> Self {
        SecretsBuilder {
            by_prefix: secrets.by_prefix.iter().map(|part| part.clone().into_inner()).collect(),
            collisions: match &secrets.collisions {
                Some(collisions) => collisions.clone().into_inner(),
                None => DashMap::with_hasher_and_shard_amount(ahash::RandomState::new(), SHARDS),
            },
        }
    }
}

fn prefix(digest: &SecretDigest) -> u32 {
    let [a, b, c, d, ..] = digest.0;
    u32::from_ne_bytes([a, b, c, d])
}

type PrefixHash = BuildHasherDefault<PrefixHasher>;

/// A digest's bytes are random already. One multiplication (by 2^64 / φ, Knuth's) spreads 32 bits over the 64 that
/// the map wants: high ones choose the shard and the tag, low ones the bucket.
#[derive(Default)]
struct PrefixHasher(u64);

impl Hasher for PrefixHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write_u32(&mut self, prefix: u32) {
        self.0 = u64::from(prefix).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u32(self.0 as u32 ^ u32::from(*byte));
        }
    }
}
