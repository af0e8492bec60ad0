//! What may be said of a secret, held once for all secrets of which the same is said, and named by a number.
//!
//! A slot has the number ([`TermsId`]), and the table that leads from it to the terms is a part of what is in force: a
//! decision has that in its hands already, so that reading the terms is two plain loads, and a permit needs no count of
//! references but the one on the table. The table is never changed; the writer makes the next one, of which most pages
//! are those of the last. What nearly all decisions need of the terms ([`Brief`]) lies in the table itself, close together:
//! of each terms until when they are valid and the number of their role, and what a role gives once for all that
//! have it. That of ten thousand organisations stays in the processor's cache.
//!
//! - A number is put in force before it is stored in a slot. A reader whose table does not know the number of a
//!   slot began before that, and finds it in what is in force by then.
//! - The number of a role means what the same table says it does: it is given to another role when no terms in the next
//!   table have it.
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

/// What may be said of a secret.
#[derive(Debug)]
pub struct Terms {
    /// Unix milliseconds; `i64::MAX` for never.
    pub(super) not_after_ms: i64,
    pub(super) expires_at_ms: i64,
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
    number: RoleId,
    pub rights: Rights,
    /// All scopes, by number.
    scope_ids: NameSet,
    pub environment: HeaderValue,
    /// The scopes, separated by spaces.
    pub scopes: HeaderValue,
    pub scope_names: Box<[Box<str>]>,
    pub plan_name: Box<str>,
}

impl Terms {
    /// Until then, in Unix milliseconds, there is nothing against the secret.
    fn valid_until_ms(&self) -> i64 {
        if self.disabled || self.revoked {
            i64::MIN
        } else {
            self.not_after_ms.min(self.expires_at_ms)
        }
    }

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

/// The number of a role.
type RoleId = u32;
/// Beside a role's number.
const ENDS: u32 = 1 << 31;
/// No role.
const NO_ROLE: RoleId = ENDS - 1;

/// Terms by number, of one moment.
#[derive(Clone, Default)]
pub(super) struct Known {
    pages: Arc<[Arc<Page>]>,
    /// By the numbers of roles.
    rights: Arc<[Rights]>,
}

/// What every decision looks at comes first.
#[derive(Clone)]
#[repr(C)]
struct Page {
    /// The number of the role, and [`ENDS`] where the secret is not valid for ever.
    roles: [u32; PAGE],
    valid_until_ms: [i64; PAGE],
    terms: [Option<Arc<Terms>>; PAGE],
}

/// What a decision on a valid secret needs to know.
#[derive(Clone, Copy)]
pub(super) struct Brief<'t> {
    /// Until then, in Unix milliseconds, there is nothing against the secret. From then on the terms say what.
    pub valid_until_ms: i64,
    pub rights: &'t Rights,
}

/// What a role gives.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rights {
    /// The first 64 scopes, a bit for each.
    scopes: u64,
    pub environment_id: NameId,
    pub plan: NameId,
}

/// Room for so many roles is made at first, and for as many again as there are whenever it is full.
const ROLES_AT_LEAST: RoleId = 16;

/// A change that brings new terms copies a page, and a pointer for each of the others.
const PAGE: usize = 256;

impl Known {
    #[inline]
    pub fn get(&self, id: TermsId) -> Option<&Arc<Terms>> {
        held_in(&self.pages, id)
    }

    /// What a number comes to that is not in the table is not valid.
    #[inline]
    pub fn brief(&self, id: TermsId) -> Brief<'_> {
        let Some(page) = self.pages.get(id as usize / PAGE) else {
            return Brief::NONE;
        };
        let place = id as usize % PAGE;
        let role = page.roles[place];
        Brief {
            // So that for most secrets nothing is asked of the memory but the role, which is more likely to be near.
            valid_until_ms: if role & ENDS == 0 {
                i64::MAX
            } else {
                page.valid_until_ms[place]
            },
            rights: self.rights.get((role & !ENDS) as usize).unwrap_or(&Rights::NONE),
        }
    }

    /// Whether the terms, which give `rights`, have the scope.
    #[inline]
    pub fn has_scope(&self, id: TermsId, rights: &Rights, scope: NameId) -> bool {
        match scope.index() {
            bit @ 0..64 => rights.scopes >> bit & 1 == 1,
            _ => self.get(id).is_some_and(|terms| terms.role.scope_ids.contains(scope)),
        }
    }
}

impl Brief<'static> {
    const NONE: Self = Brief {
        valid_until_ms: i64::MIN,
        rights: &Rights::NONE,
    };
}

impl Rights {
    const NONE: Rights = Rights {
        scopes: 0,
        environment_id: NameId(u16::MAX),
        plan: NameId(u16::MAX),
    };
}

impl Page {
    const EMPTY: Page = Page {
        roles: [NO_ROLE | ENDS; PAGE],
        valid_until_ms: [i64::MIN; PAGE],
        terms: [const { None }; PAGE],
    };

    fn set(&mut self, place: usize, terms: Option<Arc<Terms>>) {
        let role = terms.as_ref().map_or(NO_ROLE, |terms| terms.role.number);
        let until = terms.as_ref().map_or(i64::MIN, |terms| terms.valid_until_ms());
        self.roles[place] = if until == i64::MAX { role } else { role | ENDS };
        self.valid_until_ms[place] = until;
        self.terms[place] = terms;
    }
}

impl fmt::Debug for Known {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Known").field("pages", &self.pages.len()).finish()
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
    /// What the roles give, by their numbers.
    rights: Arc<[Rights]>,
    free_roles: Vec<RoleId>,
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
        let known = Known {
            pages: self.pages.as_slice().into(),
            rights: self.rights.clone(),
        };
        (known, std::mem::take(&mut self.gone))
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
        Ok(Terms {
            not_after_ms: i64::MAX,
            expires_at_ms: i64::MAX,
            disabled: false,
            revoked: false,
            organization: header(key, &key.organization)?,
            role: self.role(names, key)?,
            long_id: None,
        })
    }

    fn role(&mut self, names: &NameTables, key: &KeyUpdate) -> Result<Arc<Role>, KeyError> {
        let hash = plain_hash(&self.hasher, "", &key.environment, &key.plan, &key.scopes);
        if let Some(held) = self.roles.find(hash, |held| held.is_of(key)) {
            return Ok(held.clone());
        }
        let scope_ids = key.scopes.iter().map(|name| names.scopes.number(name));
        let scope_ids = scope_ids.collect::<Result<NameSet, _>>()?;
        let rights = Rights {
            scopes: scope_ids.first_64(),
            environment_id: names.environments.number(&key.environment)?,
            plan: names.plans.number(&key.plan)?,
        };
        let mut role = Role {
            number: NO_ROLE,
            rights,
            scope_ids,
            environment: header(key, &key.environment)?,
            scopes: header(key, &key.scopes.join(" "))?,
            scope_names: key.scopes.clone().into(),
            plan_name: key.plan.clone(),
        };
        role.number = self.number_of_role(rights)?;
        let role = Arc::new(role);
        let hasher = &self.hasher;
        self.roles.insert_unique(hash, role.clone(), |held| {
            plain_hash(hasher, "", text(&held.environment), &held.plan_name, &held.scope_names)
        });
        Ok(role)
    }

    /// A number for a role that gives these.
    fn number_of_role(&mut self, rights: Rights) -> Result<RoleId, KeyError> {
        if self.free_roles.is_empty() {
            let held = RoleId::try_from(self.rights.len()).map_err(|_| KeyError::TooMany)?;
            let more = held.max(ROLES_AT_LEAST);
            let end = held.checked_add(more).filter(|end| *end <= NO_ROLE);
            let end = end.ok_or(KeyError::TooMany)?;
            let unused = std::iter::repeat_n(Rights::NONE, more as usize);
            self.rights = self.rights.iter().copied().chain(unused).collect();
            self.free_roles.extend((held..end).rev());
        }
        let number = self.free_roles.pop().ok_or(KeyError::TooMany)?;
        Arc::make_mut(&mut self.rights)[number as usize] = rights;
        Ok(number)
    }

    /// Forgets what no secret has any more.
    pub fn forget_unused(&mut self) {
        let (uses, pages) = (&self.uses, &self.pages);
        self.plain.retain(|id| uses[*id as usize] > 0);
        let unused = |id: &TermsId| uses[*id as usize] == 0 && held_in(pages, *id).is_some();
        let unused: Vec<TermsId> = (0..uses.len() as TermsId).filter(unused).collect();
        unused.into_iter().for_each(|id| self.remove(id));
        let free_roles = &mut self.free_roles;
        self.roles.retain(|role| {
            let is_held = Arc::strong_count(role) > 1;
            if !is_held {
                free_roles.push(role.number);
            }
            is_held
        });
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
    fn each_role_gives_its_own_rights_and_a_number_is_another_roles_only_when_nobody_can_see_the_first() {
        let (names, mut table, slots) = (NameTables::default(), TermsTable::default(), Slots::new());
        assert!(slots.allocate(0));
        let with_scope = |n: u32| KeyUpdate {
            scopes: vec![format!("scope:{}", n % 64).into()],
            plan: format!("plan_{n}").into(),
            ..key_of("org_1", None)
        };
        let roles = ROLES_AT_LEAST * 3 + 1;
        let ids: Vec<TermsId> = (0..roles)
            .map(|n| table.of(&names, &with_scope(n), None).unwrap())
            .collect();
        let (known, _) = table.next();
        let is_right = |known: &Known, n: u32, id: TermsId| {
            let rights = known.brief(id).rights;
            let scope = names.scopes.find(&format!("scope:{}", n % 64)).unwrap();
            known.has_scope(id, rights, scope) && *names.plans.name(rights.plan) == *format!("plan_{n}")
        };
        assert!((0..roles).zip(&ids).all(|(n, id)| is_right(&known, n, *id)));
        let number_of = |known: &Known, id| known.get(id).unwrap().role.number;
        let first = number_of(&known, ids[0]);

        // Nobody has them any more, but a reader has the table that knows them.
        table.forget_unused();
        let gone = table.next().1;
        assert_eq!(gone.len(), ids.len());
        let other = table.of(&names, &with_scope(1_000), None).unwrap();
        let (after, _) = table.next();
        assert_ne!(number_of(&after, other), first);
        assert!((0..roles).zip(&ids).all(|(n, id)| is_right(&known, n, *id)));

        drop(known);
        table.use_again(gone);
        table.give(slots.get(0).unwrap(), other);
        table.forget_unused();
        let anew = table.of(&names, &with_scope(2_000), None).unwrap();
        let (last, _) = table.next();
        assert!(number_of(&last, anew) < roles, "used again");
        assert!(is_right(&last, 2_000, anew) && is_right(&last, 1_000, other) && is_right(&after, 1_000, other));
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
            assert_eq!(known.has_scope(id, known.brief(id).rights, scope), n % 3 == 0, "{n}");
        }
    }
}
