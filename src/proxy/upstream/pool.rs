//! Connections to one server that wait for another request.
//!
//! Pingora's pool has a task that watches each idle connection, woken to get it back. Nobody watches here: the reactor
//! notices a server's end by itself, so that the look at a connection that is taken costs no system call, and what has
//! rested too long is closed from time to time ([`Pool::close_old`]).

use super::super::guard::LazyTimer;
use bytes::BytesMut;
use futures_util::FutureExt as _;
use pingora::protocols::l4::stream::Stream;
use std::collections::VecDeque;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::AsyncReadExt as _;

/// A connection to a server, between two requests or carrying one.
pub(in crate::proxy) struct Connection {
    pub stream: Box<Stream>,
    /// The request's head, then what was read of its response.
    pub buffer: BytesMut,
    /// For what the server takes its time with. Bound to the runtime that first waited for it; the process ends before
    /// any of them does.
    pub timer: LazyTimer,
    /// Nothing has happened on it after which a further request could be misunderstood.
    pub is_sound: bool,
}

/// The idle connections to one server.
#[derive(Debug)]
pub(super) struct Pool {
    /// In the order in which they came to rest. The last one is the first to go: what is not needed grows old in front.
    idle: Mutex<VecDeque<Idle>>,
    most: usize,
}

#[derive(Debug)]
struct Idle {
    connection: Connection,
    since_ns: u64,
}

impl Connection {
    pub fn new(stream: Box<Stream>) -> Self {
        Connection {
            stream,
            buffer: BytesMut::new(),
            timer: LazyTimer::default(),
            is_sound: true,
        }
    }

    /// Neither closed by the server, nor has it said anything that nobody asked for.
    fn is_quiet(&mut self) -> bool {
        let mut byte = [0];
        // A task that has used up its turn would find every connection quiet.
        let read = tokio::task::unconstrained(self.stream.read(&mut byte));
        read.now_or_never().is_none()
    }
}

impl Pool {
    /// One that keeps `most` connections at most.
    pub fn new(most: usize) -> Self {
        Pool {
            idle: Mutex::default(),
            most,
        }
    }

    /// A connection that has rested for less than `timeout` and is still good, as far as one can tell from here.
    pub fn take(&self, timeout: Duration, now_ns: u64) -> Option<Connection> {
        loop {
            let mut idle = self.lock().pop_back()?;
            if idle.is_older_than(timeout, now_ns) {
                // So are all before it. Closed when nobody waits for it, as below.
                let older = std::mem::take(&mut *self.lock());
                drop(older);
                return None;
            }
            if idle.connection.is_quiet() {
                return Some(idle.connection);
            }
        }
    }

    /// Keeps a connection for the next request; where there are enough, instead of the one that has rested longest.
    pub fn put(&self, mut connection: Connection, now_ns: u64) {
        if !connection.is_sound || self.most == 0 {
            return;
        }
        connection.buffer.clear();
        if connection.buffer.capacity() > MOST_AT_REST {
            connection.buffer = BytesMut::new();
        }
        let mut idle = self.lock();
        let one_too_many = if idle.len() < self.most { None } else { idle.pop_front() };
        idle.push_back(Idle {
            connection,
            since_ns: now_ns,
        });
        // Closed when nobody waits for it.
        drop(idle);
        drop(one_too_many);
    }

    /// Closes what has rested for `timeout`, and what its server has closed.
    pub fn close_old(&self, timeout: Duration, now_ns: u64) {
        let mut closed = Vec::new();
        let mut idle = self.lock();
        for mut one in std::mem::take(&mut *idle) {
            if one.is_older_than(timeout, now_ns) || !one.connection.is_quiet() {
                closed.push(one);
            } else {
                idle.push_back(one);
            }
        }
        drop(idle);
        drop(closed);
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Idle>> {
        // Whoever panicked had put one in, or had not.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Idle {
    fn is_older_than(&self, timeout: Duration, now_ns: u64) -> bool {
        u128::from(now_ns.saturating_sub(self.since_ns)) >= timeout.as_nanos()
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the buffer, which may hold anything.
        f.debug_struct("Connection").finish_non_exhaustive()
    }
}

/// A connection at rest keeps no more room than this, in bytes: enough for a usual head and a short answer.
const MOST_AT_REST: usize = 8 * 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt as _;
    use tokio::net::{TcpListener, TcpStream};

    const SECOND: u64 = 1_000_000_000;

    async fn pair(listener: &TcpListener) -> (Connection, TcpStream) {
        let ours = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (theirs, _) = listener.accept().await.unwrap();
        (Connection::new(Box::new(Stream::from(ours))), theirs)
    }

    /// Whether the other side sees an end soon.
    async fn is_closed(theirs: &mut TcpStream) -> bool {
        let mut byte = [0];
        let read = tokio::time::timeout(Duration::from_secs(5), theirs.read(&mut byte));
        matches!(read.await, Ok(Ok(0)))
    }

    #[tokio::test]
    async fn the_last_one_is_taken_first_and_one_that_ended_or_spoke_never() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let pool = Pool::new(9);
        let mut theirs = Vec::new();
        for at in 0..4 {
            let (connection, other) = pair(&listener).await;
            pool.put(connection, at);
            theirs.push(other);
        }
        let mut spoke = theirs.pop().unwrap();
        spoke.write_all(b"H").await.unwrap();
        drop(theirs.pop());
        // Until both have come: what a pool that nobody asks does with them all the same.
        while pool.lock().len() > 2 {
            pool.close_old(Duration::MAX, 9);
            tokio::task::yield_now().await;
        }
        let mut taken = pool.take(Duration::MAX, 9).unwrap();
        taken.stream.write_all(b"x").await.unwrap();
        let mut byte = [0];
        theirs[1].read_exact(&mut byte).await.unwrap();
        assert_eq!(pool.lock().len(), 1);
        taken.is_sound = false;
        pool.put(taken, 9);
        assert_eq!(pool.lock().len(), 1, "not fit for another request");
    }

    #[tokio::test]
    async fn what_ends_just_before_it_is_taken_is_not_taken() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let pool = Pool::new(9);
        let (connection, other) = pair(&listener).await;
        pool.put(connection, 0);
        drop(other);
        // The reactor has to be let run once; how often that takes is its business.
        for _ in 0..1000 {
            match pool.take(Duration::MAX, 0) {
                Some(connection) => pool.put(connection, 0),
                None => return,
            }
            tokio::task::yield_now().await;
        }
        panic!("a connection that its server has closed is still taken");
    }

    #[tokio::test]
    async fn what_rests_too_long_is_closed_and_no_more_are_kept_than_allowed() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let pool = Pool::new(2);
        let (first, mut first_other) = pair(&listener).await;
        let (second, mut second_other) = pair(&listener).await;
        let (third, _third_other) = pair(&listener).await;
        pool.put(first, 0);
        pool.put(second, 10 * SECOND);
        pool.put(third, 20 * SECOND);
        assert!(is_closed(&mut first_other).await, "the oldest makes room");
        pool.close_old(Duration::from_secs(30), 40 * SECOND);
        assert!(is_closed(&mut second_other).await);
        assert_eq!(pool.lock().len(), 1);
        let too_old = pool.take(Duration::from_secs(30), 50 * SECOND);
        assert!(too_old.is_none() && pool.lock().is_empty());
        let (mut long, _long_other) = pair(&listener).await;
        long.buffer = BytesMut::from(&[0; 20_000][..]);
        pool.put(long, 50 * SECOND);
        let long = pool.take(Duration::MAX, 50 * SECOND).unwrap();
        assert_eq!(long.buffer.capacity(), 0, "what a long request needed is given back");
        let nothing = Pool::new(0);
        let (one, mut one_other) = pair(&listener).await;
        nothing.put(one, 0);
        assert!(is_closed(&mut one_other).await);
    }
}
