//! Names as small numbers, and sets of them.
//!
//! Scopes, tiers, environments and plans are names in the configuration and on the wire. The hot path
//! compares numbers: a name gets one when it is first seen and keeps it for the life of the process, so that
//! a key loaded under one configuration is still read rightly under the next.

use std::collections::HashMap;
use std::sync::{Arc, RwLock};

/// The number of a name within its [`Names`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NameId(pub(crate) u16);

impl NameId {
    pub(crate) fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// An append-only table of names. Written on reloads and key changes only; the hot path never looks here.
#[derive(Debug, Default)]
pub struct Names(RwLock<Table>);

#[derive(Debug, Default)]
struct Table {
    ids: HashMap<Arc<str>, NameId>,
    names: Vec<Arc<str>>,
}

/// More distinct names of one kind than a process can number: 65,535.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooManyNames;

impl Names {
    /// The number of `name`, given to it now if it is new.
    ///
    /// # Errors
    /// [`TooManyNames`] after 65,535 different ones.
    pub fn number(&self, name: &str) -> Result<NameId, TooManyNames> {
        if let Some(id) = self.find(name) {
            return Ok(id);
        }
        let mut table = self.0.write().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(id) = table.ids.get(name) {
            return Ok(*id);
        }
        let id = u16::try_from(table.names.len())
            .ok()
            .filter(|n| *n < u16::MAX)
            .map(NameId)
            .ok_or(TooManyNames)?;
        let name = Arc::<str>::from(name);
        table.names.push(name.clone());
        table.ids.insert(name, id);
        Ok(id)
    }

    /// The number of `name` if it has one.
    pub fn find(&self, name: &str) -> Option<NameId> {
        self.0
            .read()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .ids
            .get(name)
            .copied()
    }

    /// The name behind a number that this table gave.
    pub fn name(&self, id: NameId) -> Arc<str> {
        let table = self.0.read().unwrap_or_else(|poisoned| poisoned.into_inner());
        table.names.get(id.index()).cloned().unwrap_or_default()
    }
}

/// A set of scopes or environments. Up to 64 different names fit in the first word, without a heap allocation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct NameSet {
    first: u64,
    more: Box<[u64]>,
}

impl NameSet {
    /// Whether `id` is in the set.
    #[inline]
    pub fn contains(&self, id: NameId) -> bool {
        let (word, bit) = (id.index() / 64, id.index() % 64);
        let bits = if word == 0 {
            self.first
        } else {
            self.more.get(word - 1).copied().unwrap_or(0)
        };
        bits >> bit & 1 == 1
    }

    /// Which of the first 64 names are in the set, a bit for each.
    pub(super) fn first_64(&self) -> u64 {
        self.first
    }

    pub(super) fn insert(&mut self, id: NameId) {
        let (word, bit) = (id.index() / 64, id.index() % 64);
        if word == 0 {
            self.first |= 1 << bit;
            return;
        }
        if self.more.len() < word {
            let mut grown = std::mem::take(&mut self.more).into_vec();
            grown.resize(word, 0);
            self.more = grown.into_boxed_slice();
        }
        self.more[word - 1] |= 1 << bit;
    }
}

impl FromIterator<NameId> for NameSet {
    fn from_iter<I: IntoIterator<Item = NameId>>(ids: I) -> Self {
        let mut set = NameSet::default();
        ids.into_iter().for_each(|id| set.insert(id));
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_keeps_its_number() {
        let names = Names::default();
        let first = names.number("messaging:send").unwrap();
        let second = names.number("storage:read").unwrap();
        assert_ne!(first, second);
        assert_eq!(names.number("messaging:send"), Ok(first));
        assert_eq!(&*names.name(second), "storage:read");
        assert_eq!(names.find("unheard:of"), None);
    }

    #[test]
    fn a_set_holds_exactly_what_was_put_in() {
        let members = [0, 1, 63, 64, 65, 128, 1000].map(NameId);
        let set: NameSet = members.into_iter().collect();
        for n in 0..2000 {
            assert_eq!(set.contains(NameId(n)), members.contains(&NameId(n)), "{n}");
        }
    }
}
