//! How keys get into the gate, one change at a time; a full snapshot comes by `resync.rs`.
//!
//! One writer at a time, the feed's task. It works beside the decisions: on slots (`slots.rs` says how), and on a next
//! snapshot aside, which it then puts in force. What was replaced is used again when nobody looks at it any more.

use super::Gate;
use super::key::SecretDigest;
use super::places::NO_PLACE;
use super::retired::Unused;
use super::scope::TooManyNames;
use super::slots::{Slot, SlotId};
use super::snapshot::{Facts, InForce, Snapshot};
use super::terms::TermsId;
use super::writer::Writer;
use std::fmt;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

/// All that the gate is told about one key. A change is the whole of it again.
#[derive(Clone, Default, PartialEq, Eq)]
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

impl Gate {
    /// The revision of the keys in force; `None` before the first snapshot.
    pub fn revision(&self) -> Option<u64> {
        self.in_force.load().snapshot.as_ref().map(|snapshot| snapshot.revision)
    }

    /// How many keys the gate knows.
    pub fn key_count(&self) -> usize {
        self.with_writer(|writer| writer.len()).unwrap_or(0)
    }

    /// Applies one change. A revision that is not above the one in force is passed over: it is in already.
    ///
    /// # Errors
    /// [`KeyError`]; the key is then as it was before.
    pub fn apply(&self, update: KeyUpdate) -> Result<(), KeyError> {
        self.change(update.revision, |writer, snapshot, changed| {
            self.change_key(writer, snapshot, &update, changed)
        })
    }

    /// Forgets a key: its secrets are unknown from now on.
    ///
    /// # Errors
    /// [`KeyError::NoSnapshot`], [`KeyError::Busy`]; nothing is forgotten then.
    pub fn forget(&self, id: &str, revision: u64) -> Result<(), KeyError> {
        self.change(revision, |writer, _, changed| {
            if let Some(owner) = writer.find(&self.slots, id) {
                self.release_key(writer, owner, &mut changed.free);
            }
            Ok(())
        })
    }

    fn change(
        &self,
        revision: u64,
        act: impl FnOnce(&mut Writer, &Snapshot, &mut Changed) -> Result<(), KeyError>,
    ) -> Result<(), KeyError> {
        let changed = self.with_writer(|writer| {
            // No resync can replace it meanwhile, as that takes the writer away.
            let in_force = self.in_force.load();
            let snapshot = in_force.snapshot.as_ref().ok_or(KeyError::NoSnapshot)?;
            if revision <= snapshot.revision {
                return Ok(());
            }
            let _reclaiming = self.reclaiming();
            let mut changed = Changed::default();
            act(writer, snapshot, &mut changed)?;
            let mut next = snapshot.with(&self.slots, &changed.put, &mut writer.gone);
            next.revision = revision;
            drop(in_force);
            self.put_keys_in_force(writer, Some(next), changed.free);
            self.use_again(writer);
            Ok(())
        });
        changed.unwrap_or(Err(KeyError::Busy))
    }

    fn change_key(
        &self,
        writer: &mut Writer,
        snapshot: &Snapshot,
        update: &KeyUpdate,
        changed: &mut Changed,
    ) -> Result<(), KeyError> {
        // What can fail comes first.
        let known = writer.find(&self.slots, &update.id);
        let mut wanted: Vec<(SecretDigest, TermsId)> = vec![];
        for secret in &update.secrets {
            let digest = SecretDigest(secret.digest);
            let held = snapshot.find(&self.slots, &digest);
            if held.is_some_and(|held| held.slot.owner(held.id) != known) {
                return Err(KeyError::SecretTaken { id: update.id.clone() });
            }
            if wanted.iter().all(|(other, _)| *other != digest) {
                wanted.push((digest, writer.terms.of(&self.names, update, secret.not_after_ms)?));
            }
        }
        let (owner, _) = writer.find_or_add(&self.slots, &update.id)?;
        let is_wanted = |slot: &Slot| wanted.iter().any(|(digest, _)| slot.holds(digest));
        let kept = self.secret_slots(owner).filter(|(_, slot)| is_wanted(slot)).count();
        let owner_is_taken = self.slots.get(owner).is_some_and(is_wanted);
        let mut places = if owner_is_taken { vec![] } else { vec![owner] };
        while places.len() < wanted.len() - kept {
            match writer.add_secret_slot(&self.slots, owner) {
                Ok(id) => places.push(id),
                Err(error) => {
                    let taken = places.into_iter().filter(|id| *id != owner);
                    taken.for_each(|id| writer.free(&self.slots, id));
                    return Err(error);
                }
            }
        }

        if writer.terms.has_changed() {
            self.put_keys_in_force(writer, None, vec![]);
        }
        let unwanted: Vec<_> = self
            .secret_slots(owner)
            .filter(|(_, slot)| slot.holds_secret() && !is_wanted(slot))
            .map(|(id, _)| id)
            .collect();
        for id in unwanted {
            self.take_out(writer, id);
            if id != owner {
                self.detach(owner, id);
                changed.free.push(id);
            }
        }
        let mut places = places.into_iter();
        for (digest, terms) in wanted {
            if let Some((_, slot)) = self.secret_slots(owner).find(|(_, slot)| slot.holds(&digest)) {
                writer.terms.give(slot, terms);
            } else if let Some((id, slot)) = places.next().and_then(|id| Some((id, self.slots.get(id)?))) {
                writer.terms.give(slot, terms);
                slot.put(&digest);
                if id != owner {
                    self.attach(owner, id);
                }
                changed.put.push((digest, id));
            }
        }
        Ok(())
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
                    let is_owner = self.slots.get(id).is_some_and(|slot| slot.owner(id) == Some(id));
                    if let Some(update) = is_owner.then(|| self.export_key(writer, id, revision)).flatten() {
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

    fn export_key(&self, writer: &Writer, owner: SlotId, revision: u64) -> Option<KeyUpdate> {
        let linked: Vec<&Slot> = self
            .secret_slots(owner)
            .filter(|(_, slot)| slot.holds_secret())
            .map(|(_, slot)| slot)
            .collect();
        let terms = writer.terms.get(linked.first()?.terms())?;
        let secrets = linked.iter().filter_map(|slot| {
            let not_after_ms = writer.terms.get(slot.terms())?.not_after_ms;
            Some(SecretUpdate {
                digest: slot.digest().0,
                not_after_ms: (not_after_ms != i64::MAX).then_some(not_after_ms),
            })
        });
        Some(KeyUpdate {
            revision,
            id: self.slots.key_id(owner).as_str().into(),
            organization: terms.organization().into(),
            environment: terms.environment().into(),
            scopes: terms.role.scope_names.to_vec(),
            plan: terms.role.plan_name.clone(),
            secrets: secrets.collect(),
            expires_at_ms: (terms.expires_at_ms != i64::MAX).then_some(terms.expires_at_ms),
            disabled: terms.disabled,
            revoked: terms.revoked,
        })
    }

    /// The owner slot and those of the key's other secrets.
    pub(super) fn secret_slots(&self, owner: SlotId) -> impl Iterator<Item = (SlotId, &Slot)> {
        std::iter::successors(self.slots.get(owner).map(|slot| (owner, slot)), |(id, _)| {
            let next = self.slots.sibling_of(*id)?;
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

    /// Puts what the writer knows of terms in force, and a snapshot where there is a new one; the slots in `free` are of no
    /// use since.
    pub(super) fn put_keys_in_force(&self, writer: &mut Writer, next: Option<Snapshot>, free: Vec<SlotId>) {
        let mut unused = Unused {
            slots: free,
            ..Unused::default()
        };
        let changed = writer.terms.has_changed();
        let terms = changed.then(|| {
            let (known, gone) = writer.terms.next();
            unused.terms = gone;
            known
        });
        let change = |in_force: &mut InForce| {
            if let Some(next) = next {
                in_force.snapshot = Some(next);
            }
            if let Some(terms) = terms {
                let policy = in_force.facts.policy.clone();
                in_force.facts = Arc::new(Facts { policy, terms });
            }
        };
        self.put_in_force(change, unused);
    }

    /// Replaces what is in force.
    pub(super) fn put_in_force(&self, change: impl FnOnce(&mut InForce), unused: Unused) {
        let mut retired = self.retired.lock().unwrap_or_else(|e| e.into_inner());
        let mut next = InForce::clone(&self.in_force.load());
        change(&mut next);
        let replaced = self.in_force.swap(Arc::new(next));
        retired.push(replaced, unused);
    }

    /// Makes free what nobody can be in any more. Called while reclaiming.
    pub(super) fn use_again(&self, writer: &mut Writer) {
        let (free, _left) = self.retired.lock().unwrap_or_else(|e| e.into_inner()).take_free();
        writer.terms.use_again(free.terms);
        self.keep_counts_of_left(&free.windows);
        free.windows.iter().for_each(|left| left.place.free());
        for id in free.slots {
            if let Some(slot) = self.slots.get(id).filter(|slot| slot.owner(id) == Some(id)) {
                // What was counted after the key was forgotten, by requests that came before.
                self.keep_counts_of(id, slot);
                self.forget_windows(id);
            }
            writer.free(&self.slots, id);
        }
    }

    /// Makes the place of a key's windows free, in whose slot nobody can be.
    fn forget_windows(&self, owner: SlotId) {
        self.with_place(owner, |in_force, place| {
            if place != NO_PLACE && self.slots.set_place(owner, place, NO_PLACE).is_ok() {
                in_force.places.free(owner, place);
            }
        });
    }

    fn take_out(&self, writer: &mut Writer, id: SlotId) {
        if let Some(slot) = self.slots.get(id).filter(|slot| slot.holds_secret()) {
            writer.gone.push((slot.digest(), id));
            slot.take_out();
        }
    }

    pub(super) fn attach(&self, owner: SlotId, id: SlotId) {
        self.slots.set_sibling(id, self.slots.sibling_of(owner));
        self.slots.set_sibling(owner, Some(id));
    }

    pub(super) fn detach(&self, owner: SlotId, id: SlotId) {
        let before = self
            .secret_slots(owner)
            .find(|(before, _)| self.slots.sibling_of(*before) == Some(id));
        if let Some((before, _)) = before {
            self.slots.set_sibling(before, self.slots.sibling_of(id));
        }
    }

    /// Forgets a key. Its slots, which come to `free`, can be used again when nobody is in them; what it has counted is
    /// kept for the meter.
    pub(super) fn release_key(&self, writer: &mut Writer, owner: SlotId, free: &mut Vec<SlotId>) {
        let Some(slot) = self.slots.get(owner) else { return };
        self.keep_counts_of(owner, slot);
        writer.remove(&self.slots, self.slots.key_id(owner).as_str());
        for (id, _) in self.secret_slots(owner) {
            self.take_out(writer, id);
            free.push(id);
        }
    }
}

/// What a change comes to beside the slots.
#[derive(Default)]
struct Changed {
    /// Secrets that slots hold now.
    put: Vec<(SecretDigest, SlotId)>,
    /// Slots of no use any more.
    free: Vec<SlotId>,
}

/// A tenth of a millisecond's work: whoever waits for the processor goes first then.
const EXPORTED_AT_ONCE: SlotId = 64;
const EXPORT_PAUSE: Duration = Duration::from_micros(50);
