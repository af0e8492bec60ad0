//! Ways from secrets to slots: a `DashMap` of blocks of pages, a page for some dozen secrets whose digests begin alike.
//!
//! One secret to an entry would be a map whose own index, at a million secrets, lies in memory and not in the
//! processor's cache: a decision would wait once for the index and again for the entry. Blocks are so few that all of the
//! map stays in the first cache. A page is two cache lines, asked for together: the tags of its secrets, the numbers of their
//! slots, and where the windows of their keys were when somebody last looked, so that those are asked for together with the
//! slots.
//!
//! A tag is two bytes of the digest; the whole of it is compared in the slot. Chance does not deal evenly: secrets that
//! find their page full, one in fifty, lie in a small map of their own.
//!
//! Nothing but these hints is changed once it is built: what is published is a read-only view, whose lookups take no lock.

use super::key::SecretDigest;
use super::places::{NO_PLACE, PlaceId};
use super::slots::{NONE, Slot, SlotId, Slots};
use dashmap::{DashMap, ReadOnlyView};
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};

/// Secrets that a page has room for: as many as fill two cache lines.
const PLACES: usize = 15;
/// Secrets to a page on average. More would fill more pages, fewer would leave more of them empty.
const AVERAGE: usize = 11;
/// Where more than one secret in so many found its page full, there are too few pages.
const SPILLED_AT_MOST: usize = 8;
/// Pages to a block. At a million secrets there are some 360 blocks.
const BLOCK: u32 = 256;

/// Pages that follow each other, the first of which has a multiple of [`BLOCK`] for its number.
type Block = Box<[Page]>;

#[derive(Clone, Debug)]
#[repr(C, align(64))]
struct Page {
    /// [`NONE`] where there is no secret.
    slots: [SlotId; PLACES],
    tags: [u16; PLACES],
    hints: [Hint; PLACES],
    /// Secrets of this page lie in the map for those.
    spilled: bool,
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
    /// Absent where the secret's page was full.
    pub hint: Option<&'s Hint>,
}

/// Ways from secrets to slots, never changed again.
pub(super) struct Secrets {
    blocks: ReadOnlyView<u32, Block, NumberHash>,
    /// How many pages there would be if each block had a secret.
    pages: u32,
    spilled: ReadOnlyView<[u8; 32], SlotId, ahash::RandomState>,
    len: usize,
}

/// [`Secrets`] in the making.
pub(super) struct SecretsBuilder {
    blocks: DashMap<u32, Block, NumberHash>,
    pages: u32,
    spilled: DashMap<[u8; 32], SlotId, ahash::RandomState>,
    len: usize,
}

/// Shards of a map, the fewest there can be: one thread builds it, and it is read without locks.
const SHARDS: usize = 2;

impl Secrets {
    /// The slot that holds the secret, if any.
    #[inline(always)]
    pub fn find<'s>(&'s self, slots: &'s Slots, digest: &SecretDigest) -> Option<Found<'s>> {
        let (block, page) = place_of(digest, self.pages);
        let page = self.blocks.get(&block)?.get(page)?;
        page.fetch();
        let holding = |id: SlotId, hint| {
            let slot = slots.get(id).filter(|slot| slot.holds(digest))?;
            Some(Found { id, slot, hint })
        };
        if let Some(found) = page.find(tag_of(digest), |place| {
            holding(page.slots[place], Some(&page.hints[place]))
        }) {
            return Some(found);
        }
        if page.spilled {
            return self.spilled.get(&digest.0).and_then(|id| holding(*id, None));
        }
        None
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn slots(&self) -> impl Iterator<Item = SlotId> {
        let pages = self.blocks.values().flatten();
        pages
            .flat_map(|page| page.slots)
            .filter(|id| *id != NONE)
            .chain(self.spilled.values().copied())
    }
}

impl SecretsBuilder {
    pub fn with_capacity(secrets: usize) -> Self {
        let pages = u32::try_from(secrets.div_ceil(AVERAGE).max(1)).unwrap_or(u32::MAX);
        let blocks = pages.div_ceil(BLOCK) as usize;
        SecretsBuilder {
            blocks: DashMap::with_capacity_and_hasher_and_shard_amount(blocks, NumberHash::default(), SHARDS),
            pages,
            spilled: DashMap::with_hasher_and_shard_amount(ahash::RandomState::new(), SHARDS),
            len: 0,
        }
    }

    /// Leads the digest to the slot, which holds it. `false`: another slot holds the same secret.
    pub fn put(&mut self, slots: &Slots, digest: &SecretDigest, id: SlotId) -> bool {
        let (number, place) = place_of(digest, self.pages);
        let tag = tag_of(digest);
        let mut block = self.blocks.entry(number).or_insert_with(|| {
            let pages = BLOCK.min(self.pages - number * BLOCK);
            (0..pages).map(|_| Page::empty()).collect()
        });
        let page = &mut block[place];
        let same = |held: SlotId| {
            let holds = || slots.get(held).is_some_and(|slot| slot.holds(digest));
            (held == id || holds()).then_some(held)
        };
        let spilled = || self.spilled.get(&digest.0).and_then(|held| same(*held));
        if let Some(held) = page.find(tag, |place| same(page.slots[place])).or_else(spilled) {
            return held == id;
        }
        self.len += 1;
        match page.slots.iter().position(|held| *held == NONE) {
            Some(place) => page.fill(place, tag, id, hint_for(slots, id)),
            None => {
                page.spilled = true;
                drop(block);
                self.spilled.insert(digest.0, id);
                if self.spilled.len() > RECENT_SPILLED + self.len / SPILLED_AT_MOST {
                    self.grow(slots);
                }
            }
        }
        true
    }

    /// Removes the way from a digest to a slot, if it is there.
    pub fn remove(&mut self, digest: &SecretDigest, id: SlotId) {
        let (block, page) = place_of(digest, self.pages);
        if let Some(mut block) = self.blocks.get_mut(&block)
            && let Some(place) = block[page].slots.iter().position(|held| *held == id)
        {
            block[page].fill(place, 0, NONE, NO_PLACE);
            self.len -= 1;
        } else if self.spilled.remove_if(&digest.0, |_, held| *held == id).is_some() {
            self.len -= 1;
        }
    }

    /// Deals all anew over twice as many pages.
    fn grow(&mut self, slots: &Slots) {
        let mut grown = SecretsBuilder::with_capacity(self.len.max(self.pages as usize * AVERAGE) * 2);
        let held = std::mem::replace(self, SecretsBuilder::with_capacity(0));
        for id in held.build().slots() {
            if let Some(slot) = slots.get(id).filter(|slot| slot.holds_secret()) {
                grown.put(slots, &slot.digest(), id);
            }
        }
        *self = grown;
    }

    pub fn build(self) -> Secrets {
        Secrets {
            blocks: self.blocks.into_read_only(),
            pages: self.pages,
            spilled: self.spilled.into_read_only(),
            len: self.len,
        }
    }
}

/// So few may have found their pages full in any map: a small one is not to be made larger for them.
const RECENT_SPILLED: usize = 64;

impl From<&Secrets> for SecretsBuilder {
    fn from(secrets: &Secrets) -> Self {
        SecretsBuilder {
            blocks: secrets.blocks.clone().into_inner(),
            pages: secrets.pages,
            spilled: secrets.spilled.clone().into_inner(),
            len: secrets.len,
        }
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
            tags: [0; PLACES],
            hints: [const { Hint(AtomicU16::new(NO_PLACE)) }; PLACES],
            spilled: false,
        }
    }

    /// Asks the memory for the second of the page's cache lines, so that both come at once.
    #[inline(always)]
    fn fetch(&self) {
        std::hint::black_box(self.spilled);
    }

    /// What `accept` makes of the first secret with this tag that it accepts.
    #[inline(always)]
    fn find<R>(&self, tag: u16, accept: impl Fn(usize) -> Option<R>) -> Option<R> {
        // All are compared, whichever it is: the processor could not guess where to stop.
        let mut same = 0_u32;
        for (place, held) in self.tags.iter().enumerate() {
            same |= u32::from(*held == tag) << place;
        }
        while same != 0 {
            let place = same.trailing_zeros() as usize;
            if let Some(found) = accept(place) {
                return Some(found);
            }
            same &= same - 1;
        }
        None
    }

    fn fill(&mut self, place: usize, tag: u16, id: SlotId, windows: PlaceId) {
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

/// The number of the block that a digest's page is in, and the page's place there.
#[inline]
fn place_of(digest: &SecretDigest, pages: u32) -> (u32, usize) {
    let [a, b, c, d, ..] = digest.0;
    let prefix = u32::from_ne_bytes([a, b, c, d]);
    let number = ((u64::from(prefix) * u64::from(pages)) >> 32) as u32;
    (number / BLOCK, (number % BLOCK) as usize)
}

#[inline]
fn tag_of(digest: &SecretDigest) -> u16 {
    u16::from_ne_bytes([digest.0[4], digest.0[5]])
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
    fn a_page_is_two_cache_lines() {
        assert_eq!(size_of::<Page>(), 128);
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
            let spilled = builder.spilled.len();
            assert!(
                spilled <= RECENT_SPILLED + SECRETS as usize / SPILLED_AT_MOST,
                "{spilled}"
            );
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
        }
    }

    #[test]
    fn secrets_with_one_page_and_tag_are_told_apart() {
        let slots = Slots::new();
        let digest = |n: u8| {
            let mut bytes = [9; 32];
            bytes[31] = n;
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
