//! How many connections there may be, in all and from one address.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Counts open connections. Cheap to share; a place is given back when its [`Slot`] is dropped.
///
/// Memory follows open connections: an address without any takes none.
#[derive(Debug)]
pub struct Slots {
    most: usize,
    most_per_address: usize,
    open: AtomicUsize,
    shards: [Mutex<HashMap<IpAddr, usize, ahash::RandomState>>; SHARDS],
    hasher: ahash::RandomState,
}

/// One connection's place.
#[derive(Debug)]
pub struct Slot {
    slots: Arc<Slots>,
    address: Option<IpAddr>,
}

/// Why there is no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capped {
    /// As many connections as there may be in all.
    Total,
    /// As many as there may be from this address.
    Address,
}

impl Slots {
    /// Places for `most` connections in all, and for `most_per_address` from one address.
    pub fn new(most: usize, most_per_address: usize) -> Arc<Self> {
        Arc::new(Slots {
            most,
            most_per_address,
            open: AtomicUsize::new(0),
            shards: std::array::from_fn(|_| Mutex::default()),
            hasher: ahash::RandomState::new(),
        })
    }

    /// A place among all.
    ///
    /// # Errors
    /// [`Capped::Total`].
    pub fn take(self: &Arc<Self>) -> Result<Slot, Capped> {
        // Relaxed: the count guards no other memory, and each change of it is one atomic operation.
        if self.open.fetch_add(1, Ordering::Relaxed) >= self.most {
            self.open.fetch_sub(1, Ordering::Relaxed);
            return Err(Capped::Total);
        }
        Ok(Slot {
            slots: self.clone(),
            address: None,
        })
    }

    /// Connections that are open now.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// Addresses that have connections now.
    pub fn addresses(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).len()).sum()
    }

    fn shard(&self, address: IpAddr) -> MutexGuard<'_, HashMap<IpAddr, usize, ahash::RandomState>> {
        lock(&self.shards[self.hasher.hash_one(address) as usize % SHARDS])
    }
}

impl Slot {
    /// Counts this connection for its client's address, too. IPv6 clients are counted by their /64, which is what one
    /// subscriber is given.
    ///
    /// # Errors
    /// [`Capped::Address`].
    pub fn count_for(&mut self, address: IpAddr) -> Result<(), Capped> {
        let address = network_of(address);
        {
            let mut shard = self.slots.shard(address);
            let count = shard.entry(address).or_insert(0);
            if *count >= self.slots.most_per_address {
                if *count == 0 {
                    shard.remove(&address);
                }
                return Err(Capped::Address);
            }
            *count += 1;
        }
        self.address = Some(address);
        Ok(())
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(address) = self.address {
            let mut shard = self.slots.shard(address);
            if let Some(count) = shard.get_mut(&address) {
                *count -= 1;
                if *count == 0 {
                    shard.remove(&address);
                }
            }
        }
        self.slots.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The address itself for IPv4, the /64 for IPv6.
pub fn network_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
        }
        v4 => v4,
    }
}

/// A panic while a shard was locked cannot have left a count half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

const SHARDS: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_come_back() {
        let slots = Slots::new(3, 2);
        let address: IpAddr = "192.0.2.1".parse().unwrap();
        let mut places: Vec<Slot> = (0..3).map(|_| slots.take().unwrap()).collect();
        assert_eq!(slots.take().unwrap_err(), Capped::Total);
        assert!(places[0].count_for(address).is_ok());
        assert!(places[1].count_for("::ffff:192.0.2.1".parse().unwrap()).is_ok());
        assert_eq!(places[2].count_for(address), Err(Capped::Address));
        drop(places.remove(0));
        assert!(places[1].count_for(address).is_ok());
        assert_eq!(slots.open(), 2);
        drop(places);
        assert_eq!((slots.open(), slots.addresses()), (0, 0));
    }

    #[test]
    fn a_subscriber_is_a_64() {
        let slots = Slots::new(10, 1);
        let mut first = slots.take().unwrap();
        first.count_for("2001:db8::1".parse().unwrap()).unwrap();
        let mut second = slots.take().unwrap();
        assert_eq!(second.count_for("2001:db8::2".parse().unwrap()), Err(Capped::Address));
        assert!(second.count_for("2001:db8:0:1::2".parse().unwrap()).is_ok());
    }
}
