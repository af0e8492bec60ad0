//! The decision: may this request pass?
//!
//! Synchronous, no I/O, no allocation once a key has been seen in a tier, no lock, no HTTP server. [`Gate::check`] is
//! section 2 of the contract in one function. Read on in this order: `credential`, `key`, `snapshot` (with `pages`,
//! `slots`, `places` and `terms`), `route`, `scope`, `limit`, `window`, `quota` (with `reach`), `verdict`;
//! then what happens off the request path: `policy`, `update` and `resync` (with `writer`, `parts` and `retired`), `usage`.

pub mod credential;
pub mod key;
pub mod limit;
mod pages;
mod parts;
mod places;
mod policy;
mod quota;
mod reach;
pub mod reservation;
mod resync;
mod retired;
mod route;
mod scope;
mod shared;
mod slots;
mod snapshot;
mod sync;
mod terms;
mod throttle;
mod update;
mod usage;
mod verdict;
pub mod window;
mod writer;

pub use policy::{
    AccessSettings, DEFAULT_TIER, EnvironmentSettings, FailedAttemptsSettings, PlanSettings, RouteSettings, Settings,
    SettingsError,
};
pub use resync::Resync;
pub use route::{Access, Pattern, PublicLimit, RequiredScope, Route, Tier};
pub use update::{KeyError, KeyUpdate, SecretUpdate};
pub use usage::{PermitUse, RefusalUse, SecretUse, WindowState};
pub use verdict::{Holder, IdentityHeaders, Permit, PermitTicket, REASON_CODES, RateStatus, Reason, Refusal, Wanted};

use crate::clock::Now;
use arc_swap::{ArcSwap, Guard};
use credential::NoCredential;
use http::{HeaderMap, Method};
use key::{KeyForms, SecretDigest, ShortId};
use limit::Limit;
use pages::{Found, Hint};
use places::Places;
use policy::{NameTables, Policy};
use quota::{InFlight, KeyWindows, Outcome};
use reservation::Reservation;
use retired::{Retired, Unused};
use slots::{Mark, Slot, SlotId, Slots};
use snapshot::{Facts, InForce};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use terms::{Brief, Known, NO_TERMS, TermsId};
use throttle::{AddressWindows, FailedAttempts};
use usage::{Leftovers, RefusalCounts};
use verdict::Counted;
use writer::Writer;

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
    in_force: ArcSwap<InForce>,
    stale: AtomicBool,
    /// Limits of keys are shared with other gates.
    shares_limits: bool,
    slots: Slots,
    names: NameTables,
    /// Absent while a resync has it.
    writer: Mutex<Option<Box<Writer>>>,
    /// What was in force and is still being looked at. Locked for a moment by whoever puts something else in force.
    retired: Mutex<Retired>,
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
            in_force: ArcSwap::from_pointee(InForce {
                facts: Arc::new(Facts {
                    policy: Arc::new(Policy::compile(settings, &names)?),
                    terms: Known::default(),
                }),
                snapshot: None,
                places: Places::default(),
            }),
            stale: AtomicBool::new(false),
            shares_limits: false,
            slots: Slots::new(),
            names,
            writer: Mutex::new(Some(Box::new(Writer::new()))),
            retired: Mutex::default(),
            reclaiming: Mutex::new(()),
            attempts: FailedAttempts::new(),
            addresses: AddressWindows::new(),
            refusals: RefusalCounts::default(),
            leftovers: Mutex::default(),
        })
    }

    /// The gate, its keys' limits shared with other gates: it gives only what was reserved ([`reservation`]), and says with
    /// permits and refusals when more is wanted.
    pub fn sharing_limits(self) -> Self {
        Gate {
            shares_limits: true,
            ..self
        }
    }

    /// Puts other settings in force. Limits apply at once to what is counted already.
    ///
    /// # Errors
    /// [`SettingsError`]; the old settings then stay in force.
    pub fn reload(&self, settings: Settings) -> Result<(), SettingsError> {
        let policy = Arc::new(Policy::compile(settings, &self.names)?);
        let change = |in_force: &mut InForce| {
            let terms = in_force.facts.terms.clone();
            in_force.facts = Arc::new(Facts { policy, terms });
        };
        self.put_in_force(change, Unused::default());
        Ok(())
    }

    /// Says that the keys in memory are too old to be trusted (or no longer so): well-formed keys are then answered
    /// [`Reason::NotReady`].
    pub fn set_stale(&self, stale: bool) {
        self.stale.store(stale, Relaxed);
    }

    /// Whether requests with keys can be decided.
    pub fn is_ready(&self) -> bool {
        self.in_force.load().snapshot.is_some() && !self.stale.load(Relaxed)
    }

    /// Whether this secret is in the snapshot in force, whatever state its key is in.
    pub fn has_secret(&self, secret: &[u8]) -> bool {
        let in_force = self.in_force.load();
        let snapshot = in_force.snapshot.as_ref();
        snapshot.is_some_and(|keys| keys.find(&self.slots, &SecretDigest::of(secret)).is_some())
    }

    /// Whether a permit that was given earlier would still be given but for its limits: for connections that outlive
    /// their request. A public rule's always would.
    pub fn still_permits(&self, permit: &PermitTicket, now: Now) -> bool {
        let Some(secret) = &permit.0 else { return true };
        loop {
            let in_force = self.in_force.load();
            let snapshot = in_force.snapshot.as_ref();
            let Some(Found { slot, .. }) = snapshot.and_then(|keys| keys.find(&self.slots, secret)) else {
                return false;
            };
            match in_force.facts.terms.get(slot.terms()) {
                Some(terms) => return slot.holds(secret) && terms.state(now).is_none(),
                None if self.is_in_force(&in_force) => return false,
                None => {}
            }
        }
    }

    /// Whether an `Authorization` value carries what could be one of our keys.
    pub fn is_bearer_key(&self, authorization: &[u8]) -> bool {
        credential::bearer_token(authorization)
            .is_some_and(|token| self.in_force.load().facts.policy.forms.admits(token))
    }

    /// Whether two paths fall under the same rule, for a path that servers read in two ways.
    pub fn is_same_rule(&self, host: &str, method: &Method, path: &str, other: &str) -> bool {
        let in_force = self.in_force.load();
        let policy = &*in_force.facts.policy;
        let rule = |path| policy.routes.find(host, path, method).unwrap_or(&policy.fallback);
        Arc::ptr_eq(rule(path), rule(other))
    }

    /// Decides. The first step that fails answers; a refused request spends nothing.
    ///
    /// # Errors
    /// A [`Refusal`], with what the client needs to act on it.
    pub fn check(&self, request: &RequestHead<'_>, now: Now) -> Result<Permit, Refusal> {
        let in_force = self.in_force.load();
        let facts = &in_force.facts;
        let policy = &*facts.policy;
        // Before the rule, though a public one has no use for it: a digest is one long chain of dependent steps, beside which
        // the processor finds the rule in no time of its own.
        let credential = Credential::of(request.headers, &policy.forms);
        let route = policy
            .routes
            .find(request.host, request.path, request.method)
            .unwrap_or(&policy.fallback);
        match &route.access {
            Access::Public(limit) => self.check_public(facts, route, limit.as_ref(), request.client, now),
            Access::Keyed {
                scope,
                tier,
                environments,
            } => {
                let rule = Rule {
                    facts,
                    policy,
                    route,
                    scope: scope.as_ref(),
                    tier,
                    environments: environments.as_ref(),
                };
                self.check_keyed(&in_force, &rule, &credential, request, now)
            }
        }
    }

    #[cold]
    #[inline(never)]
    fn check_again(&self, request: &RequestHead<'_>, now: Now) -> Result<Permit, Refusal> {
        self.check(request, now)
    }

    /// Whether nothing else was put in force meanwhile.
    fn is_in_force(&self, held: &Guard<Arc<InForce>>) -> bool {
        Arc::ptr_eq(&self.in_force.load(), held)
    }

    /// Refuses, and counts it. Not for a tier's limit, which is counted with the key's windows.
    fn refuse(&self, refusal: Refusal) -> Result<Permit, Refusal> {
        self.refusals.add(&refusal.reason);
        Err(refusal)
    }

    fn check_public(
        &self,
        facts: &Arc<Facts>,
        route: &Arc<Route>,
        limit: Option<&PublicLimit>,
        client: IpAddr,
        now: Now,
    ) -> Result<Permit, Refusal> {
        let counted = match limit {
            None => None,
            Some(PublicLimit { limit, tier }) => {
                let status = |remaining, reset_s| Counted {
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
                        return self.refuse(Refusal {
                            reason: Reason::RateLimited { retry_after_s },
                            route: Some(route.clone()),
                            holder: None,
                            counted: Some(status(0, reset_s)),
                            wanted: None,
                        });
                    }
                }
            }
        };
        Ok(Permit {
            facts: facts.clone(),
            route: route.id,
            key_id: ShortId::NONE,
            terms: NO_TERMS,
            secret: SecretDigest::NONE,
            counted,
            credential_in_authorization: false,
            _in_flight: None,
            wanted: None,
        })
    }

    #[inline(always)]
    fn check_keyed(
        &self,
        in_force: &Guard<Arc<InForce>>,
        rule: &Rule<'_>,
        credential: &Credential,
        request: &RequestHead<'_>,
        now: Now,
    ) -> Result<Permit, Refusal> {
        let refuse = |reason| self.refuse(rule.refusal(reason));
        let (digest, in_authorization) = match credential {
            Credential::Key {
                digest,
                in_authorization,
            } => (digest, *in_authorization),
            Credential::None(NoCredential::Missing) => return refuse(Reason::MissingKey),
            Credential::None(NoCredential::Conflicting) => return refuse(Reason::ConflictingCredentials),
            Credential::Malformed => {
                return refuse(self.failed_attempt(rule, request.client, Reason::MalformedKey, now));
            }
        };
        let Some(snapshot) = in_force.snapshot.as_ref().filter(|_| !self.stale.load(Relaxed)) else {
            return refuse(Reason::NotReady);
        };
        let unknown = || refuse(self.failed_attempt(rule, request.client, Reason::UnknownKey, now));
        let refuse_for = |key: &Key<'_>, reason| self.refuse(rule.refusal_of(reason, key));
        let Some(Found { id, slot: secret, hint }) = snapshot.find(&self.slots, digest) else {
            return unknown();
        };
        let windows_of = |owner| in_force.places.hinted(owner, hint.place());
        // Asked for while the slot is still on its way from the memory, as if it were the owner slot, which most are.
        let windows = windows_of(id);
        let terms_id = secret.terms();
        // A slot in use has an owner; were it not so, the key could not be vouched for. The second look at the digest is for
        // terms of another secret that came into this slot between the first and the terms.
        let owner_slot = |owner| {
            if owner == id {
                Some(secret)
            } else {
                self.slots.get(owner)
            }
        };
        let key = secret.owner(id).and_then(|owner| Some((owner, owner_slot(owner)?)));
        let (Some((owner, slot)), true) = (key, secret.holds(digest)) else {
            return unknown();
        };
        let windows = if owner == id { windows } else { windows_of(owner) };
        let brief = rule.facts.terms.brief(terms_id);
        let key = Key {
            owner,
            slot,
            terms_id,
            brief,
            secret,
            hint,
            digest,
            in_authorization,
        };
        if now.unix_ms < brief.valid_until_ms {
            return self.check_key(rule, &key, windows, now);
        }
        match rule.facts.terms.get(terms_id) {
            Some(terms) => refuse_for(&key, terms.state(now).unwrap_or(Reason::RevokedKey)),
            // They came after what is held here, unless the secret has gone.
            None if self.is_in_force(in_force) => unknown(),
            None => self.check_again(request, now),
        }
    }

    /// The steps that need the key, of which nothing is wrong in itself: its environment and scopes, its limits.
    #[inline(always)]
    fn check_key(
        &self,
        rule: &Rule<'_>,
        key: &Key<'_>,
        windows: Option<KeyWindows<'_>>,
        now: Now,
    ) -> Result<Permit, Refusal> {
        let rights = key.brief.rights;
        let refuse = |reason| self.refuse(rule.refusal_of(reason, key));
        if rule
            .environments
            .is_some_and(|allowed| !allowed.contains(rights.environment_id))
        {
            return refuse(Reason::EnvironmentNotAllowed);
        }
        let has_scope = |scope: &RequiredScope| rule.facts.terms.has_scope(key.terms_id, rights, scope.id);
        if !rule.scope.is_none_or(has_scope) {
            return refuse(Reason::InsufficientScope);
        }
        let plan = rule.policy.plan(rights.plan);
        let Some(limit) = plan.limit(rule.tier.id) else {
            // Every tier of a compiled policy has a limit in every plan of it.
            return refuse(Reason::NotReady);
        };
        if self.shares_limits {
            return self.take_shared(rule, key, plan, limit, now);
        }
        let at_once = windows.filter(|_| plan.max_in_flight.is_none());
        let taken = at_once.and_then(|windows| windows.take(rule.tier.id, limit, now.elapsed_ns).ok());
        let (outcome, in_flight) = match taken {
            Some(outcome) => (outcome, None),
            None => match self.take_otherwise(rule, key, windows, plan, limit, now) {
                Some(taken) => taken,
                None => return refuse(Reason::TooManyInFlight),
            },
        };
        match outcome {
            Outcome::Taken { taken, newly_active } => {
                self.note_active(key.owner, newly_active);
                let counted = Counted {
                    limit,
                    remaining: taken.remaining,
                    reset_s: taken.reset_s,
                };
                rule.permit(key, counted, in_flight, None, now)
            }
            Outcome::Limited { retry_after_s, reset_s } => {
                self.slots.mark(key.owner, Mark::Permits);
                Err(rule.limited(key, limit, retry_after_s, reset_s))
            }
        }
    }

    fn note_active(&self, owner: SlotId, newly_active: bool) {
        if newly_active {
            self.slots.mark(owner, Mark::Permits);
            self.slots.mark(owner, Mark::Windows);
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

/// What a request shows of whose it is.
enum Credential {
    None(NoCredential),
    /// It cannot be one of ours, and was not hashed.
    Malformed,
    Key {
        digest: SecretDigest,
        in_authorization: bool,
    },
}

impl Credential {
    #[inline(always)]
    fn of(headers: &HeaderMap, forms: &KeyForms) -> Self {
        match credential::find(headers) {
            Ok(presented) if forms.admits(presented.bytes()) => Credential::Key {
                digest: SecretDigest::of(presented.bytes()),
                in_authorization: presented.in_authorization(),
            },
            Ok(_) => Credential::Malformed,
            Err(none) => Credential::None(none),
        }
    }
}

/// The rule that a request falls under, taken apart.
struct Rule<'a> {
    facts: &'a Arc<Facts>,
    policy: &'a Policy,
    route: &'a Arc<Route>,
    scope: Option<&'a RequiredScope>,
    tier: &'a Arc<Tier>,
    environments: Option<&'a scope::NameSet>,
}

/// The key that a request carries.
struct Key<'a> {
    owner: SlotId,
    /// The owner slot.
    slot: &'a Slot,
    /// What is said of the secret that was presented.
    terms_id: TermsId,
    brief: Brief<'a>,
    /// The slot of that secret.
    secret: &'a Slot,
    /// What led to the windows, or did not.
    hint: &'a Hint,
    digest: &'a SecretDigest,
    /// Whether it came in `Authorization`.
    in_authorization: bool,
}

impl Rule<'_> {
    /// Lets the request pass, which is a use of the secret. Made where it is returned: it is too large to be moved about.
    #[inline(always)]
    fn permit(
        &self,
        key: &Key<'_>,
        counted: Counted,
        in_flight: Option<InFlight>,
        wanted: Option<Arc<Reservation>>,
        now: Now,
    ) -> Result<Permit, Refusal> {
        key.secret.last_used_s.store((now.unix_ms / 1000) as u32, Relaxed);
        Ok(Permit {
            facts: self.facts.clone(),
            route: self.route.id,
            key_id: key.slot.short_id(),
            terms: key.terms_id,
            secret: *key.digest,
            counted: Some(counted),
            credential_in_authorization: key.in_authorization,
            _in_flight: in_flight,
            wanted,
        })
    }

    fn limited(&self, key: &Key<'_>, limit: Limit, retry_after_s: u32, reset_s: u32) -> Refusal {
        let mut refusal = self.refusal_of(Reason::RateLimited { retry_after_s }, key);
        refusal.counted = Some(Counted {
            limit,
            remaining: 0,
            reset_s,
        });
        refusal
    }

    fn refusal(&self, reason: Reason) -> Refusal {
        Refusal {
            reason,
            route: Some(self.route.clone()),
            holder: None,
            counted: None,
            wanted: None,
        }
    }

    fn refusal_of(&self, reason: Reason, key: &Key<'_>) -> Refusal {
        Refusal {
            holder: (self.facts.terms.get(key.terms_id)).map(|terms| (key.slot.short_id(), terms.clone())),
            ..self.refusal(reason)
        }
    }
}

#[cfg(test)]
mod tests;
