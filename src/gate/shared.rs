//! Permits of a limit that is shared with other gates: given from what was reserved (`reservation.rs`), counted as any.

use super::limit::Limit;
use super::policy::Plan;
use super::quota::{GivenBack, InFlight, KeyWindows, Outcome, SharedOutcome};
use super::reservation::Reservation;
use super::slots::Mark;
use super::verdict::{Counted, Permit, Reason, Refusal, Wanted};
use super::{Gate, Key, Rule};
use crate::clock::Now;
use arc_swap::Guard;
use std::sync::Arc;

impl Gate {
    /// Counts a refusal that was not the last word when it was made ([`Refusal::wanted`]) and is now.
    pub fn count_refusal(&self, refusal: &Refusal, now: Now) {
        let (Some(wanted), Some(counted), Some(route)) = (&refusal.wanted, &refusal.counted, &refusal.route) else {
            return;
        };
        let Some(tier) = route.tier() else { return };
        let Some(slot) = self.slots.get(wanted.owner) else {
            return;
        };
        let windows = slot.windows.load();
        if let Some(windows) = &*windows
            && windows.add_refusal(tier.id, counted.limit, now.elapsed_ns).is_ok()
        {
            self.slots.mark(wanted.owner, Mark::Permits);
        }
    }

    /// [`Gate::take_permit`] where the limit is shared with other gates.
    #[inline(never)]
    pub(super) fn take_shared(
        &self,
        rule: &Rule<'_>,
        key: &Key<'_>,
        mut loaded: Guard<Option<Arc<KeyWindows>>>,
        plan: &Plan,
        limit: Limit,
        now: Now,
    ) -> Result<Permit, Refusal> {
        let (tier, now_ns) = (rule.tier.id, now.elapsed_ns);
        let limited = |retry_after_s, reset_s| rule.limited(key, limit, retry_after_s, reset_s);
        let mut spent = None;
        loop {
            let made;
            let windows = match &*loaded {
                Some(windows) => windows,
                None => {
                    made = self.windows_of(key, tier, limit, now);
                    &made
                }
            };
            if spent.is_none() {
                let make = || Reservation::new(self.slots.key_id(key.owner).as_str(), &rule.tier.name, limit);
                let reservation = match windows.reservation(tier, limit, make) {
                    Ok(reservation) => reservation,
                    Err(GivenBack) => {
                        loaded = self.without(key.slot, &loaded);
                        continue;
                    }
                };
                let entered = plan.max_in_flight.map(|cap| windows.enter(cap));
                if entered == Some(false) {
                    return self.refuse(rule.refusal_of(Reason::TooManyInFlight, key));
                }
                let in_flight = entered.map(|_| InFlight::entered(windows.clone()));
                let mut tell = false;
                match windows.take_shared(&reservation, tier, limit, now_ns, &mut tell) {
                    Err(GivenBack) => {
                        loaded = self.without(key.slot, &loaded);
                        continue;
                    }
                    Ok(SharedOutcome::Limited { retry_after_s }) => {
                        self.slots.mark(key.owner, Mark::Permits);
                        return Err(limited(retry_after_s, retry_after_s));
                    }
                    Ok(SharedOutcome::Dry) => {
                        let mut refusal = limited(1, reservation.reset_s(now_ns));
                        refusal.wanted = Some(Wanted {
                            reservation,
                            tell,
                            owner: key.owner,
                        });
                        return Err(refusal);
                    }
                    Ok(SharedOutcome::Alone(Outcome::Limited { retry_after_s, reset_s })) => {
                        self.slots.mark(key.owner, Mark::Permits);
                        return Err(limited(retry_after_s, reset_s));
                    }
                    Ok(SharedOutcome::Alone(Outcome::Taken { taken, newly_active })) => {
                        self.note_active(key.owner, newly_active);
                        let counted = Counted {
                            limit,
                            remaining: taken.remaining,
                            reset_s: taken.reset_s,
                        };
                        return rule.permit(key, counted, in_flight, None, now);
                    }
                    Ok(SharedOutcome::Spent { remaining, reset_s }) => {
                        let counted = Counted {
                            limit,
                            remaining: remaining.min(limit.permits()),
                            reset_s,
                        };
                        spent = Some(rule.permit(key, counted, in_flight, tell.then_some(reservation), now));
                    }
                }
            }
            // What was spent is recorded, if need be in windows that came after.
            match windows.record(tier, limit, now_ns) {
                Err(GivenBack) => loaded = self.without(key.slot, &loaded),
                Ok(newly_active) => {
                    self.note_active(key.owner, newly_active);
                    if let Some(permit) = spent.take() {
                        return permit;
                    }
                }
            }
        }
    }
}
