//! The way to a key's windows where no hint led to them, and their beginning where there are none.

use super::limit::Limit;
use super::places::{NO_PLACE, PlaceId};
use super::policy::Plan;
use super::quota::{GivenBack, InFlight, KeyWindows, Outcome};
use super::retired::Unused;
use super::scope::NameId;
use super::slots::{Mark, SlotId};
use super::snapshot::InForce;
use super::{Gate, Key, Rule};
use crate::clock::Now;

impl Gate {
    /// Takes a permit where the windows could not be had at once, where they have to be begun or replaced, or where requests
    /// under way count. `None`: there are too many of those.
    #[inline(never)]
    pub(super) fn take_otherwise(
        &self,
        rule: &Rule<'_>,
        key: &Key<'_>,
        windows: Option<KeyWindows<'_>>,
        plan: &Plan,
        limit: Limit,
        now: Now,
    ) -> Option<(Outcome, Option<InFlight>)> {
        let (tier, now_ns) = (rule.tier.id, now.elapsed_ns);
        let take = |windows: KeyWindows<'_>| {
            // The place under the cap is reserved before the permit is taken, because a permit cannot be given back.
            let entered = plan.max_in_flight.map(|most| windows.enter(most)).transpose()?;
            if let Some(None) = entered {
                return Ok(windows.peek(tier, limit, now_ns)?.map(|refused| (refused, None)));
            }
            Ok(Some((windows.take(tier, limit, now_ns)?, entered.flatten())))
        };
        let taken = windows.map(take).and_then(Result::ok);
        taken.unwrap_or_else(|| self.on_windows_of(key, tier, limit, now, take))
    }

    /// [`Gate::on_windows`] of a key to which no hint led; now one does.
    #[cold]
    #[inline(never)]
    fn on_windows_of<R>(
        &self,
        key: &Key<'_>,
        tier: NameId,
        limit: Limit,
        now: Now,
        act: impl FnMut(KeyWindows<'_>) -> Result<R, GivenBack>,
    ) -> R {
        let done = self.on_windows(key.owner, tier, limit, now, act);
        key.hint.correct(self.slots.place(key.owner));
        done
    }

    /// Runs `act` on the windows of the key in slot `owner`, begun if there are none; again where they were given back.
    pub(super) fn on_windows<R>(
        &self,
        owner: SlotId,
        tier: NameId,
        limit: Limit,
        now: Now,
        mut act: impl FnMut(KeyWindows<'_>) -> Result<R, GivenBack>,
    ) -> R {
        loop {
            let done = self.with_place(owner, |in_force, place| match in_force.places.at(owner, place) {
                Some(windows) => match act(windows) {
                    Ok(done) => Some(done),
                    Err(GivenBack) => {
                        // Whoever gave them back does so, too; nobody waits for it.
                        let _ = self.slots.set_place(owner, place, NO_PLACE);
                        None
                    }
                },
                None => {
                    self.begin_windows(in_force, owner, tier, limit, now);
                    None
                }
            });
            if let Some(done) = done {
                return done;
            }
        }
    }

    /// Runs `act` on the place of a key's windows, or [`NO_PLACE`], and on what was in force when the key had it.
    pub(super) fn with_place<R>(&self, owner: SlotId, act: impl FnOnce(&InForce, PlaceId) -> R) -> R {
        loop {
            let in_force = self.in_force.load();
            let place = self.slots.place(owner);
            if self.is_in_force(&in_force) {
                return act(&in_force, place);
            }
        }
    }

    /// Begins windows of a key that has none, unless somebody else does, or room has to be made first.
    fn begin_windows(&self, in_force: &InForce, owner: SlotId, tier: NameId, limit: Limit, now: Now) {
        let Some((place, windows)) = in_force.places.claim(owner, tier, limit, now.elapsed_ns) else {
            let make_room = |in_force: &mut InForce| in_force.places = in_force.places.with_room(owner, limit);
            return self.put_in_force(make_room, Unused::default());
        };
        match self.slots.set_place(owner, NO_PLACE, place) {
            Ok(()) => {
                windows.set_owner(owner);
                self.slots.mark(owner, Mark::Live);
            }
            Err(_) => in_force.places.free(owner, place),
        }
    }

    /// Runs `act` on the windows of the key in slot `owner`, if it has any.
    pub(super) fn with_windows<R>(&self, owner: SlotId, act: impl FnOnce(KeyWindows<'_>) -> R) -> Option<R> {
        self.with_place(owner, |in_force, place| in_force.places.at(owner, place).map(act))
    }
}
