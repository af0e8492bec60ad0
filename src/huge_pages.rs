//! Huge pages for the tables of keys, and for nothing else of a gate.
//!
//! Where Linux leaves it to the asker (`transparent_hugepage` = `madvise`), the allocator asks for huge pages for all of its
//! memory. Tables of keys are filled at once and read at random: a decision among a million cold keys took 0.53 µs with
//! huge pages and 0.70 without, when that was measured. Anything else pays more for them than it gains, because whoever touches one first waits
//! until 2 MiB are zeroed, and with it all requests of that thread: 10,000 slow connections trebled the p99 of everybody
//! else by that alone, which `cargo bench --bench hostile` would show again.
//!
//! The flag is one of the whole process, so it is only touched in one that said [`for_tables_only`]: not where the gate is
//! a library in somebody else's.

use std::sync::{Mutex, PoisonError};

/// How many tables are being filled; none before [`for_tables_only`].
static FILLING: Mutex<Option<usize>> = Mutex::new(None);

/// From now on this process gets huge pages only while it fills a table ([`TableBeingFilled`]).
pub(crate) fn for_tables_only() {
    let mut filling = FILLING.lock().unwrap_or_else(PoisonError::into_inner);
    if filling.is_none() {
        *filling = Some(0);
        set(false);
    }
}

/// A table of keys is being filled for as long as this lives.
#[derive(Debug)]
pub(crate) struct TableBeingFilled(());

impl TableBeingFilled {
    pub fn new() -> Self {
        change(|filling| filling + 1);
        TableBeingFilled(())
    }
}

impl Drop for TableBeingFilled {
    fn drop(&mut self) {
        change(|filling| filling.saturating_sub(1));
    }
}

fn change(count: impl FnOnce(usize) -> usize) {
    let mut filling = FILLING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(before) = *filling {
        let after = count(before);
        *filling = Some(after);
        if (before == 0) != (after == 0) {
            set(after > 0);
        }
    }
}

/// Pages that are there already stay as they are.
fn set(huge: bool) {
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::thread::disable_transparent_huge_pages(!huge) {
        log::debug!("huge pages are left as they are: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::thread::transparent_huge_pages_are_disabled;

    /// One test for all, as there is one flag.
    #[test]
    fn huge_pages_are_had_while_a_table_is_being_filled() {
        let are_had = || !transparent_huge_pages_are_disabled().unwrap();
        let before = are_had();
        drop(TableBeingFilled::new());
        assert_eq!(are_had(), before, "nobody has said that the flag is ours");
        for_tables_only();
        assert!(!are_had());
        let (one, other) = (TableBeingFilled::new(), TableBeingFilled::new());
        assert!(are_had());
        for_tables_only();
        drop(one);
        assert!(are_had(), "another one is still being filled");
        drop(other);
        assert!(!are_had());
    }
}
