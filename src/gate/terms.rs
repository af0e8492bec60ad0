//! What may be said of a secret, held once for all secrets of which the same is said, and named by a number.
//!
//! A slot has the number ([`TermsId`]), and the table that leads from it to the terms is a part of what is in force: a
//! decision has that in its hands already, so that reading the terms is two plain loads, and a permit needs no count of
//! references but the one on the table. The table is never changed; the writer makes the next one, of which most pages
//! are those of the last. What nearly all decisions need of the terms ([`Brief`]) lies in the table itself, close together:
//! those of ten thousand organisations stay in the processor's cache.
//!
//! - A number is put in force before it is stored in a slot. A reader whose table does not know the number of a
//!   slot began before that, and finds it in what is in force by then.
//! - A number is taken out of the next table when no slot has it any more, and means something else only when nobody
//!   holds a table any more in which it meant this (`retired.rs`). So two tables never disagree on a number that a slot
//!   has.

use super::key::KeyId;
use super::policy::NameTables;
use super::scope::{NameId, NameSet};
use super::slots::Slot;
use super::update::{KeyError, KeyUpdate};
use super::verdict::Reason;
use crate::clock::Now;
use hashbrown::HashTable;
use http::HeaderValue;
use std::fmt;
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
    /// Whether they may be those of many keys.
    fn is_plain(&self) -> bool {
        let endless = self.not_after_ms == i64::MAX && self.expires_at_ms == i64::MAX;
        endless && !self.disabled && !self.revoked && self.long_id.is_none()
    }

    fn plain_hash(&self, hasher: &ahash::RandomState) -> u64 {
        let role = &self.role;
        plain_hash(
            hasher,
            self.organization(),
            self.environment(),
            &role.plan_name,
            &role.scope_names,
        )
    }

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
}

/// Header values here were made from printable ASCII.
fn text(value: &HeaderValue) -> &str {
    value.to_str().unwrap_or_default()
}

/// The number of terms.
pub(super) type TermsId = u32;
/// No terms.
pub(super) const NO_TERMS: TermsId = TermsId::MAX;

/// Terms by number, of one moment.
#[derive(Clone, Default)]
pub(super) struct Known(Arc<[Arc<Page>]>);

#[derive(Clone)]
struct Page {
    briefs: [Brief; PAGE],
    terms: [Option<Arc<Terms>>; PAGE],
}

/// What a decision on a valid secret needs to know.
#[derive(Clone, Copy)]
pub(super) struct Brief {
    /// Until then, in Unix milliseconds, there is nothing against the secret. From then on the terms say what.
    pub valid_until_ms: i64,
    scopes: u64,
    pub environment_id: NameId,
    pub plan: NameId,
}

/// A change that brings new terms copies a page, and a pointer for each of the others.
const PAGE: usize = 256;

impl Known {
    #[inline]
    pub fn get(&self, id: TermsId) -> Option<&Arc<Terms>> {
        held_in(&self.0, id)
    }

    /// What a number comes to that is not in the table is not valid.
    #[inline]
    pub fn brief(&self, id: TermsId) -> &Brief {
        let page = self.0.get(id as usize / PAGE);
        page.map_or(&Brief::NONE, |page| &page.briefs[id as usize % PAGE])
    }

    /// Whether the terms, of which `brief` is the brief, have the scope.
    #[inline]
    pub fn has_scope(&self, id: TermsId, brief: &Brief, scope: NameId) -> bool {
        match scope.index() {
            bit @ 0..64 => brief.scopes >> bit & 1 == 1,
            _ => self.get(id).is_some_and(|terms| terms.scopes.contains(scope)),
        }
    }
}

impl Brief {
    const NONE: Brief = Brief {
        valid_until_ms: i64::MIN,
        scopes: 0,
        environment_id: NameId(u16::MAX),
        plan: NameId(u16::MAX),
    };
}

impl From<&Terms> for Brief {
    fn from(terms: &Terms) -> Self {
        let is_off = terms.disabled || terms.revoked;
        Brief {
            valid_until_ms: if is_off {
                i64::MIN
            } else {
                terms.not_after_ms.min(terms.expires_at_ms)
            },
            scopes: terms.scopes.first_64(),
            environment_id: terms.environment_id,
            plan: terms.plan,
        }
    }
}

impl Page {
    const EMPTY: Page = Page {
        briefs: [Brief::NONE; PAGE],
        terms: [const { None }; PAGE],
    };

    fn set(&mut self, place: usize, terms: Option<Arc<Terms>>) {
        self.briefs[place] = terms.as_deref().map_or(Brief::NONE, Brief::from);
        self.terms[place] = terms;
    }
}

impl fmt::Debug for Known {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Known").field("pages", &self.0.len()).finish()
    }
}

/// The writer's side: the terms in use, and the next table of them.
#[derive(Default)]
pub(super) struct TermsTable {
    pages: Vec<Arc<Page>>,
    /// How many slots have each number.
    uses: Vec<u32>,
    free: Vec<TermsId>,
    /// What is out of the next table, and may be in the one in force.
    gone: Vec<TermsId>,
    /// Whether the next table is another one than the last.
    changed: bool,
    /// Of keys without an end, by organisation and role.
    plain: HashTable<TermsId>,
    roles: HashTable<Arc<Role>>,
    hasher: ahash::RandomState,
}

impl TermsTable {
    /// The number of the terms of one secret of a key. To be put in force ([`TermsTable::next`]) before a slot that is in
    /// use gets it ([`TermsTable::give`]).
    ///
    /// # Errors
    /// [`KeyError::NotAHeaderValue`], [`KeyError::TooMany`].
    pub fn of(&mut self, names: &NameTables, key: &KeyUpdate, not_after_ms: Option<i64>) -> Result<TermsId, KeyError> {
        let plain = key.expires_at_ms.is_none() && not_after_ms.is_none() && !key.disabled && !key.revoked;
        if !plain || key.id.len() > KeyId::SHORT {
            let long_id = (key.id.len() > KeyId::SHORT).then(|| Arc::from(&*key.id));
            let terms = Terms {
                not_after_ms: not_after_ms.unwrap_or(i64::MAX),
                expires_at_ms: key.expires_at_ms.unwrap_or(i64::MAX),
                disabled: key.disabled,
                revoked: key.revoked,
                long_id,
                ..self.plain_terms(names, key)?
            };
            return self.add(terms);
        }
        let hash = plain_hash(
            &self.hasher,
            &key.organization,
            &key.environment,
            &key.plan,
            &key.scopes,
        );
        let same = |held: &TermsId| {
            let held = held_in(&self.pages, *held);
            held.is_some_and(|held| held.organization.as_bytes() == key.organization.as_bytes() && held.role.is_of(key))
        };
        if let Some(held) = self.plain.find(hash, same) {
            return Ok(*held);
        }
        let terms = self.plain_terms(names, key)?;
        let id = self.add(terms)?;
        let (hasher, pages) = (&self.hasher, &self.pages);
        self.plain.insert_unique(hash, id, |held| {
            held_in(pages, *held).map_or(0, |held| held.plain_hash(hasher))
        });
        Ok(id)
    }

    /// The terms with this number, in the next table.
    pub fn get(&self, id: TermsId) -> Option<&Arc<Terms>> {
        held_in(&self.pages, id)
    }

    /// Whether a table is to be put in force before numbers that [`TermsTable::of`] gave are.
    pub fn has_changed(&self) -> bool {
        self.changed
    }

    /// The next table, and the numbers that were taken out of it.
    pub fn next(&mut self) -> (Known, Vec<TermsId>) {
        self.changed = false;
        (Known(self.pages.as_slice().into()), std::mem::take(&mut self.gone))
    }

    /// These numbers mean nothing to anybody any more.
    pub fn use_again(&mut self, mut ids: Vec<TermsId>) {
        self.free.append(&mut ids);
    }

    /// Gives a slot its terms, or [`NO_TERMS`], and takes the ones it had.
    pub fn give(&mut self, slot: &Slot, id: TermsId) {
        if let Some(uses) = self.uses.get_mut(id as usize) {
            *uses += 1;
        }
        let before = slot.set_terms(id);
        let Some(uses) = self.uses.get_mut(before as usize) else {
            return;
        };
        *uses -= 1;
        // Those of many keys stay until the next full snapshot: they may well be wanted again.
        if *uses == 0 && self.get(before).is_some_and(|terms| !terms.is_plain()) {
            self.remove(before);
        }
    }

    fn add(&mut self, terms: Terms) -> Result<TermsId, KeyError> {
        let id = match self.free.pop() {
            Some(id) => id,
            None => {
                let id = TermsId::try_from(self.uses.len()).map_err(|_| KeyError::TooMany)?;
                self.uses.push(0);
                if self.pages.len() * PAGE <= id as usize {
                    self.pages.push(Arc::new(Page::EMPTY));
                }
                id
            }
        };
        self.changed = true;
        Arc::make_mut(&mut self.pages[id as usize / PAGE]).set(id as usize % PAGE, Some(Arc::new(terms)));
        Ok(id)
    }

    fn remove(&mut self, id: TermsId) {
        self.changed = true;
        Arc::make_mut(&mut self.pages[id as usize / PAGE]).set(id as usize % PAGE, None);
        self.gone.push(id);
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
        let (uses, pages) = (&self.uses, &self.pages);
        self.plain.retain(|id| uses[*id as usize] > 0);
        let unused = |id: &TermsId| uses[*id as usize] == 0 && held_in(pages, *id).is_some();
        let unused: Vec<TermsId> = (0..uses.len() as TermsId).filter(unused).collect();
        unused.into_iter().for_each(|id| self.remove(id));
        self.roles.retain(|role| Arc::strong_count(role) > 1);
    }
}

#[inline]
fn held_in(pages: &[Arc<Page>], id: TermsId) -> Option<&Arc<Terms>> {
    pages.get(id as usize / PAGE)?.terms[id as usize % PAGE].as_ref()
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

#[cfg(test)]
mod tests {
    use super::super::slots::Slots;
    use super::*;

    fn key_of(organization: &str, expires_at_ms: Option<i64>) -> KeyUpdate {
        KeyUpdate {
            id: "key_1".into(),
            organization: organization.into(),
            environment: "live".into(),
            expires_at_ms,
            ..KeyUpdate::default()
        }
    }

    #[test]
    fn a_number_means_one_thing_until_nobody_can_know_it() {
        let (names, mut table, slots) = (NameTables::default(), TermsTable::default(), Slots::new());
        assert!(slots.allocate(0));
        let slot = slots.get(0).unwrap();
        let first = table.of(&names, &key_of("org_1", Some(5)), None).unwrap();
        table.give(slot, first);
        assert!(table.has_changed());
        let (before, gone) = table.next();
        assert!(gone.is_empty() && !table.has_changed());
        let second = table.of(&names, &key_of("org_2", Some(7)), Some(6)).unwrap();
        table.give(slot, second);
        let (after, gone) = table.next();
        assert_eq!((slot.terms(), &*gone), (second, &[first][..]));
        assert_eq!(before.get(first).unwrap().organization(), "org_1");
        assert_eq!(before.brief(first).valid_until_ms, 5);
        assert!(before.get(second).is_none(), "it came later");
        assert!(after.get(first).is_none());
        assert_eq!(after.brief(first).valid_until_ms, i64::MIN);
        assert_eq!(after.brief(second).valid_until_ms, 6);
        let third = table.of(&names, &key_of("org_3", Some(8)), None).unwrap();
        assert_ne!(third, first, "somebody may hold the table before");
        table.use_again(gone);
        assert_eq!(table.of(&names, &key_of("org_4", Some(9)), None), Ok(first));
        assert_eq!(before.get(first).unwrap().organization(), "org_1");
    }

    #[test]
    fn terms_of_many_keys_are_held_once_until_none_has_them() {
        let (names, mut table, slots) = (NameTables::default(), TermsTable::default(), Slots::new());
        assert!(slots.allocate(0));
        let slot = slots.get(0).unwrap();
        let of = |table: &mut TermsTable| table.of(&names, &key_of("org_1", None), None).unwrap();
        let plain = of(&mut table);
        table.give(slot, plain);
        assert_eq!(of(&mut table), plain);
        table.give(slot, NO_TERMS);
        assert_eq!(of(&mut table), plain, "it may well be wanted again");
        table.forget_unused();
        assert_eq!(table.next().1, [plain]);
        assert_ne!(of(&mut table), plain);
    }

    #[test]
    fn a_scope_is_had_whatever_its_number() {
        let (names, mut table) = (NameTables::default(), TermsTable::default());
        let all: Vec<Box<str>> = (0..130).map(|n| format!("scope:{n}").into()).collect();
        let numbers: Vec<NameId> = all.iter().map(|name| names.scopes.number(name).unwrap()).collect();
        let key = KeyUpdate {
            scopes: all.iter().step_by(3).cloned().collect(),
            ..key_of("org_1", None)
        };
        let id = table.of(&names, &key, None).unwrap();
        let (known, _) = table.next();
        for (n, scope) in numbers.into_iter().enumerate() {
            assert_eq!(known.has_scope(id, known.brief(id), scope), n % 3 == 0, "{n}");
        }
    }
}
