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
//! What is in the map is in `pages.rs`.

use super::key::SecretDigest;
use super::pages::{Found, Secrets, SecretsBuilder};
use super::places::Places;
use super::policy::Policy;
use super::slots::{Slot, SlotId, Slots};
use super::terms::Known;
use std::fmt;
use std::sync::Arc;

/// All that a request is decided by, of one moment. One load of it answers a request.
#[derive(Clone, Debug)]
pub(super) struct InForce {
    pub facts: Arc<Facts>,
    /// Absent before the first full snapshot.
    pub snapshot: Option<Snapshot>,
    /// Where windows lie.
    pub places: Places,
}

/// What outlives a decision in its permit: little beside the keys, which must not be kept for as long as a request takes.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    pub policy: Arc<Policy>,
    pub terms: Known,
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
    #[inline(always)]
    pub fn find<'s>(&'s self, slots: &'s Slots, digest: &SecretDigest) -> Option<Found<'s>> {
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
            let mut base = SecretsBuilder::from(&*self.base);
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
            let new = || SecretsBuilder::with_capacity(RECENT_AT_MOST);
            let mut ways = recent.map_or_else(new, SecretsBuilder::from);
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
