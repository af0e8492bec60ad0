//! How a large table is spread over several, so that less of it lies empty.
//!
//! A hash table has a power of two of places, of which seven eighths can be used: one of a million entries has two million
//! places, more than half of them for nothing. Four to seven tables of one size come within a quarter of what is needed,
//! whatever that is.

/// How many tables to spread so many entries over; one for few.
pub(super) fn number_for(entries: usize) -> usize {
    const FEW: usize = 1 << 16;
    if entries < FEW {
        return 1;
    }
    let places = |parts: &usize| parts * places_for(share_of(entries, *parts));
    (4..8).min_by_key(places).unwrap_or(1)
}

/// The places of a table that is made for so many entries.
fn places_for(entries: usize) -> usize {
    (entries * 8 / 7).next_power_of_two()
}

/// What a table is to have room for if there are so many of them: its share of the entries, and a hundredth of it more,
/// because chance does not deal evenly.
pub(super) fn share_of(entries: usize, parts: usize) -> usize {
    let share = entries.div_ceil(parts);
    if parts == 1 { share } else { share + share / 100 }
}

/// The table that an entry is in, by 32 bits of its hash.
#[inline]
pub(super) fn of(bits: u32, parts: usize) -> usize {
    ((u64::from(bits) * parts as u64) >> 32) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_more_than_needed_is_the_most_that_is_taken() {
        for entries in (1 << 16..4_000_000).step_by(4_567) {
            let parts = number_for(entries);
            let places = parts * places_for(share_of(entries, parts));
            let needed = entries * 8 / 7;
            assert!(
                places >= needed && places * 4 <= needed * 5 + needed / 10,
                "{entries}: {places}"
            );
        }
    }

    #[test]
    fn every_entry_has_a_table_and_they_get_the_same() {
        for parts in [1, 4, 5, 6, 7] {
            let mut counts = vec![0; parts];
            for bits in (0..u32::MAX - 65_536).step_by(65_536) {
                counts[of(bits, parts)] += 1;
            }
            let (least, most) = (counts.iter().min(), counts.iter().max());
            assert!(
                most.zip(least).is_some_and(|(most, least)| most - least <= 2),
                "{counts:?}"
            );
            assert_eq!((of(0, parts), of(u32::MAX, parts)), (0, parts - 1));
        }
    }
}
