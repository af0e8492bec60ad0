//! Ways from secrets to slots: a `DashMap` of blocks of pages, a page for some six secrets whose digests lead there.
//!
//! One secret to an entry would be a map whose own index, at a million secrets, lies in memory and not in the
//! processor's cache: a decision would wait once for the index and again for the entry. Blocks are so few that all of the
//! map stays in the first cache. A page is one cache line: the tags of its secrets, the numbers of their slots, and where
//! the windows of their keys were when somebody last looked, so that those are asked for together with the slots. The fewer
//! pages there are, the more of them stay in the last cache: all of it takes ten bytes a secret.
//!
//! A tag is one byte of the digest; the whole of it is compared in the slot. Chance does not deal evenly: secrets that
//! find their page full, one in twenty-five, lie in the next one that is not, and each page they passed by counts them. So a
//! lookup ends at the first page that nobody passed by (Knuth, *The Art of Computer Programming* 3, section 6.4: open
//! addressing with buckets).
//!
//! Nothing but the hints is changed once it is built: what is published is a read-only view, whose lookups take no lock.

use super::key::SecretDigest;
use super::places::{NO_PLACE, PlaceId};
use super::slots::{NONE, Slot, SlotId, Slots};
use dashmap::mapref::one::MappedRefMut;
use dashmap::{DashMap, ReadOnlyView};
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};

/// Secrets that a page has room for: as many as fill a cache line.
const PLACES: usize = 9;
/// So many of the places are filled, some six of each page, and the rest is left empty: most secrets find room where they belong.
const FILLED: (usize, usize) = (7, 10);
/// Where more than so many of the places are taken, there are too few pages: a lookup of what is not there would look at two or
/// three and more.
const FILLED_AT_MOST: (usize, usize) = (5, 6);
/// Pages to a block. At a million secrets there are some 70 blocks.
const BLOCK: u32 = 2_048;

/// Pages that follow each other, the first of which has a multiple of [`BLOCK`] for its number.
type Block = Box<[Page]>;

#[derive(Clone, Debug)]
#[repr(C, align(64))]
struct Page {
    /// [`NONE`] where there is no secret.
    slots: [SlotId; PLACES],
    hints: [Hint; PLACES],
    tags: [u8; PLACES],
    /// How many secrets found this page full and lie in a later one; [`u8::MAX`] for as many or more, for good.
    passed_by: u8,
}

/// The place of a key's windows, as it was; among those of the key's owner slot. Relaxed: nothing is believed on the
/// strength of it.
#[derive(Debug)]
pub(super) struct Hint(AtomicU16);

/// Where a secret is, and where its key's windows may be.
#[derive(Clone, Copy)]
pub(super) struct Found<'s> {
    pub id: SlotId,
    pub slot: &'s Slot,
    pub hint: &'s Hint,
}

/// Ways from secrets to slots, never changed again.
pub(super) struct Secrets {
    blocks: ReadOnlyView<u32, Block, NumberHash>,
    spread: Spread,
    len: usize,
}

/// [`Secrets`] in the making.
pub(super) struct SecretsBuilder {
    blocks: DashMap<u32, Block, NumberHash>,
    spread: Spread,
    len: usize,
}

/// How digests are dealt to pages.
#[derive(Clone, Copy)]
struct Spread {
    /// How many pages there would be if each block had a secret.
    pages: u32,
    /// Chosen by chance, so that nobody can look for secrets that all lead to one page.
    factor: u64,
}

/// Shards of a map, the fewest there can be: one thread builds it, and it is read without locks.
const SHARDS: usize = 2;

impl Secrets {
    /// The slot that holds the secret, if any.
    #[inline(always)]
    pub fn find<'s>(&'s self, slots: &'s Slots, digest: &SecretDigest) -> Option<Found<'s>> {
        let first = self.spread.first(digest);
        let page = self.page(first)?;
        match page.find_in(slots, digest) {
            None if page.passed_by > 0 => self.find_further(slots, digest, first),
            found => found,
        }
    }

    /// In the pages after that.
    #[cold]
    #[inline(never)]
    fn find_further<'s>(&'s self, slots: &'s Slots, digest: &SecretDigest, first: u32) -> Option<Found<'s>> {
        for number in self.spread.after(first) {
            let page = self.page(number)?;
            let found = page.find_in(slots, digest);
            if found.is_some() || page.passed_by == 0 {
                return found;
            }
        }
        None
    }

    #[inline(always)]
    fn page(&self, number: u32) -> Option<&Page> {
        self.blocks.get(&(number / BLOCK))?.get((number % BLOCK) as usize)
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn slots(&self) -> impl Iterator<Item = SlotId> {
        let pages = self.blocks.values().flatten();
        pages.flat_map(|page| page.slots).filter(|id| *id != NONE)
    }
}

impl SecretsBuilder {
    pub fn with_capacity(secrets: usize) -> Self {
        let places = secrets.saturating_mul(FILLED.1).div_ceil(FILLED.0);
        let pages = u32::try_from(places.div_ceil(PLACES).max(1)).unwrap_or(u32::MAX);
        let blocks = pages.div_ceil(BLOCK) as usize;
        SecretsBuilder {
            blocks: DashMap::with_capacity_and_hasher_and_shard_amount(blocks, NumberHash::default(), SHARDS),
            spread: Spread {
                pages,
                factor: ahash::RandomState::new().hash_one(pages) | 1,
            },
            len: 0,
        }
    }

    /// Leads the digest to the slot, which holds it. `false`: another slot holds the same secret.
    pub fn put(&mut self, slots: &Slots, digest: &SecretDigest, id: SlotId) -> bool {
        if (self.len + 1) * FILLED_AT_MOST.1 > self.spread.pages as usize * PLACES * FILLED_AT_MOST.0 {
            self.grow(slots);
        }
        let tag = tag_of(digest);
        let same = |held: SlotId| {
            let holds = || slots.get(held).is_some_and(|slot| slot.holds(digest));
            (held == id || holds()).then_some(held)
        };
        let (mut room, mut full) = (None, vec![]);
        for number in self.spread.from(digest) {
            let page = self.page(number);
            if let Some(held) = page.find(tag, |place| same(page.slots[place])) {
                return held == id;
            }
            if room.is_none() {
                match page.place_of(|held, _| held == NONE) {
                    Some(place) => room = Some((number, place)),
                    None => full.push(number),
                }
            }
            if page.passed_by == 0 && room.is_some() {
                break;
            }
        }
        if let Some((number, place)) = room {
            self.page(number).fill(place, tag, id, hint_for(slots, id));
        }
        for number in full {
            let mut page = self.page(number);
            page.passed_by = page.passed_by.saturating_add(1);
        }
        self.len += 1;
        true
    }

    /// Removes the way from a digest to a slot, if it is there.
    pub fn remove(&mut self, digest: &SecretDigest, id: SlotId) {
        let way = (id, tag_of(digest));
        let mut passed_by = vec![];
        for number in self.spread.from(digest) {
            let mut page = self.page(number);
            if let Some(place) = page.place_of(|held, tag| (held, tag) == way) {
                page.fill(place, 0, NONE, NO_PLACE);
                drop(page);
                self.len -= 1;
                for number in passed_by {
                    let mut page = self.page(number);
                    if page.passed_by < u8::MAX {
                        page.passed_by -= 1;
                    }
                }
                return;
            }
            if page.passed_by == 0 {
                return;
            }
            passed_by.push(number);
        }
    }

    /// Deals all anew over twice as many pages.
    fn grow(&mut self, slots: &Slots) {
        let mut grown = SecretsBuilder::with_capacity(self.len.max(PLACES) * 2);
        let held = std::mem::replace(self, SecretsBuilder::with_capacity(0));
        for id in held.build().slots() {
            if let Some(slot) = slots.get(id).filter(|slot| slot.holds_secret()) {
                grown.put(slots, &slot.digest(), id);
            }
        }
        *self = grown;
    }

    /// The page with this number. No other may be asked for while it is held: both may be in one shard of the map.
    fn page(&self, number: u32) -> MappedRefMut<'_, u32, Block, Page> {
        let block = self.blocks.entry(number / BLOCK).or_insert_with(|| {
            let pages = BLOCK.min(self.spread.pages - number / BLOCK * BLOCK);
            (0..pages).map(|_| Page::empty()).collect()
        });
        block.map(|block| &mut block[(number % BLOCK) as usize])
    }

    pub fn build(self) -> Secrets {
        Secrets {
            blocks: self.blocks.into_read_only(),
            spread: self.spread,
            len: self.len,
        }
    }
}

impl From<&Secrets> for SecretsBuilder {
    fn from(secrets: &Secrets) -> Self {
        SecretsBuilder {
            blocks: secrets.blocks.clone().into_inner(),
            spread: secrets.spread,
            len: secrets.len,
        }
    }
}

impl Spread {
    /// The number of the page where a digest's secret belongs.
    #[inline(always)]
    fn first(self, digest: &SecretDigest) -> u32 {
        let [a, b, c, d, e, f, g, h, ..] = digest.0;
        let mixed = u64::from_ne_bytes([a, b, c, d, e, f, g, h]).wrapping_mul(self.factor);
        ((u128::from(mixed) * u128::from(self.pages)) >> 64) as u32
    }

    /// The numbers of the pages after one, in the order in which a secret looks for room in them.
    fn after(self, first: u32) -> impl Iterator<Item = u32> {
        (first + 1..self.pages).chain(0..first)
    }

    /// The numbers of all pages in the order in which a digest's secret looks for room in them.
    fn from(self, digest: &SecretDigest) -> impl Iterator<Item = u32> + use<> {
        let first = self.first(digest);
        std::iter::once(first).chain(self.after(first))
    }
}

impl Hint {
    /// The place where the windows may be.
    #[inline(always)]
    pub fn place(&self) -> PlaceId {
        self.0.load(Relaxed)
    }

    /// Says where they are.
    pub fn correct(&self, place: PlaceId) {
        self.0.store(place, Relaxed);
    }
}

impl Clone for Hint {
    fn clone(&self) -> Self {
        Hint(AtomicU16::new(self.place()))
    }
}

impl Page {
    fn empty() -> Self {
        Page {
            slots: [NONE; PLACES],
            hints: [const { Hint(AtomicU16::new(NO_PLACE)) }; PLACES],
            tags: [0; PLACES],
            passed_by: 0,
        }
    }

    /// The slot that holds the secret, if it is one of this page's.
    #[inline(always)]
    fn find_in<'s>(&'s self, slots: &'s Slots, digest: &SecretDigest) -> Option<Found<'s>> {
        self.find(tag_of(digest), |place| {
            let id = self.slots[place];
            let slot = slots.get(id).filter(|slot| slot.holds(digest))?;
            let hint = &self.hints[place];
            Some(Found { id, slot, hint })
        })
    }

    /// What `accept` makes of the first secret with this tag that it accepts.
    #[inline(always)]
    fn find<R>(&self, tag: u8, accept: impl Fn(usize) -> Option<R>) -> Option<R> {
        let mut same = self.places_with(tag);
        while same != 0 {
            let place = (same.trailing_zeros() as usize + 1) / 8;
            if let Some(found) = accept(place) {
                return Some(found);
            }
            same &= same - 1;
        }
        None
    }

    /// A bit for each place with this tag: the lowest for the first place, the highest of each byte for the others; and now
    /// and then one for a place with another tag, after one that has this. All are compared at once, whichever it is: the
    /// processor could not guess where to stop.
    #[inline(always)]
    fn places_with(&self, tag: u8) -> u64 {
        const ONES: u64 = u64::from_ne_bytes([1; 8]);
        let [first, others @ ..] = self.tags;
        // A byte of 0 is where they agree: it borrows from its own highest bit (Mycroft's test).
        let differing = u64::from_le_bytes(others) ^ (ONES * u64::from(tag));
        let agreeing = differing.wrapping_sub(ONES) & !differing & (ONES << 7);
        agreeing | u64::from(first == tag)
    }

    /// The first place of which that holds; asked with the slot and the tag.
    fn place_of(&self, is_it: impl Fn(SlotId, u8) -> bool) -> Option<usize> {
        (0..PLACES).find(|place| is_it(self.slots[*place], self.tags[*place]))
    }

    fn fill(&mut self, place: usize, tag: u8, id: SlotId, windows: PlaceId) {
        self.tags[place] = tag;
        self.slots[place] = id;
        self.hints[place] = Hint(AtomicU16::new(windows));
    }
}

/// The place of the windows of the key whose secret is in this slot.
fn hint_for(slots: &Slots, id: SlotId) -> PlaceId {
    let owner = slots.get(id).and_then(|slot| slot.owner(id));
    owner.map_or(NO_PLACE, |owner| slots.place(owner))
}

#[inline(always)]
fn tag_of(digest: &SecretDigest) -> u8 {
    digest.0[31]
}

type NumberHash = BuildHasherDefault<NumberHasher>;

/// One multiplication (by 2^64 / φ, Knuth's) spreads a block's number over the 64 bits that the map wants: high ones
/// choose the shard and the tag, low ones the bucket.
#[derive(Default)]
struct NumberHasher(u64);

impl Hasher for NumberHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write_u32(&mut self, number: u32) {
        self.0 = u64::from(number).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u32(self.0 as u32 ^ u32::from(*byte));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(n: u32) -> SecretDigest {
        SecretDigest::of(&n.to_ne_bytes())
    }

    fn slots_with(secrets: u32) -> Slots {
        let slots = Slots::new();
        for id in 0..secrets {
            assert!(slots.allocate(id));
            slots.get(id).unwrap().put(&digest(id));
        }
        slots
    }

    #[test]
    fn a_page_is_a_cache_line() {
        assert_eq!(size_of::<Page>(), 64);
    }

    #[test]
    fn every_secret_is_found_however_few_were_expected() {
        const SECRETS: u32 = 5_000;
        let slots = slots_with(SECRETS);
        for expected in [0, 100, SECRETS as usize, 20_000] {
            let mut builder = SecretsBuilder::with_capacity(expected);
            for id in 0..SECRETS {
                assert!(builder.put(&slots, &digest(id), id) && builder.put(&slots, &digest(id), id));
            }
            assert!(!builder.put(&slots, &digest(7), 8), "held by slot 7");
            let places = builder.spread.pages as usize * PLACES;
            assert!(SECRETS as usize <= places, "{places}");
            let mut again = SecretsBuilder::from(&builder.build());
            for id in 0..SECRETS / 2 {
                again.remove(&digest(id), id);
                again.remove(&digest(id), id);
            }
            let secrets = again.build();
            assert_eq!(secrets.len(), SECRETS as usize / 2);
            assert_eq!(secrets.slots().count(), SECRETS as usize / 2);
            for id in 0..SECRETS + 100 {
                let found = secrets.find(&slots, &digest(id)).map(|found| found.id);
                assert_eq!(found, (SECRETS / 2..SECRETS).contains(&id).then_some(id), "{id}");
            }
            let mut empty = SecretsBuilder::from(&secrets);
            (SECRETS / 2..SECRETS).for_each(|id| empty.remove(&digest(id), id));
            let passed_by = |secrets: &Secrets| secrets.blocks.values().flatten().any(|page| page.passed_by > 0);
            let is_tight = expected == SECRETS as usize;
            assert!(!is_tight || passed_by(&secrets), "chance does not deal evenly");
            assert!(!passed_by(&empty.build()), "nobody is there who passed by");
        }
    }

    #[test]
    fn a_table_is_filled_no_further_than_lookups_are_short() {
        const SECRETS: u32 = 50_000;
        let slots = slots_with(SECRETS);
        let mut builder = SecretsBuilder::with_capacity(SECRETS as usize);
        assert!((0..SECRETS).all(|id| builder.put(&slots, &digest(id), id)));
        let secrets = builder.build();
        let pages_of = |digest: &SecretDigest| {
            let after = secrets.spread.from(digest).map(|number| secrets.page(number));
            1 + after
                .take_while(|page| {
                    page.is_some_and(|page| page.passed_by > 0 && page.find_in(&slots, digest).is_none())
                })
                .count()
        };
        let looked_at: usize = (0..SECRETS).map(|id| pages_of(&digest(id))).sum();
        let for_unknown: usize = (SECRETS..2 * SECRETS).map(|id| pages_of(&digest(id))).sum();
        let (average, unknown) = (
            looked_at as f64 / f64::from(SECRETS),
            for_unknown as f64 / f64::from(SECRETS),
        );
        assert!(average < 1.08, "{average} pages for a secret that is there");
        assert!(unknown < 1.3, "{unknown} pages for one that is not");
    }

    #[test]
    fn secrets_with_one_page_and_tag_are_told_apart() {
        let slots = Slots::new();
        let digest = |n: u8| {
            let mut bytes = [9; 32];
            bytes[20] = n;
            SecretDigest(bytes)
        };
        let mut builder = SecretsBuilder::with_capacity(1_000);
        for n in 0..40 {
            assert!(slots.allocate(n.into()));
            slots.get(n.into()).unwrap().put(&digest(n));
            assert!(builder.put(&slots, &digest(n), n.into()));
        }
        let secrets = builder.build();
        for n in 0..41 {
            let found = secrets.find(&slots, &digest(n)).map(|found| found.id);
            assert_eq!(found, (n < 40).then_some(n.into()));
        }
    }
}
