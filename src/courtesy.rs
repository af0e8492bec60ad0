//! Long work that gives way to requests.
//!
//! A thread that never waits is left running until its slice ends, which is 1 to 4 ms on Linux, and a request that comes
//! meanwhile to the same processor waits for as long. What works through thousands of keys therefore offers the processor
//! every tenth of a millisecond. Where nobody wants it that costs a system call of less than a microsecond.
//!
//! Whoever takes it may never wait either, and would be left running for a whole slice each time: a snapshot would then
//! take minutes, and a change would wait as long for the database. So after it was away the work goes on for as long
//! as it was, and has half of a processor at the least.

use std::cmp::Ordering;
use std::io::{self, Write};
use std::time::{Duration, Instant};

/// Counts the steps of such work.
#[derive(Debug)]
pub(crate) struct Courtesy {
    at_once: u32,
    done: u32,
    /// Nothing is offered before.
    next: Option<Instant>,
}

impl Courtesy {
    /// Offers the processor after every `at_once` steps.
    pub const fn every(at_once: u32) -> Self {
        Courtesy {
            at_once,
            done: 0,
            next: None,
        }
    }

    /// One more step is about to be done.
    #[inline]
    pub fn step(&mut self) {
        self.done += 1;
        if self.done >= self.at_once {
            self.done = 0;
            self.offer();
        }
    }

    fn offer(&mut self) {
        self.offer_at(Instant::now(), || {
            std::thread::yield_now();
            Instant::now()
        });
    }

    /// `away` answers when it is back.
    fn offer_at(&mut self, now: Instant, away: impl FnOnce() -> Instant) {
        if self.next.is_none_or(|next| now >= next) {
            let back = away();
            self.next = Some(back + (back - now).min(AT_MOST));
        }
    }
}

/// However long it was away, which may have been for other reasons, too.
const AT_MOST: Duration = Duration::from_millis(10);

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_goes_on_for_as_long_as_it_was_away() {
        let start = Instant::now();
        let ms = |ms| start + Duration::from_millis(ms);
        let mut courtesy = Courtesy::every(1);
        let mut is_offered = |now, back| {
            let mut offered = false;
            courtesy.offer_at(now, || {
                offered = true;
                back
            });
            offered
        };
        assert!(is_offered(ms(1), ms(4)), "at the first time");
        assert!(
            !is_offered(ms(5), ms(5)),
            "not while it makes up for three milliseconds"
        );
        assert!(!is_offered(ms(6), ms(6)));
        assert!(is_offered(ms(7), ms(7)), "then again");
        assert!(is_offered(ms(7), ms(60_000)), "at once where nobody took it");
        assert!(is_offered(ms(60_010), ms(60_010)), "and never much later");
    }
}
