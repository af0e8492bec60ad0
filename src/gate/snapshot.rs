//! Everything the gate must know about keys, in memory, at one revision.
//!
//! A [`Snapshot`] is a `DashMap` from the first four bytes of a secret's digest to a slot (the whole digest is
//! compared there), behind an `ArcSwap`. One load and one lookup answer a request. A change of one key is applied
//! in place; a full resync builds another map aside and swaps it. Four bytes keep an entry at eight, which is what
//! lets a million keys fit beside their slots in 128 MiB; the few digests that share them (about 116 pairs in a
//! million) lie in a second, small map.
//!
//! A reader holds the map's shard lock, shared, for one decision: some hundred nanoseconds. A writer holds it alone
//! only to put in or take out one entry; all other changes go through a slot's atomic pointers.

use super::key::{KeyId, SecretDigest};
use super::policy::NameTables;
use super::scope::{NameId, NameSet, TooManyNames};
use super::slots::{NONE, Slot, SlotId, Slots};
use super::verdict::IdentityHeaders;
use dashmap::DashMap;
use hashbrown::HashTable;
use http::HeaderValue;
use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// All that the gate is told about one key. A change is the whole of it again.
#[derive(Clone, PartialEq, Eq)]
pub struct KeyUpdate {
    /// The feed revision that made it so.
    pub revision: u64,
    /// The key's id, which never changes.
    pub id: Box<str>,
    /// The organisation that owns it.
    pub organization: Box<str>,
    /// Its environment.
    pub environment: Box<str>,
    /// What it may do.
    pub scopes: Vec<Box<str>>,
    /// The plan that limits it.
    pub plan: Box<str>,
    /// Its secrets, those past their grace included: they are told so.
    pub secrets: Vec<SecretUpdate>,
    /// Not accepted from this Unix time on, in milliseconds.
    pub expires_at_ms: Option<i64>,
    /// Switched off.
    pub disabled: bool,
    /// Gone for good.
    pub revoked: bool,
}

/// One secret of a key.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretUpdate {
    /// SHA-256 of the secret.
    pub digest: [u8; 32],
    /// Not accepted from this Unix time on, in milliseconds.
    pub not_after_ms: Option<i64>,
}

impl fmt::Debug for KeyUpdate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyUpdate")
            .field("id", &self.id)
            .field("revision", &self.revision)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for SecretUpdate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecretUpdate")
            .field("not_after_ms", &self.not_after_ms)
            .finish_non_exhaustive()
    }
}

/// Why a key, or a whole snapshot, was not taken. What was in force before still is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyError {
    /// The organisation, environment or a scope cannot stand in a header field.
    NotAHeaderValue {
        /// The key.
        id: Box<str>,
    },
    /// The key has the secret of another key.
    SecretTaken {
        /// The key.
        id: Box<str>,
    },
    /// The snapshot is older than the one in force.
    Stale {
        /// The one in force.
        in_force: u64,
        /// The one offered.
        offered: u64,
    },
    /// More than 67 million secrets, or 65,535 different scopes, plans or environments.
    TooMany,
    /// Another writer is at work.
    Busy,
    /// A change came before the first snapshot.
    NoSnapshot,
}

impl fmt::Display for KeyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KeyError::NotAHeaderValue { id } => {
                write!(
                    f,
                    "key {id}: organisation, environment and scopes must be printable ASCII"
                )
            }
            KeyError::SecretTaken { id } => write!(f, "key {id} has a secret that belongs to another key"),
            KeyError::Stale { in_force, offered } => {
                write!(f, "revision {offered} is older than {in_force}, which is in force")
            }
            KeyError::TooMany => f.write_str("too many secrets, scopes, plans or environments"),
            KeyError::Busy => f.write_str("another writer is at work"),
            KeyError::NoSnapshot => f.write_str("a change came before the first snapshot"),
        }
    }
}

impl std::error::Error for KeyError {}

impl From<TooManyNames> for KeyError {
    fn from(_: TooManyNames) -> Self {
        KeyError::TooMany
    }
}

/// What may be said of a secret: shared by all secrets of which the same is said.
#[derive(Debug)]
pub struct Terms {
    pub(super) organization: Box<str>,
    pub(super) environment: Box<str>,
    pub(super) environment_id: NameId,
    pub(super) scopes: NameSet,
    pub(super) scope_names: Box<[Box<str>]>,
    pub(super) plan: NameId,
    pub(super) plan_name: Box<str>,
    /// Unix milliseconds; `i64::MAX` for never.
    pub(super) expires_at_ms: i64,
    pub(super) not_after_ms: i64,
    pub(super) disabled: bool,
    pub(super) revoked: bool,
    pub(super) headers: IdentityHeaders,
    /// The key's id where it is too long for its slot.
    pub(super) long_id: Option<Arc<str>>,
}

/// The keys at one revision.
pub(super) struct Snapshot {
    secrets: DashMap<u32, SlotId, PrefixHash>,
    /// Secrets whose first four bytes another one had first.
    collisions: DashMap<[u8; 32], SlotId, ahash::RandomState>,
    collided: AtomicBool,
    revision: AtomicU64,
}

impl Snapshot {
    pub fn with_capacity(secrets: usize) -> Self {
        // Many shards keep a growing shard's rehash, which its readers wait for, to a few microseconds.
        let shards = (secrets / 512).next_power_of_two().clamp(64, 4096);
        Snapshot {
            secrets: DashMap::with_capacity_and_hasher_and_shard_amount(secrets, PrefixHash::default(), shards),
            collisions: DashMap::with_hasher(ahash::RandomState::new()),
            collided: AtomicBool::new(false),
            revision: AtomicU64::new(0),
        }
    }

    pub fn revision(&self) -> u64 {
        // Acquire: who reads a revision to acknowledge it has seen the changes behind it.
        self.revision.load(Ordering::Acquire)
    }

    pub fn set_revision(&self, revision: u64) {
        self.revision.fetch_max(revision, Ordering::Release);
    }

    /// Runs `read` on the slot that holds the secret, if any. The slot stays what it is until `read` returns.
    #[inline]
    pub fn with<R>(&self, slots: &Slots, digest: &SecretDigest, read: impl FnOnce(SlotId, &Slot) -> R) -> Option<R> {
        if let Some(found) = self.secrets.get(&prefix(digest)) {
            let slot = slots.get(*found)?;
            if slot.holds(digest) {
                return Some(read(*found, slot));
            }
        }
        // Relaxed: a secret that is being put in at this very moment may be found or not.
        if !self.collided.load(Ordering::Relaxed) {
            return None;
        }
        let found = self.collisions.get(&digest.0)?;
        slots.get(*found).map(|slot| read(*found, slot))
    }

    /// Leads the digest to the slot, which holds it already. `false`: another slot holds the same secret.
    pub fn link(&self, slots: &Slots, digest: &SecretDigest, id: SlotId) -> bool {
        use dashmap::Entry;
        match self.secrets.entry(prefix(digest)) {
            Entry::Vacant(entry) => {
                entry.insert(id);
                true
            }
            Entry::Occupied(entry) => {
                let other = *entry.get();
                if slots.get(other).is_some_and(|slot| slot.holds(digest)) {
                    return other == id;
                }
                drop(entry);
                self.collided.store(true, Ordering::Relaxed);
                match self.collisions.entry(digest.0) {
                    Entry::Occupied(entry) => *entry.get() == id,
                    Entry::Vacant(entry) => {
                        entry.insert(id);
                        true
                    }
                }
            }
        }
    }

    /// Takes the way from a digest to a slot out. When it returns, no reader is in the slot by that way.
    pub fn unlink(&self, digest: &SecretDigest, id: SlotId) {
        if self.secrets.remove_if(&prefix(digest), |_, held| *held == id).is_none() {
            self.collisions.remove_if(&digest.0, |_, held| *held == id);
        }
    }
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshot")
            .field("revision", &self.revision)
            .finish_non_exhaustive()
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

/// Terms that are said of many secrets are held once.
type TermsTable = HashMap<TermsKey, Arc<Terms>, ahash::RandomState>;

#[derive(PartialEq, Eq, Hash)]
struct TermsKey {
    organization: Box<str>,
    environment: Box<str>,
    plan: Box<str>,
    scopes: Vec<Box<str>>,
}

/// The one writer's side of the slots: which are free, and which key has which.
pub(super) struct Writer {
    ids: HashTable<SlotId>,
    hasher: ahash::RandomState,
    free: Vec<SlotId>,
    next: SlotId,
    terms: TermsTable,
}

impl Writer {
    pub fn new() -> Self {
        Writer {
            ids: HashTable::new(),
            hasher: ahash::RandomState::new(),
            free: vec![],
            next: 0,
            terms: TermsTable::default(),
        }
    }

    /// How many keys have a slot.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    pub fn reserve(&mut self, slots: &Slots, keys: usize) {
        let hasher = &self.hasher;
        self.ids
            .reserve(keys.saturating_sub(self.ids.len()), |id| hash_of(hasher, slots, *id));
    }

    /// The owner slot of a key.
    pub fn find(&self, slots: &Slots, id: &str) -> Option<SlotId> {
        let same = |held: &SlotId| slots.get(*held).is_some_and(|slot| slot.key_id().as_str() == id);
        self.ids.find(self.hasher.hash_one(id), same).copied()
    }

    /// The owner slot of a key, made if it is new; and whether it is.
    pub fn find_or_add(&mut self, slots: &Slots, id: &str) -> Result<(SlotId, bool), KeyError> {
        if let Some(found) = self.find(slots, id) {
            return Ok((found, false));
        }
        let (owner, slot) = self.take_slot(slots)?;
        slot.owner.store(owner, Ordering::Relaxed);
        let key_id = KeyId::from(id);
        slot.set_key_id(&key_id);
        if let KeyId::Shared(long_id) = key_id {
            slot.terms.store(Some(Arc::new(Terms::of_unknown_key(long_id))));
        }
        let hasher = &self.hasher;
        self.ids
            .insert_unique(hasher.hash_one(id), owner, |held| hash_of(hasher, slots, *held));
        Ok((owner, true))
    }

    /// A slot for one more secret of the key.
    pub fn add_secret_slot(&mut self, slots: &Slots, owner: SlotId) -> Result<SlotId, KeyError> {
        let (id, slot) = self.take_slot(slots)?;
        slot.owner.store(owner, Ordering::Relaxed);
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

    /// Gives a slot back, which nothing leads to any more.
    pub fn release(&mut self, slots: &Slots, id: SlotId) {
        if let Some(slot) = slots.get(id) {
            slot.clear();
            self.free.push(id);
        }
    }

    /// Forgets that the key has an owner slot.
    pub fn remove(&mut self, slots: &Slots, id: &str) {
        let hash = self.hasher.hash_one(id);
        let same = |held: &SlotId| slots.get(*held).is_some_and(|slot| slot.key_id().as_str() == id);
        if let Ok(entry) = self.ids.find_entry(hash, same) {
            entry.remove();
        }
    }

    /// All slots that were ever taken.
    pub fn slot_ids(&self) -> std::ops::Range<SlotId> {
        0..self.next
    }

    /// The terms of one secret, shared with all others of which the same is said.
    pub fn terms(
        &mut self,
        names: &NameTables,
        key: &KeyUpdate,
        not_after: Option<i64>,
    ) -> Result<Arc<Terms>, KeyError> {
        let common = self.common_terms(names, key)?;
        let plain = key.expires_at_ms.is_none() && not_after.is_none() && !key.disabled && !key.revoked;
        if plain && key.id.len() <= KeyId::INLINE {
            return Ok(common);
        }
        Ok(Arc::new(Terms {
            organization: common.organization.clone(),
            environment: common.environment.clone(),
            environment_id: common.environment_id,
            scopes: common.scopes.clone(),
            scope_names: common.scope_names.clone(),
            plan: common.plan,
            plan_name: common.plan_name.clone(),
            expires_at_ms: key.expires_at_ms.unwrap_or(i64::MAX),
            not_after_ms: not_after.unwrap_or(i64::MAX),
            disabled: key.disabled,
            revoked: key.revoked,
            headers: common.headers.clone(),
            long_id: (key.id.len() > KeyId::INLINE).then(|| Arc::from(&*key.id)),
        }))
    }

    fn common_terms(&mut self, names: &NameTables, key: &KeyUpdate) -> Result<Arc<Terms>, KeyError> {
        let table_key = TermsKey {
            organization: key.organization.clone(),
            environment: key.environment.clone(),
            plan: key.plan.clone(),
            scopes: key.scopes.clone(),
        };
        if let Some(terms) = self.terms.get(&table_key) {
            return Ok(terms.clone());
        }
        let header = |text: &str| {
            let plain = text.bytes().all(|b| (b' '..=b'~').contains(&b));
            let value = HeaderValue::from_str(text).ok().filter(|_| plain);
            value.ok_or_else(|| KeyError::NotAHeaderValue { id: key.id.clone() })
        };
        let scopes = key
            .scopes
            .iter()
            .map(|name| names.scopes.number(name))
            .collect::<Result<NameSet, _>>()?;
        let terms = Arc::new(Terms {
            organization: key.organization.clone(),
            environment: key.environment.clone(),
            environment_id: names.environments.number(&key.environment)?,
            scopes,
            scope_names: key.scopes.clone().into(),
            plan: names.plans.number(&key.plan)?,
            plan_name: key.plan.clone(),
            expires_at_ms: i64::MAX,
            not_after_ms: i64::MAX,
            disabled: false,
            revoked: false,
            headers: IdentityHeaders {
                organization: header(&key.organization)?,
                environment: header(&key.environment)?,
                scopes: header(&key.scopes.join(" "))?,
            },
            long_id: None,
        });
        self.terms.insert(table_key, terms.clone());
        Ok(terms)
    }

    /// Forgets terms that no secret has any more.
    pub fn forget_unused_terms(&mut self) {
        self.terms.retain(|_, terms| Arc::strong_count(terms) > 1);
    }
}

impl fmt::Debug for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writer")
            .field("keys", &self.ids.len())
            .finish_non_exhaustive()
    }
}

impl Terms {
    /// The terms of a key that is known by its id only, because a journal named it: no secret has them.
    fn of_unknown_key(long_id: Arc<str>) -> Self {
        let empty = HeaderValue::from_static("");
        Terms {
            organization: Box::default(),
            environment: Box::default(),
            environment_id: NameId(u16::MAX),
            scopes: NameSet::default(),
            scope_names: Box::default(),
            plan: NameId(u16::MAX),
            plan_name: Box::default(),
            expires_at_ms: i64::MAX,
            not_after_ms: i64::MAX,
            disabled: true,
            revoked: false,
            headers: IdentityHeaders {
                organization: empty.clone(),
                environment: empty.clone(),
                scopes: empty,
            },
            long_id: Some(long_id),
        }
    }
}

fn hash_of(hasher: &ahash::RandomState, slots: &Slots, id: SlotId) -> u64 {
    slots.get(id).map_or(0, |slot| hasher.hash_one(slot.key_id().as_str()))
}
