//! Long work that gives way to requests.
//!
//! A thread that never waits is left running until its slice ends, which is 1 to 4 ms on Linux, and a request that comes
//! meanwhile to the same processor waits for as long. What works through thousands of keys therefore offers the processor
//! every tenth of a millisecond. Where nobody wants it that costs a system call of less than a microsecond.

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
