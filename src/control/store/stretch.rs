//! Which batches of a run are in the ledger: all up to a number, and beyond it stretches with gaps between them. Most gaps
//! close: one batch overtook another. Some never do: a gate merges batches that it could not send under a number of their
//! own, and a database that was restored from a backup lacks what gates have long delivered.

/// A stretch of batches, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stretch {
    pub first: i64,
    pub last: i64,
}

impl Stretch {
    /// What the batch `number` makes of the two stretches that begin last before the number [`after`] it, in any order.
    /// `None`: it is in the ledger already. Those that begin within the answer have become part of it.
    pub fn with(number: i64, near: &[Stretch]) -> Option<Stretch> {
        let mut joined = Stretch {
            first: number,
            last: number,
        };
        for stretch in near {
            if (stretch.first..=stretch.last).contains(&number) {
                return None;
            }
            if stretch.last == number - 1 {
                joined.first = stretch.first;
            } else if stretch.first == after(number) {
                joined.last = stretch.last;
            }
        }
        Some(joined)
    }
}

/// The number that follows.
pub(super) fn after(number: i64) -> i64 {
    number.saturating_add(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stretch(first: i64, last: i64) -> Stretch {
        Stretch { first, last }
    }

    #[test]
    fn a_batch_joins_what_it_touches() {
        let near = [stretch(20, 30), stretch(10, 15)];
        assert_eq!(Stretch::with(17, &near), Some(stretch(17, 17)));
        assert_eq!(Stretch::with(16, &near), Some(stretch(10, 16)));
        assert_eq!(Stretch::with(19, &near), Some(stretch(19, 30)));
        assert_eq!(Stretch::with(31, &near), Some(stretch(20, 31)));
        assert_eq!(Stretch::with(8, &[]), Some(stretch(8, 8)));
        assert_eq!(
            Stretch::with(16, &[stretch(10, 15), stretch(17, 30)]),
            Some(stretch(10, 30))
        );
        for known in [10, 12, 15, 20, 30] {
            assert_eq!(Stretch::with(known, &near), None, "{known}");
        }
        assert_eq!(Stretch::with(i64::MAX, &[]), Some(stretch(i64::MAX, i64::MAX)));
    }
}
