//! What the gate's decision returns: a permit, which only the gate can make, or a refusal, which is data.
//!
//! Nothing here knows a status code; `proxy/response.rs` is the one place that turns a refusal into HTTP.

use super::key::{SecretDigest, ShortId};
use super::limit::Limit;
use super::quota::InFlight;
use super::reservation::Reservation;
use super::route::{Route, RouteId, Tier};
use super::slots::SlotId;
use super::snapshot::Facts;
use super::terms::{Terms, TermsId};
use http::HeaderValue;
use std::sync::Arc;

/// Proof that a request may pass. Only [`super::Gate::check`] makes one; dropping it ends the request's place
/// under the concurrency cap, so it lives as long as the request.
#[derive(Debug)]
#[must_use = "a permit that is dropped at once frees its place under the concurrency cap"]
pub struct Permit {
    /// What it was decided by: the one count of references that a permit takes part in.
    pub(super) facts: Arc<Facts>,
    pub(super) route: RouteId,
    /// Empty on a public rule, as the next two.
    pub(super) key_id: ShortId,
    pub(super) terms: TermsId,
    pub(super) secret: SecretDigest,
    pub(super) counted: Option<Counted>,
    pub(super) credential_in_authorization: bool,
    pub(super) _in_flight: Option<InFlight>,
    pub(super) wanted: Option<Arc<Reservation>>,
}

impl Permit {
    /// The rule that the request falls under.
    pub fn route(&self) -> &Arc<Route> {
        self.facts.policy.route(self.route)
    }

    /// Whose request it is; nobody's on a public rule.
    pub fn holder(&self) -> Option<Holder<'_>> {
        let terms = self.facts.terms.get(self.terms)?;
        Some(Holder {
            id: &self.key_id,
            terms,
        })
    }

    /// What is left of the limit, where one was counted.
    pub fn rate(&self) -> Option<RateStatus<'_>> {
        status(Some(self.route()), self.counted)
    }

    /// Whether the `Authorization` header carried the key, and so must not travel upstream. On a public rule no
    /// credential was looked at, and none is taken for one.
    pub fn credential_in_authorization(&self) -> bool {
        self.credential_in_authorization
    }

    /// The reservation of a limit shared with other gates that has run low: more is to be asked for.
    pub fn wanted(&self) -> Option<&Arc<Reservation>> {
        self.wanted.as_ref()
    }

    /// What to ask [`super::Gate::still_permits`] with, for as long as the connection lasts.
    pub fn ticket(&self) -> PermitTicket {
        PermitTicket((self.secret != SecretDigest::NONE).then_some(self.secret))
    }

    /// The upstream that the request goes to: the rule's sandbox one for keys of environments that are not billed.
    pub fn upstream(&self) -> &str {
        let route = self.route();
        let is_sandbox = |holder: Holder<'_>| {
            self.facts
                .policy
                .sandboxes
                .contains(holder.terms.role.rights.environment_id)
        };
        match &route.sandbox_upstream {
            Some(sandbox) if self.holder().is_some_and(is_sandbox) => sandbox,
            _ => &route.upstream,
        }
    }
}

/// Stands for a permit after its request. Holds a digest, not the secret.
#[derive(Clone, Copy, Debug)]
pub struct PermitTicket(pub(super) Option<SecretDigest>);

/// Whose request it is: what upstreams are told and logs may say. Never the secret.
#[derive(Clone, Copy, Debug)]
pub struct Holder<'a> {
    /// Unless the terms have a longer one.
    pub(super) id: &'a ShortId,
    pub(super) terms: &'a Terms,
}

impl<'a> Holder<'a> {
    /// The id of the key.
    pub fn key_id(self) -> &'a str {
        self.terms.long_id.as_deref().unwrap_or_else(|| self.id.as_str())
    }

    /// The organisation that owns it.
    pub fn organization(self) -> &'a str {
        self.terms.organization()
    }

    /// The key's environment.
    pub fn environment(self) -> &'a str {
        self.terms.environment()
    }

    /// The organisation, environment and scopes (separated by spaces) as header values, built once for all
    /// keys that share them.
    pub fn headers(self) -> IdentityHeaders<'a> {
        IdentityHeaders {
            organization: &self.terms.organization,
            environment: &self.terms.role.environment,
            scopes: &self.terms.role.scopes,
        }
    }
}

/// Header values that say whose request it is.
#[derive(Clone, Copy, Debug)]
pub struct IdentityHeaders<'a> {
    /// The organisation's id.
    pub organization: &'a HeaderValue,
    /// The environment's name.
    pub environment: &'a HeaderValue,
    /// The key's scopes, separated by spaces.
    pub scopes: &'a HeaderValue,
}

/// What is left of a limit: the numbers of the `RateLimit` and `RateLimit-Policy` fields
/// (draft-ietf-httpapi-ratelimit-headers-10).
#[derive(Clone, Copy, Debug)]
pub struct RateStatus<'a> {
    /// The tier, which names the policy.
    pub tier: &'a Tier,
    /// The limit.
    pub limit: Limit,
    /// Permits left now (`r`).
    pub remaining: u32,
    /// Whole seconds until the oldest counted permit leaves the window (`t`).
    pub reset_s: u32,
}

/// A [`RateStatus`] without the tier, which the route has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Counted {
    pub limit: Limit,
    pub remaining: u32,
    pub reset_s: u32,
}

fn status(route: Option<&Arc<Route>>, counted: Option<Counted>) -> Option<RateStatus<'_>> {
    let (tier, counted) = (route?.tier()?, counted?);
    Some(RateStatus {
        tier,
        limit: counted.limit,
        remaining: counted.remaining,
        reset_s: counted.reset_s,
    })
}

/// Why a request may not pass.
#[derive(Debug)]
pub struct Refusal {
    /// The reason.
    pub reason: Reason,
    /// The rule that it fell under, where one was chosen.
    pub route: Option<Arc<Route>>,
    pub(super) holder: Option<(ShortId, Arc<Terms>)>,
    pub(super) counted: Option<Counted>,
    pub(super) wanted: Option<Wanted>,
}

/// A refusal that may not be the last word: the limit is shared with other gates, and what was reserved of it has run dry.
#[derive(Debug)]
pub struct Wanted {
    /// To be asked for, and waited for; then the gate is to be asked again.
    pub reservation: Arc<Reservation>,
    /// Nobody was told yet that more is wanted.
    pub tell: bool,
    pub(super) owner: SlotId,
}

impl Refusal {
    /// Whose key it was, where that is known.
    pub fn holder(&self) -> Option<Holder<'_>> {
        let (id, terms) = self.holder.as_ref()?;
        Some(Holder { id, terms })
    }

    /// More permits may be had, and the request may wait for them.
    pub fn wanted(&self) -> Option<&Wanted> {
        self.wanted.as_ref()
    }

    /// What is left of the limit, where a permit was asked for.
    pub fn rate(&self) -> Option<RateStatus<'_>> {
        status(self.route.as_ref(), self.counted)
    }
}

/// The reason of a refusal, with what a client needs to act on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// No credential.
    MissingKey,
    /// A key that cannot be one of ours: prefix, length, characters or checksum are wrong.
    MalformedKey,
    /// A well-formed key that is in nobody's records.
    UnknownKey,
    /// Two different keys, or a credential header twice.
    ConflictingCredentials,
    /// The key was revoked, or this secret is past its grace period.
    RevokedKey,
    /// The key's expiry date has passed.
    ExpiredKey,
    /// The key is switched off.
    DisabledKey,
    /// The rule is not for keys of this environment.
    EnvironmentNotAllowed,
    /// The key lacks the rule's scope, which the route names.
    InsufficientScope,
    /// The tier's limit is used up.
    RateLimited {
        /// The smallest whole number of seconds after which a lone client certainly succeeds.
        retry_after_s: u32,
    },
    /// As many requests of this key are under way as its plan allows.
    TooManyInFlight,
    /// Too many bad credentials from this address.
    TooManyFailedAttempts {
        /// Seconds until the address starts afresh.
        retry_after_s: u32,
    },
    /// The gate has no snapshot of the keys yet, or one too old to be trusted.
    NotReady,
}

impl Reason {
    /// The stable code of the reason, as clients, logs and the ledger have it.
    pub const fn code(&self) -> &'static str {
        REASON_CODES[self.index()]
    }

    pub(super) const fn index(&self) -> usize {
        match self {
            Reason::MissingKey => 0,
            Reason::MalformedKey | Reason::UnknownKey => 1,
            Reason::ConflictingCredentials => 2,
            Reason::RevokedKey => 3,
            Reason::ExpiredKey => 4,
            Reason::DisabledKey => 5,
            Reason::EnvironmentNotAllowed => 6,
            Reason::InsufficientScope => 7,
            Reason::RateLimited { .. } => 8,
            Reason::TooManyInFlight => 9,
            Reason::TooManyFailedAttempts { .. } => 10,
            Reason::NotReady => 11,
        }
    }
}

/// The codes of section 2 of the contract that a decision can end in, by [`Reason::index`].
pub const REASON_CODES: [&str; 12] = [
    "MISSING_API_KEY",
    "INVALID_API_KEY",
    "CONFLICTING_CREDENTIALS",
    "REVOKED_API_KEY",
    "EXPIRED_API_KEY",
    "DISABLED_API_KEY",
    "ENVIRONMENT_NOT_ALLOWED",
    "INSUFFICIENT_SCOPE",
    "RATE_LIMITED",
    "TOO_MANY_IN_FLIGHT",
    "TOO_MANY_FAILED_ATTEMPTS",
    "NOT_READY",
];
