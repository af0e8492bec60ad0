//! The windows that this gate looks after, by number: which of them are to be asked for, and which looked at when.

use super::ledger::Ledger;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

/// The ledgers of all windows. The number of one that was forgotten is given to another.
#[derive(Debug, Default)]
pub(super) struct Windows {
    ledgers: Vec<Option<Ledger>>,
    free: Vec<u32>,
    /// To be asked for, in this order; each once.
    queue: VecDeque<u32>,
    /// To be looked at, the earliest first; any number of times.
    due: BinaryHeap<Reverse<(u64, u32)>>,
}

impl Windows {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.ledgers.len() - self.free.len()
    }

    /// Every number that one has, and some that none has.
    pub fn slots(&self) -> std::ops::Range<u32> {
        0..self.ledgers.len() as u32
    }

    /// Begins to look after one more. Answers its number.
    pub fn open(&mut self, ledger: Ledger) -> u32 {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.ledgers.push(None);
            self.ledgers.len() as u32 - 1
        });
        self.ledgers[slot as usize] = Some(ledger);
        slot
    }

    pub fn get(&self, slot: u32) -> Option<&Ledger> {
        self.ledgers.get(slot as usize)?.as_ref()
    }

    pub fn get_mut(&mut self, slot: u32) -> Option<&mut Ledger> {
        self.ledgers.get_mut(slot as usize)?.as_mut()
    }

    /// Looks no longer after it.
    pub fn forget(&mut self, slot: u32) {
        self.ledgers[slot as usize] = None;
        self.free.push(slot);
    }

    /// It is to be asked for, unless it waits for that already or [may not be](Ledger::may_ask).
    pub fn enqueue(&mut self, slot: u32) {
        if let Some(ledger) = self.get_mut(slot)
            && !ledger.queued
            && ledger.may_ask()
        {
            ledger.queued = true;
            self.queue.push_back(slot);
        }
    }

    /// The next to be asked for. It may have been forgotten since.
    pub fn pop_queued(&mut self) -> Option<u32> {
        let slot = self.queue.pop_front()?;
        if let Some(ledger) = self.get_mut(slot) {
            ledger.queued = false;
        }
        Some(slot)
    }

    pub fn none_queued(&self) -> bool {
        self.queue.is_empty()
    }

    /// It is to be looked at at this time.
    pub fn watch(&mut self, slot: u32, due_ns: u64) {
        self.due.push(Reverse((due_ns, slot)));
    }

    /// When the next is to be looked at; never: [`u64::MAX`].
    pub fn next_due_ns(&self) -> u64 {
        self.due.peek().map_or(u64::MAX, |Reverse((due_ns, _))| *due_ns)
    }

    /// One that is to be looked at by now. It may have been forgotten since.
    pub fn pop_due(&mut self, now_ns: u64) -> Option<u32> {
        let Reverse((due_ns, slot)) = *self.due.peek()?;
        if due_ns > now_ns {
            return None;
        }
        self.due.pop();
        Some(slot)
    }
}
