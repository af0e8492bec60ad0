//! What the gate has counted, for the meter: permits and refusals exactly once each, windows for the journal.
//!
//! The decision marks a key in a bitmap when its count leaves zero, so draining costs only what was active.

use super::Gate;
use super::key::KeyId;
use super::places::NO_PLACE;
use super::quota::KeyWindows;
use super::retired::{LeftWindows, Unused};
use super::slots::{Mark, Slot, SlotId};
use super::snapshot::InForce;
use super::verdict::{REASON_CODES, Reason};
use super::window::WindowCounts;
use crate::clock::Now;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Permits of one key in one tier since the last drain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PermitUse {
    /// The key.
    pub key_id: KeyId,
    /// The tier.
    pub tier: Arc<str>,
    /// The key's environment.
    pub environment: Arc<str>,
    /// Permits given.
    pub permits: u64,
    /// Requests refused for the tier's limit.
    pub limited: u64,
}

/// When a secret was last used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecretUse {
    /// The key.
    pub key_id: KeyId,
    /// The first eight bytes of the secret's digest.
    pub digest_prefix: [u8; 8],
    /// Unix time in seconds.
    pub at_s: u32,
}

/// Refusals of one code since the last drain, those for a tier's limit aside (they are in [`PermitUse`]).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusalUse {
    /// The code.
    pub code: &'static str,
    /// How many.
    pub count: u64,
}

/// The counts of one window, for the journal.
#[derive(Clone, Copy, Debug)]
pub struct WindowState<'a> {
    /// The key.
    pub key_id: &'a str,
    /// The tier.
    pub tier: &'a str,
    /// The window's length.
    pub window_ms: u64,
    /// What it has counted, in times of [`Now::elapsed_ns`].
    pub counts: &'a WindowCounts,
}

/// Refusals by code. Relaxed: they guard nothing.
#[derive(Debug, Default)]
pub(super) struct RefusalCounts([AtomicU64; REASON_CODES.len()]);

impl RefusalCounts {
    pub fn add(&self, reason: &Reason) {
        self.0[reason.index()].fetch_add(1, Relaxed);
    }
}

/// Counts of keys that were forgotten before the meter came by.
#[derive(Debug, Default)]
pub(super) struct Leftovers {
    permits: Vec<PermitUse>,
    secrets: Vec<SecretUse>,
}

impl Gate {
    /// Takes all counts of permits, and of refusals for a tier's limit, since the last call: exactly once each; and
    /// the last use of every secret that was used.
    pub fn drain_permits(&self, each: &mut dyn FnMut(PermitUse), each_secret: &mut dyn FnMut(SecretUse)) {
        // Slots are not given back meanwhile.
        let reclaiming = self.reclaiming();
        self.slots.drain(Mark::Permits, |owner, slot| {
            let drained = self.with_windows(owner, |windows| self.drain_key(owner, slot, windows, each, each_secret));
            if drained.is_none() {
                return;
            }
            // The journal's mark was made when the count left zero, and may have been taken since.
            self.slots.mark(owner, Mark::Windows);
        });
        drop(reclaiming);
        let mut leftovers = self.leftovers.lock().unwrap_or_else(|e| e.into_inner());
        // Taken with the memory: there may be very many after a busy hour, and few for long.
        std::mem::take(&mut leftovers.permits).into_iter().for_each(&mut *each);
        std::mem::take(&mut leftovers.secrets).into_iter().for_each(each_secret);
    }

    /// Takes the refusals since the last call, but for those of a tier's limit.
    pub fn drain_refusals(&self, each: &mut dyn FnMut(RefusalUse)) {
        for (code, count) in REASON_CODES.iter().zip(&self.refusals.0) {
            let count = count.swap(0, Relaxed);
            if count > 0 {
                each(RefusalUse { code, count });
            }
        }
    }

    /// The windows that changed since the last call.
    pub fn drain_windows(&self, now: Now, each: &mut dyn FnMut(WindowState<'_>)) {
        let _reclaiming = self.reclaiming();
        let mut counts = WindowCounts::default();
        self.slots.drain(Mark::Windows, |owner, _| {
            self.with_windows(owner, |windows| {
                let key_id = self.slots.key_id(owner);
                windows.export(now.elapsed_ns, &mut counts, |tier, window_ms, counts| {
                    each(WindowState {
                        key_id: key_id.as_str(),
                        tier: &self.names.tiers.name(tier),
                        window_ms,
                        counts,
                    });
                });
            });
        });
    }

    /// Puts counts of an earlier process back, beside what has been counted since. Works before the key is known.
    pub fn restore_window(&self, key_id: &str, tier: &str, counts: &WindowCounts, now: Now) {
        let Ok(tier) = self.names.tiers.number(tier) else {
            return;
        };
        let policy = self.in_force.load().facts.policy.clone();
        self.with_writer(|writer| {
            let Ok((owner, _)) = writer.find_or_add(&self.slots, key_id) else {
                return;
            };
            let Some(slot) = self.slots.get(owner) else { return };
            let plan = writer.terms.get(slot.terms()).map(|terms| terms.role.rights.plan);
            let plan = plan.map_or_else(|| policy.base(), |plan| policy.plan(plan));
            // A tier that is in no settings any more has no limit to count against.
            let Some(limit) = plan.limit(tier) else { return };
            let restore = |windows: KeyWindows<'_>| windows.restore(tier, limit, counts, now.elapsed_ns);
            self.on_windows(owner, tier, limit, now, restore);
            self.slots.mark(owner, Mark::Windows);
        });
    }

    /// Gives windows back that have been idle for longer than they are long. Called every few seconds, off the
    /// request path; memory follows the active keys.
    pub fn give_back_idle(&self, now: Now) {
        self.addresses.forget_idle(now);
        self.with_writer(|writer| {
            let _reclaiming = self.reclaiming();
            self.use_again(writer);
            let (mut live, mut left) = (vec![], vec![]);
            self.slots.drain(Mark::Live, |owner, slot| {
                let (place, held) =
                    self.with_place(owner, |in_force, place| (place, in_force.places.hold(owner, place)));
                let Some(held) = held else { return };
                if !held.windows().give_back_if_idle(now.elapsed_ns) {
                    live.push(owner);
                    return;
                }
                // A request that met them closed may have done the first step, too.
                let _ = self.slots.set_place(owner, place, NO_PLACE);
                held.windows().leave();
                left.push(LeftWindows {
                    key_id: self.slots.key_id(owner),
                    environment: self.environment_of(slot),
                    place: held,
                });
            });
            live.into_iter().for_each(|owner| self.slots.mark(owner, Mark::Live));
            if !left.is_empty() {
                self.keep_counts_of_left(&left);
                let unused = Unused {
                    windows: left,
                    ..Unused::default()
                };
                self.put_in_force(|_| (), unused);
                self.use_again(writer);
            }
            if self.in_force.load().places.has_empty_cells() {
                let leave_out = |in_force: &mut InForce| in_force.places = in_force.places.without_empty_cells();
                self.put_in_force(leave_out, Unused::default());
                self.use_again(writer);
            }
        });
    }

    /// Keeps what was counted in windows that were given back.
    pub(super) fn keep_counts_of_left(&self, left: &[LeftWindows]) {
        let mut leftovers = self.leftovers.lock().unwrap_or_else(|e| e.into_inner());
        for LeftWindows {
            key_id,
            environment,
            place,
        } in left
        {
            self.drain_windows_of(key_id, environment, place.windows(), &mut |permits| {
                leftovers.permits.push(permits);
            });
        }
    }

    /// Keeps what a key has counted, because it is being forgotten.
    pub(super) fn keep_counts_of(&self, owner: SlotId, slot: &Slot) {
        let mut kept = Leftovers::default();
        self.with_windows(owner, |windows| {
            self.drain_key(
                owner,
                slot,
                windows,
                &mut |permits| kept.permits.push(permits),
                &mut |secret| kept.secrets.push(secret),
            );
        });
        let mut leftovers = self.leftovers.lock().unwrap_or_else(|e| e.into_inner());
        leftovers.permits.append(&mut kept.permits);
        leftovers.secrets.append(&mut kept.secrets);
    }

    fn drain_key(
        &self,
        owner: SlotId,
        slot: &Slot,
        windows: KeyWindows<'_>,
        each: &mut dyn FnMut(PermitUse),
        each_secret: &mut dyn FnMut(SecretUse),
    ) {
        let key_id = self.slots.key_id(owner);
        let environment = self.environment_of(slot);
        self.drain_windows_of(&key_id, &environment, windows, each);
        for (_, secret) in self.secret_slots(owner) {
            let at_s = secret.last_used_s.load(Relaxed);
            if at_s != 0 && secret.holds_secret() {
                let digest = secret.digest().0;
                let digest_prefix = digest.first_chunk().copied().unwrap_or_default();
                each_secret(SecretUse {
                    key_id: key_id.clone(),
                    digest_prefix,
                    at_s,
                });
            }
        }
    }

    fn drain_windows_of(
        &self,
        key_id: &KeyId,
        environment: &Arc<str>,
        windows: KeyWindows<'_>,
        each: &mut dyn FnMut(PermitUse),
    ) {
        windows.drain(|tier, permits, limited| {
            each(PermitUse {
                key_id: key_id.clone(),
                tier: self.names.tiers.name(tier),
                environment: environment.clone(),
                permits,
                limited,
            });
        });
    }

    fn environment_of(&self, slot: &Slot) -> Arc<str> {
        let in_force = self.in_force.load();
        let rights = in_force.facts.terms.brief(slot.terms()).rights;
        self.names.environments.name(rights.environment_id)
    }
}
