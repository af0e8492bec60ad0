//! Permits of a limit that is shared with other gates: given from what was reserved (`reservation.rs`), counted as any.

use super::limit::Limit;
use super::policy::Plan;
use super::quota::{KeyWindows, Outcome, SharedOutcome};
use super::reservation::Reservation;
use super::slots::Mark;
use super::verdict::{Counted, Permit, Reason, Refusal, Wanted};
use super::{Gate, Key, Rule};
use crate::clock::Now;

impl Gate {
    /// Counts a refusal that was not the last word when it was made ([`Refusal::wanted`]) and is now.
    pub fn count_refusal(&self, refusal: &Refusal, now: Now) {
        let (Some(wanted), Some(counted), Some(route)) = (&refusal.wanted, &refusal.counted, &refusal.route) else {
            return;
        };
        let Some(tier) = route.tier() else { return };
        let add = |windows: KeyWindows<'_>| windows.add_refusal(tier.id, counted.limit, now.elapsed_ns);
        if self.with_windows(wanted.owner, add).is_some_and(|added| added.is_ok()) {
            self.slots.mark(wanted.owner, Mark::Permits);
        }
    }

    /// [`Gate::take_permit`] where the limit is shared with other gates.
    #[inline(never)]
    pub(super) fn take_shared(
        &self,
        rule: &Rule<'_>,
        key: &Key<'_>,
        plan: &Plan,
        limit: Limit,
        now: Now,
    ) -> Result<Permit, Refusal> {
        let (tier, now_ns) = (rule.tier.id, now.elapsed_ns);
        let limited = |retry_after_s, reset_s| rule.limited(key, limit, retry_after_s, reset_s);
        let make = || Reservation::new(self.slots.key_id(key.owner).as_str(), &rule.tier.name, limit);
        let mut tell = false;
        let (in_flight, reservation, outcome) = self.on_windows(key.owner, tier, limit, now, |windows| {
            let reservation = windows.reservation(tier, limit, make)?;
            let entered = plan.max_in_flight.map(|most| windows.enter(most)).transpose()?;
            if let Some(None) = entered {
                return Ok((None, reservation, None));
            }
            let outcome = windows.take_shared(&reservation, tier, limit, now_ns, &mut tell)?;
            Ok((entered.flatten(), reservation, Some(outcome)))
        });
        let (remaining, reset_s) = match outcome {
            None => return self.refuse(rule.refusal_of(Reason::TooManyInFlight, key)),
            Some(SharedOutcome::Limited { retry_after_s }) => {
                self.slots.mark(key.owner, Mark::Permits);
                return Err(limited(retry_after_s, retry_after_s));
            }
            Some(SharedOutcome::Dry) => {
                let mut refusal = limited(1, reservation.reset_s(now_ns));
                refusal.wanted = Some(Wanted {
                    reservation,
                    tell,
                    owner: key.owner,
                });
                return Err(refusal);
            }
            Some(SharedOutcome::Alone(Outcome::Limited { retry_after_s, reset_s })) => {
                self.slots.mark(key.owner, Mark::Permits);
                return Err(limited(retry_after_s, reset_s));
            }
            Some(SharedOutcome::Alone(Outcome::Taken { taken, newly_active })) => {
                self.note_active(key.owner, newly_active);
                let counted = Counted {
                    limit,
                    remaining: taken.remaining,
                    reset_s: taken.reset_s,
                };
                return rule.permit(key, counted, in_flight, None, now);
            }
            Some(SharedOutcome::Spent { remaining, reset_s }) => (remaining.min(limit.permits()), reset_s),
        };
        // What was spent is recorded, if need be in windows that came after.
        let record = |windows: KeyWindows<'_>| windows.record(tier, limit, now_ns);
        let newly_active = self.on_windows(key.owner, tier, limit, now, record);
        self.note_active(key.owner, newly_active);
        let counted = Counted {
            limit,
            remaining,
            reset_s,
        };
        rule.permit(key, counted, in_flight, tell.then_some(reservation), now)
    }
}
