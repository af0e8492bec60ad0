//! When memory that readers may be looking at can be used again.
//!
//! A reader holds what is in force when its request comes, for one decision. A writer that takes something out of use (a
//! slot, a map, the number of terms, a place of windows) first puts something else in force, and lays what it replaced in
//! this queue, with what can be reached through it and nothing later. An `ArcSwap` that is written to turns every reader's
//! hold on the old value into a count of its `Arc`, so when an entry's `Arc` is ours alone, the last reader of that moment
//! has left; when it is so for all entries up to one, nobody is in what it took out of use. Readers wait for nothing, and
//! writers do not wait for them: what cannot be used again yet is looked at with the next change.
//!
//! It also keeps the freeing of a replaced map away from requests: the last to drop it is always a writer.

use super::key::KeyId;
use super::places::HeldPlace;
use super::slots::SlotId;
use super::snapshot::InForce;
use super::terms::TermsId;
use std::collections::VecDeque;
use std::sync::Arc;

/// What was in force, oldest first.
#[derive(Debug, Default)]
pub(super) struct Retired(VecDeque<(Arc<InForce>, Unused)>);

/// Numbers of what is of no use any more, and may be used for something else.
#[derive(Debug, Default)]
pub(super) struct Unused {
    pub slots: Vec<SlotId>,
    pub terms: Vec<TermsId>,
    pub windows: Vec<LeftWindows>,
}

/// Windows that were given back. Who came before may still count in them.
#[derive(Debug)]
pub(super) struct LeftWindows {
    pub key_id: KeyId,
    pub environment: Arc<str>,
    pub place: HeldPlace,
}

impl Retired {
    /// Lays down what was replaced just now, and what is of no use since.
    pub fn push(&mut self, replaced: Arc<InForce>, unused: Unused) {
        self.0.push_back((replaced, unused));
    }

    /// What no reader can be in any more; and what was in force, for the caller to drop when the queue is locked no more,
    /// which may take a while.
    pub fn take_free(&mut self) -> (Unused, Vec<InForce>) {
        let (mut free, mut left) = (Unused::default(), vec![]);
        while let Some((replaced, mut unused)) = self.0.pop_front() {
            match Arc::try_unwrap(replaced) {
                // That acquires what the readers did before they left.
                Ok(replaced) => {
                    left.push(replaced);
                    free.slots.append(&mut unused.slots);
                    free.terms.append(&mut unused.terms);
                    free.windows.append(&mut unused.windows);
                }
                Err(replaced) => {
                    self.0.push_front((replaced, unused));
                    break;
                }
            }
        }
        (free, left)
    }
}
