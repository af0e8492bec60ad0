//! What may be said of a secret, held once for all secrets of which the same is said.

use super::key::KeyId;
use super::policy::NameTables;
use super::scope::{NameId, NameSet};
use super::update::{KeyError, KeyUpdate};
use super::verdict::Reason;
use crate::clock::Now;
use hashbrown::HashTable;
use http::HeaderValue;
use std::sync::Arc;

/// What may be said of a secret. What every decision looks at comes first.
#[derive(Debug)]
#[repr(C)]
pub struct Terms {
    /// Unix milliseconds; `i64::MAX` for never.
    pub(super) not_after_ms: i64,
    pub(super) expires_at_ms: i64,
    pub(super) scopes: NameSet,
    pub(super) environment_id: NameId,
    pub(super) plan: NameId,
    pub(super) disabled: bool,
    pub(super) revoked: bool,
    pub(super) role: Arc<Role>,
    pub(super) organization: HeaderValue,
    /// The key's id where it is too long for its slot.
    pub(super) long_id: Option<Arc<str>>,
}

/// What keys of many organisations have in common.
#[derive(Debug)]
pub(super) struct Role {
    pub environment: HeaderValue,
    /// The scopes, separated by spaces.
    pub scopes: HeaderValue,
    pub scope_names: Box<[Box<str>]>,
    pub plan_name: Box<str>,
}

impl Terms {
    /// The organisation.
    pub fn organization(&self) -> &str {
        text(&self.organization)
    }

    /// The environment's name.
    pub fn environment(&self) -> &str {
        text(&self.role.environment)
    }

    /// Why the secret is not valid now, if it is not.
    #[inline]
    pub(super) fn state(&self, now: Now) -> Option<Reason> {
        if self.revoked || now.unix_ms >= self.not_after_ms {
            Some(Reason::RevokedKey)
        } else if now.unix_ms >= self.expires_at_ms {
            Some(Reason::ExpiredKey)
        } else if self.disabled {
            Some(Reason::DisabledKey)
        } else {
            None
        }
    }

    /// The terms of a key that is known by its id only, because a journal named it: no secret has them.
    pub(super) fn of_unknown_key(long_id: Option<Arc<str>>) -> Self {
        let nothing = HeaderValue::from_static("");
        Terms {
            not_after_ms: i64::MAX,
            expires_at_ms: i64::MAX,
            scopes: NameSet::default(),
            environment_id: NameId(u16::MAX),
            plan: NameId(u16::MAX),
            disabled: true,
            revoked: false,
            role: Arc::new(Role {
                environment: nothing.clone(),
                scopes: nothing.clone(),
                scope_names: Box::default(),
                plan_name: Box::default(),
            }),
            organization: nothing,
            long_id,
        }
    }
}

/// Header values here were made from printable ASCII.
fn text(value: &HeaderValue) -> &str {
    value.to_str().unwrap_or_default()
}

/// The terms in use.
#[derive(Debug, Default)]
pub(super) struct TermsTable {
    /// Of keys without an end, by organisation and role.
    plain: HashTable<Arc<Terms>>,
    roles: HashTable<Arc<Role>>,
    hasher: ahash::RandomState,
}

impl TermsTable {
    /// The terms of one secret of a key.
    ///
    /// # Errors
    /// [`KeyError::NotAHeaderValue`], [`KeyError::TooMany`].
    pub fn of(
        &mut self,
        names: &NameTables,
        key: &KeyUpdate,
        not_after_ms: Option<i64>,
    ) -> Result<Arc<Terms>, KeyError> {
        let plain = key.expires_at_ms.is_none() && not_after_ms.is_none() && !key.disabled && !key.revoked;
        if !plain || key.id.len() > KeyId::INLINE {
            let long_id = (key.id.len() > KeyId::INLINE).then(|| Arc::from(&*key.id));
            return Ok(Arc::new(Terms {
                not_after_ms: not_after_ms.unwrap_or(i64::MAX),
                expires_at_ms: key.expires_at_ms.unwrap_or(i64::MAX),
                disabled: key.disabled,
                revoked: key.revoked,
                long_id,
                ..self.plain_terms(names, key)?
            }));
        }
        let hash = plain_hash(
            &self.hasher,
            &key.organization,
            &key.environment,
            &key.plan,
            &key.scopes,
        );
        let same =
            |held: &Arc<Terms>| held.organization.as_bytes() == key.organization.as_bytes() && held.role.is_of(key);
        if let Some(held) = self.plain.find(hash, same) {
            return Ok(held.clone());
        }
        let terms = Arc::new(self.plain_terms(names, key)?);
        let hasher = &self.hasher;
        self.plain.insert_unique(hash, terms.clone(), |held| {
            let role = &held.role;
            plain_hash(
                hasher,
                held.organization(),
                held.environment(),
                &role.plan_name,
                &role.scope_names,
            )
        });
        Ok(terms)
    }

    fn plain_terms(&mut self, names: &NameTables, key: &KeyUpdate) -> Result<Terms, KeyError> {
        let scopes = key.scopes.iter().map(|name| names.scopes.number(name));
        Ok(Terms {
            not_after_ms: i64::MAX,
            expires_at_ms: i64::MAX,
            scopes: scopes.collect::<Result<NameSet, _>>()?,
            environment_id: names.environments.number(&key.environment)?,
            plan: names.plans.number(&key.plan)?,
            disabled: false,
            revoked: false,
            role: self.role(key)?,
            organization: header(key, &key.organization)?,
            long_id: None,
        })
    }

    fn role(&mut self, key: &KeyUpdate) -> Result<Arc<Role>, KeyError> {
        let hash = plain_hash(&self.hasher, "", &key.environment, &key.plan, &key.scopes);
        if let Some(held) = self.roles.find(hash, |held| held.is_of(key)) {
            return Ok(held.clone());
        }
        let role = Arc::new(Role {
            environment: header(key, &key.environment)?,
            scopes: header(key, &key.scopes.join(" "))?,
            scope_names: key.scopes.clone().into(),
            plan_name: key.plan.clone(),
        });
        let hasher = &self.hasher;
        self.roles.insert_unique(hash, role.clone(), |held| {
            plain_hash(hasher, "", text(&held.environment), &held.plan_name, &held.scope_names)
        });
        Ok(role)
    }

    /// Forgets what no secret has any more.
    pub fn forget_unused(&mut self) {
        self.plain.retain(|terms| Arc::strong_count(terms) > 1);
        self.roles.retain(|role| Arc::strong_count(role) > 1);
    }
}

impl Role {
    fn is_of(&self, key: &KeyUpdate) -> bool {
        self.environment.as_bytes() == key.environment.as_bytes()
            && self.plan_name == key.plan
            && *self.scope_names == *key.scopes
    }
}

fn plain_hash(
    hasher: &ahash::RandomState,
    organization: &str,
    environment: &str,
    plan: &str,
    scopes: &[Box<str>],
) -> u64 {
    hasher.hash_one((organization, environment, plan, scopes))
}

fn header(key: &KeyUpdate, text: &str) -> Result<HeaderValue, KeyError> {
    let plain = text.bytes().all(|b| (b' '..=b'~').contains(&b));
    let value = HeaderValue::from_str(text).ok().filter(|_| plain);
    value.ok_or_else(|| KeyError::NotAHeaderValue { id: key.id.clone() })
}
