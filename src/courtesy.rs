//! Long work that gives way to requests.
//!
//! A thread that never waits is left running until its slice ends, which is 1 to 4 ms on Linux, and a request that comes
//! meanwhile to the same processor waits for as long. What works through thousands of keys therefore offers the processor
//! every tenth of a millisecond. Where nobody wants it that costs a system call of less than a microsecond.

use std::cmp::Ordering;
use std::io::{self, Write};

/// Counts the steps of such work.
#[derive(Debug)]
pub(crate) struct Courtesy {
    at_once: u32,
    done: u32,
}

impl Courtesy {
    /// Offers the processor after every `at_once` steps.
    pub const fn every(at_once: u32) -> Self {
        Courtesy { at_once, done: 0 }
    }

    /// One more step is about to be done.
    #[inline]
    pub fn step(&mut self) {
        self.done += 1;
        if self.done >= self.at_once {
            self.done = 0;
            std::thread::yield_now();
        }
    }
}

/// What is written to a file at once: the system copies that in less than a tenth of a millisecond, and gives the processor
/// to nobody meanwhile.
pub(crate) const WRITTEN_AT_ONCE_BYTES: usize = 64 << 10;

/// Writes all of `bytes`, piece by piece.
pub(crate) fn write_all(file: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    let mut courtesy = Courtesy::every(1);
    bytes.chunks(WRITTEN_AT_ONCE_BYTES).try_for_each(|piece| {
        courtesy.step();
        file.write_all(piece)
    })
}

/// Sorts a long list. One that is made of sorted lists takes little.
pub(crate) fn sort_by<T>(list: &mut [T], mut compare: impl FnMut(&T, &T) -> Ordering) {
    let mut courtesy = Courtesy::every(COMPARED_AT_ONCE);
    list.sort_by(|one, other| {
        courtesy.step();
        compare(one, other)
    });
}

const COMPARED_AT_ONCE: u32 = 1_000;
