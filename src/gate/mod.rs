//! The decision: may this request pass?
//!
//! Synchronous, no I/O, no allocation once a key has been seen in a tier, no HTTP server. [`Gate::check`] is section 2
//! of the contract in one function. Read on in this order: `credential`, `key`, `snapshot` (with `slots`), `route`,
//! `scope`, `limit`, `window`, `quota`, `verdict`; then what happens off the request path: `policy`, `update`, `usage`.

pub mod credential;
pub mod key;
pub mod limit;
mod policy;
mod quota;
mod route;
mod scope;
mod slots;
mod snapshot;
mod sync;
mod throttle;
mod update;
mod usage;
mod verdict;
pub mod window;

pub use policy::{
    AccessSettings, DEFAULT_TIER, EnvironmentSettings, FailedAttemptsSettings, PlanSettings, RouteSettings, Settings,
    SettingsError,
};
pub use route::{Access, Pattern, PublicLimit, RequiredScope, Route, Tier};
pub use snapshot::{KeyError, KeyUpdate, SecretUpdate};
pub use update::Resync;
pub use usage::{PermitUse, RefusalUse, SecretUse, WindowState};
pub use verdict::{Holder, IdentityHeaders, Permit, PermitTicket, REASON_CODES, RateStatus, Reason, Refusal};

use crate::clock::Now;
use arc_swap::{ArcSwap, ArcSwapOption};
use credential::NoCredential;
use http::{HeaderMap, Method};
use key::SecretDigest;
use limit::Limit;
use policy::{NameTables, Plan, Policy};
use quota::{GivenBack, InFlight, KeyWindows, Outcome};
use scope::NameId;
use slots::{Mark, Slot, SlotId, Slots};
use snapshot::{Snapshot, Terms, Writer};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use throttle::{AddressWindows, FailedAttempts};
use usage::{Leftovers, RefusalCounts};

/// What the decision looks at: the head of a request that was found unambiguous.
#[derive(Clone, Copy, Debug)]
pub struct RequestHead<'a> {
    /// The method.
    pub method: &'a Method,
    /// The host asked for, with or without a port; empty where there is none.
    pub host: &'a str,
    /// The path, canonical, without the query: what is matched is what is forwarded.
    pub path: &'a str,
    /// The header fields.
    pub headers: &'a HeaderMap,
    /// Who asks: the peer, or whom a trusted proxy names.
    pub client: IpAddr,
}

/// Decides for each request whether it may pass.
#[derive(Debug)]
pub struct Gate {
    policy: ArcSwap<Policy>,
    snapshot: ArcSwapOption<Snapshot>,
    stale: AtomicBool,
    slots: Slots,
    names: NameTables,
    /// Absent while a resync has it.
    writer: Mutex<Option<Box<Writer>>>,
    /// Held while slots are given back, and while counts are read from them. Taken after the writer's lock, and not for
    /// as long as a resync is being built: counts must not wait for a slow snapshot.
    reclaiming: Mutex<()>,
    attempts: FailedAttempts,
    addresses: AddressWindows,
    refusals: RefusalCounts,
    leftovers: Mutex<Leftovers>,
}

impl Gate {
    /// A gate without keys: it is not ready until a first snapshot is committed.
    ///
    /// # Errors
    /// [`SettingsError`] where the settings contradict themselves.
    pub fn new(settings: Settings) -> Result<Self, SettingsError> {
        let names = NameTables::default();
        Ok(Gate {
            policy: ArcSwap::from_pointee(Policy::compile(settings, &names)?),
            snapshot: ArcSwapOption::empty(),
            stale: AtomicBool::new(false),
            slots: Slots::new(),
            names,
            writer: Mutex::new(Some(Box::new(Writer::new()))),
            reclaiming: Mutex::new(()),
            attempts: FailedAttempts::new(),
            addresses: AddressWindows::new(),
            refusals: RefusalCounts::default(),
            leftovers: Mutex::default(),
        })
    }

    /// Puts other settings in force. Limits apply at once to what is counted already.
    ///
    /// # Errors
    /// [`SettingsError`]; the old settings then stay in force.
    pub fn reload(&self, settings: Settings) -> Result<(), SettingsError> {
        self.policy.store(Arc::new(Policy::compile(settings, &self.names)?));
        Ok(())
    }

    /// Says that the keys in memory are too old to be trusted (or no longer so): well-formed keys are then answered
    /// [`Reason::NotReady`].
    pub fn set_stale(&self, stale: bool) {
        self.stale.store(stale, Relaxed);
    }

    /// Whether requests with keys can be decided.
    pub fn is_ready(&self) -> bool {
        self.snapshot.load().is_some() && !self.stale.load(Relaxed)
    }

    /// Whether this secret is in the snapshot in force, whatever state its key is in.
    pub fn has_secret(&self, secret: &[u8]) -> bool {
        let snapshot = self.snapshot.load();
        snapshot
            .as_ref()
            .is_some_and(|keys| keys.with(&self.slots, &SecretDigest::of(secret), |_, _| ()).is_some())
    }

    /// Whether a permit that was given earlier would still be given but for its limits: for connections that outlive
    /// their request. A public rule's always would.
    pub fn still_permits(&self, permit: &PermitTicket, now: Now) -> bool {
        let Some(secret) = &permit.0 else { return true };
        let snapshot = self.snapshot.load();
        let holds = |_: SlotId, slot: &Slot| {
            let terms = slot.terms.load();
            terms.as_ref().is_some_and(|terms| {
                let ends_ms = terms.not_after_ms.min(terms.expires_at_ms);
                !terms.revoked && !terms.disabled && now.unix_ms < ends_ms
            })
        };
        snapshot
            .as_ref()
            .and_then(|keys| keys.with(&self.slots, secret, holds))
            .unwrap_or(false)
    }

    /// Whether an `Authorization` value carries what could be one of our keys.
    pub fn is_bearer_key(&self, authorization: &[u8]) -> bool {
        credential::bearer_token(authorization).is_some_and(|token| self.policy.load().forms.admits(token))
    }

    /// Decides. The first step that fails answers; a refused request spends nothing.
    ///
    /// # Errors
    /// A [`Refusal`], with what the client needs to act on it.
    pub fn check(&self, request: &RequestHead<'_>, now: Now) -> Result<Permit, Refusal> {
        let policy = self.policy.load();
        let route = policy
            .routes
            .find(request.host, request.path, request.method)
            .unwrap_or(&policy.fallback);
        let decided = match &route.access {
            Access::Public(limit) => self.check_public(route, limit.as_ref(), request.client, now),
            Access::Keyed {
                scope,
                tier,
                environments,
            } => {
                let rule = Rule {
                    policy: &policy,
                    route,
                    scope: scope.as_ref(),
                    tier,
                    environments: environments.as_ref(),
                };
                self.check_keyed(&rule, request, now)
            }
        };
        decided.inspect_err(|refusal| {
            // A tier's limit is counted with the key's windows.
            if !matches!(refusal.reason, Reason::RateLimited { .. }) || refusal.holder.is_none() {
                self.refusals.add(&refusal.reason);
            }
        })
    }

    fn check_public(
        &self,
        route: &Arc<Route>,
        limit: Option<&PublicLimit>,
        client: IpAddr,
        now: Now,
    ) -> Result<Permit, Refusal> {
        let rate = match limit {
            None => None,
            Some(PublicLimit { limit, tier }) => {
                let status = |remaining, reset_s| RateStatus {
                    tier: tier.clone(),
                    limit: *limit,
                    remaining,
                    reset_s,
                };
                match self.addresses.take(tier.id, client, *limit, now) {
                    Ok(taken) => Some(status(taken.remaining, taken.reset_s)),
                    Err(refused) => {
                        let (retry_after_s, reset_s) = match refused {
                            window::Refused::Limited { retry_after_s, reset_s } => (retry_after_s, reset_s),
                            _ => (limit.window_s(), limit.window_s()),
                        };
                        return Err(Refusal {
                            reason: Reason::RateLimited { retry_after_s },
                            route: Some(route.clone()),
                            holder: None,
                            rate: Some(status(0, reset_s)),
                        });
                    }
                }
            }
        };
        Ok(Permit {
            route: route.clone(),
            holder: None,
            rate,
            credential_in_authorization: false,
            sandbox: false,
            secret: None,
            _in_flight: None,
        })
    }

    fn check_keyed(&self, rule: &Rule<'_>, request: &RequestHead<'_>, now: Now) -> Result<Permit, Refusal> {
        let presented = credential::find(request.headers).map_err(|none| {
            rule.refusal(match none {
                NoCredential::Missing => Reason::MissingKey,
                NoCredential::Conflicting => Reason::ConflictingCredentials,
            })
        })?;
        if !rule.policy.forms.admits(presented.bytes()) {
            return Err(rule.refusal(self.failed_attempt(rule, request.client, Reason::MalformedKey, now)));
        }
        let digest = SecretDigest::of(presented.bytes());
        let snapshot = self.snapshot.load();
        let Some(snapshot) = snapshot.as_ref().filter(|_| !self.stale.load(Relaxed)) else {
            return Err(rule.refusal(Reason::NotReady));
        };
        let decided = snapshot.with(&self.slots, &digest, |_, secret| {
            let terms = secret.terms.load();
            let owner = secret.owner.load(Relaxed);
            let (Some(terms), Some(key)) = (&*terms, self.slots.get(owner)) else {
                // A linked slot has terms and an owner; were it not so, the key could not be vouched for.
                return Err(rule.refusal(Reason::UnknownKey));
            };
            let mut permit = self.check_key(rule, owner, key, terms, now)?;
            secret.last_used_s.store((now.unix_ms / 1000) as u32, Relaxed);
            permit.credential_in_authorization = presented.in_authorization();
            permit.secret = Some(digest);
            Ok(permit)
        });
        match decided {
            Some(decided) => decided,
            None => Err(rule.refusal(self.failed_attempt(rule, request.client, Reason::UnknownKey, now))),
        }
    }

    /// The steps that need the key: its state, its environment and scopes, its limits.
    #[inline]
    fn check_key(
        &self,
        rule: &Rule<'_>,
        owner: SlotId,
        key: &Slot,
        terms: &Arc<Terms>,
        now: Now,
    ) -> Result<Permit, Refusal> {
        let refuse = |reason| Err(rule.refusal_of(reason, key, terms));
        if terms.revoked || now.unix_ms >= terms.not_after_ms {
            return refuse(Reason::RevokedKey);
        }
        if now.unix_ms >= terms.expires_at_ms {
            return refuse(Reason::ExpiredKey);
        }
        if terms.disabled {
            return refuse(Reason::DisabledKey);
        }
        if rule
            .environments
            .is_some_and(|allowed| !allowed.contains(terms.environment_id))
        {
            return refuse(Reason::EnvironmentNotAllowed);
        }
        if rule.scope.is_some_and(|scope| !terms.scopes.contains(scope.id)) {
            return refuse(Reason::InsufficientScope);
        }
        let plan = rule.policy.plan(terms.plan);
        let Some(limit) = plan.limit(rule.tier.id) else {
            // Every tier of a compiled policy has a limit in every plan of it.
            return refuse(Reason::NotReady);
        };
        let (rate, in_flight) = self.take_permit(rule, owner, key, terms, plan, limit, now)?;
        Ok(Permit {
            route: rule.route.clone(),
            holder: Some(Holder {
                id: key.key_id(),
                terms: terms.clone(),
            }),
            rate: Some(rate),
            credential_in_authorization: false,
            sandbox: rule.policy.sandboxes.contains(terms.environment_id),
            secret: None,
            _in_flight: in_flight,
        })
    }

    #[allow(
        clippy::too_many_arguments,
        reason = "the parts of one decision, each read once by the caller"
    )]
    fn take_permit(
        &self,
        rule: &Rule<'_>,
        owner: SlotId,
        key: &Slot,
        terms: &Arc<Terms>,
        plan: &Plan,
        limit: Limit,
        now: Now,
    ) -> Result<(RateStatus, Option<InFlight>), Refusal> {
        let tier = rule.tier.id;
        let status = |remaining, reset_s| RateStatus {
            tier: rule.tier.clone(),
            limit,
            remaining,
            reset_s,
        };
        let limited = |retry_after_s, reset_s| {
            let mut refusal = rule.refusal_of(Reason::RateLimited { retry_after_s }, key, terms);
            refusal.rate = Some(status(0, reset_s));
            refusal
        };
        loop {
            let loaded = key.windows.load();
            let made;
            let windows = match &*loaded {
                Some(windows) => windows,
                None => {
                    made = self.windows_of(owner, key, tier, limit, now);
                    &made
                }
            };
            // The place under the cap is reserved before the permit is taken, because a permit cannot be given back.
            let entered = plan.max_in_flight.map(|cap| windows.enter(cap));
            if entered == Some(false) {
                return match windows.peek(tier, limit, now.elapsed_ns) {
                    Err(GivenBack) => {
                        key.windows.compare_and_swap(&loaded, None);
                        continue;
                    }
                    Ok(Some(Outcome::Limited { retry_after_s, reset_s })) => Err(limited(retry_after_s, reset_s)),
                    Ok(_) => Err(rule.refusal_of(Reason::TooManyInFlight, key, terms)),
                };
            }
            let in_flight = entered.map(|_| InFlight::entered(windows.clone()));
            match windows.take(tier, limit, now.elapsed_ns) {
                Err(GivenBack) => {
                    // Whoever gives windows back takes them out of the slot next; nobody waits for it.
                    key.windows.compare_and_swap(&loaded, None);
                }
                Ok(Outcome::Limited { retry_after_s, reset_s }) => {
                    self.slots.mark(owner, Mark::Permits);
                    return Err(limited(retry_after_s, reset_s));
                }
                Ok(Outcome::Taken { taken, newly_active }) => {
                    if newly_active {
                        self.slots.mark(owner, Mark::Permits);
                        self.slots.mark(owner, Mark::Windows);
                    }
                    return Ok((status(taken.remaining, taken.reset_s), in_flight));
                }
            }
        }
    }

    /// The windows of a key, made if it has none. Given-back ones are taken out first.
    #[cold]
    fn windows_of(&self, owner: SlotId, key: &Slot, tier: NameId, limit: Limit, now: Now) -> Arc<KeyWindows> {
        let made = Arc::new(KeyWindows::new(tier, limit, now.elapsed_ns));
        let before = key
            .windows
            .compare_and_swap(&None::<Arc<KeyWindows>>, Some(made.clone()));
        match &*before {
            Some(windows) => windows.clone(),
            None => {
                self.slots.mark(owner, Mark::Live);
                made
            }
        }
    }

    /// Counts a failed attempt; what it answers if there were too many.
    fn failed_attempt(&self, rule: &Rule<'_>, client: IpAddr, reason: Reason, now: Now) -> Reason {
        match self.attempts.record(client, &rule.policy.failed_attempts, now) {
            Some(retry_after_s) => Reason::TooManyFailedAttempts { retry_after_s },
            None => reason,
        }
    }
}

/// The rule that a request falls under, taken apart.
struct Rule<'a> {
    policy: &'a Policy,
    route: &'a Arc<Route>,
    scope: Option<&'a RequiredScope>,
    tier: &'a Arc<Tier>,
    environments: Option<&'a scope::NameSet>,
}

impl Rule<'_> {
    fn refusal(&self, reason: Reason) -> Refusal {
        Refusal {
            reason,
            route: Some(self.route.clone()),
            holder: None,
            rate: None,
        }
    }

    fn refusal_of(&self, reason: Reason, key: &Slot, terms: &Arc<Terms>) -> Refusal {
        Refusal {
            holder: Some(Holder {
                id: key.key_id(),
                terms: terms.clone(),
            }),
            ..self.refusal(reason)
        }
    }
}

#[cfg(test)]
mod tests;
