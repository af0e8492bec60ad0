//! Lines → the gate. A snapshot is staged aside and takes effect whole, at its end, or not at all; a change takes effect
//! at once. Runs on a thread of its own, where a million lines hold nobody up.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use xxhash_rust::xxh3::Xxh3;

use super::Shared;
use super::lines::{LineSplitter, LineTooLong};
use super::parse::{Line, MAX_LINE_BYTES, ParseError};
use super::plain::read_key;
use super::record::{Change, is_usable};
use crate::courtesy::Courtesy;
use crate::gate::{KeyError, KeyUpdate, Resync};
use crate::huge_pages::TableBeingFilled;

/// The lines of one connection, applied as they come.
pub struct Applier<'s> {
    shared: &'s Shared,
    progress: &'s Progress,
    caps: Caps,
    splitter: LineSplitter,
    state: State<'s>,
}

/// What a snapshot may cost.
#[derive(Clone, Copy, Debug)]
pub struct Caps {
    pub keys: u64,
    pub bytes: u64,
}

/// Why a stream was given up. The gate keeps what it had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FeedError {
    Line(ParseError),
    LineTooLong,
    Unexpected(&'static str),
    /// The source is behind what is in force.
    Older {
        offered: u64,
        in_force: u64,
    },
    Empty,
    TooManyKeys {
        offered: u64,
        cap: u64,
    },
    TooManyBytes {
        cap: u64,
    },
    Checksum,
    /// What the gate itself says.
    Gate(KeyError),
    Cut,
    Ended,
    Silent(Duration),
    SlowSnapshot,
    Status(u16),
    Http(String),
    Compression,
}

impl fmt::Display for FeedError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FeedError::Line(error) => write!(f, "a line cannot be understood: {error}"),
            FeedError::LineTooLong => write!(f, "a line has more than {MAX_LINE_BYTES} bytes"),
            FeedError::Unexpected(what) => f.write_str(what),
            FeedError::Older { offered, in_force } => write!(
                f,
                "it is at revision {offered}, older than {in_force} which is in force (restored from a backup?): refused"
            ),
            FeedError::Empty => {
                f.write_str("its snapshot has no keys while there are some in force (an empty database?): refused")
            }
            FeedError::TooManyKeys { offered, cap } => {
                write!(
                    f,
                    "its snapshot has {offered} keys, more than the {cap} allowed: refused"
                )
            }
            FeedError::TooManyBytes { cap } => write!(f, "its snapshot has more than {cap} bytes: refused"),
            FeedError::Checksum => f.write_str("its snapshot does not have the checksum it should: refused"),
            FeedError::Gate(error) => write!(f, "the gate refuses it: {error}"),
            FeedError::Cut => f.write_str("the stream ended in the middle"),
            FeedError::Ended => f.write_str("the stream ended"),
            FeedError::Silent(limit) => write!(f, "no complete line for {limit:?}"),
            FeedError::SlowSnapshot => f.write_str("its snapshot comes too slowly"),
            FeedError::Status(401 | 403) => f.write_str("it refuses the feed token"),
            FeedError::Status(code) => write!(f, "it answers with status {code}"),
            FeedError::Http(cause) => f.write_str(cause),
            FeedError::Compression => f.write_str("the compressed stream is damaged"),
        }
    }
}

impl FeedError {
    /// Whether the source was reached, but what it said was refused.
    pub fn is_refusal(&self) -> bool {
        !matches!(
            self,
            FeedError::Ended | FeedError::Silent(_) | FeedError::Status(_) | FeedError::Http(_)
        )
    }
}

impl From<LineTooLong> for FeedError {
    fn from(_: LineTooLong) -> Self {
        FeedError::LineTooLong
    }
}

/// How far a stream has come: written by the applier, watched by the reader, which owns the deadlines.
pub struct Progress {
    start: Instant,
    /// Milliseconds from `start` to the last complete line.
    line_at_ms: AtomicU64,
    /// Milliseconds from `start` by which the snapshot must be complete; `u64::MAX`: none is under way.
    snapshot_by_ms: AtomicU64,
    /// Counts what shows that the source is well: heartbeats, changes, snapshots.
    good: AtomicU64,
}

/// A snapshot must come at this rate at least, beside a fixed allowance: some 10 Mbit/s, a million keys in 260 s.
const SLOWEST_KEYS_PER_S: u64 = 4_000;
const SNAPSHOT_ALLOWANCE_MS: u64 = 10_000;

impl Progress {
    pub fn new() -> Self {
        Progress {
            start: Instant::now(),
            line_at_ms: AtomicU64::new(0),
            snapshot_by_ms: AtomicU64::new(u64::MAX),
            good: AtomicU64::new(0),
        }
    }

    /// When to give the stream up, and for what, if nothing more comes.
    pub fn deadline(&self, silence: Duration) -> (Instant, FeedError) {
        // Relaxed: the values stand alone, and the reader looks again when the time has come.
        let line_by = Duration::from_millis(self.line_at_ms.load(Ordering::Relaxed)) + silence;
        let snapshot_by_ms = self.snapshot_by_ms.load(Ordering::Relaxed);
        if Duration::from_millis(snapshot_by_ms) < line_by {
            (
                self.start + Duration::from_millis(snapshot_by_ms),
                FeedError::SlowSnapshot,
            )
        } else {
            (self.start + line_by, FeedError::Silent(silence))
        }
    }

    pub fn good(&self) -> u64 {
        self.good.load(Ordering::Relaxed)
    }

    fn now_ms(&self) -> u64 {
        self.start.elapsed().as_millis() as u64
    }
}

enum State<'g> {
    /// Nothing was read yet. What comes first may be a snapshot, or go on from the revision asked for.
    Following,
    Snapshot(Box<Staging<'g>>),
}

struct Staging<'g> {
    resync: Resync<'g>,
    /// The key read last. The next one is read into it.
    key: KeyUpdate,
    revision: u64,
    expected: u64,
    seen: u64,
    unusable: u64,
    bytes: u64,
    checksum: Xxh3,
    courtesy: Courtesy,
    _filling: TableBeingFilled,
}

impl<'s> Applier<'s> {
    pub fn new(shared: &'s Shared, progress: &'s Progress, caps: Caps) -> Self {
        Applier {
            shared,
            progress,
            caps,
            splitter: LineSplitter::default(),
            state: State::Following,
        }
    }

    /// Applies the lines that `chunk` completes. After an error the applier is of no further use.
    pub fn push(&mut self, chunk: &[u8]) -> Result<(), FeedError> {
        let mut splitter = std::mem::take(&mut self.splitter);
        let mut lines = 0_u64;
        let outcome = splitter.push(chunk, &mut |line| {
            lines += 1;
            self.line(line)
        });
        self.splitter = splitter;
        if lines > 0 {
            self.progress
                .line_at_ms
                .store(self.progress.now_ms(), Ordering::Relaxed);
        }
        outcome
    }

    /// Why the stream's end is one.
    pub fn finish(self) -> FeedError {
        let cut = matches!(self.state, State::Snapshot(_)) || !self.splitter.rest().is_empty();
        if cut { FeedError::Cut } else { FeedError::Ended }
    }

    fn line(&mut self, bytes: &[u8]) -> Result<(), FeedError> {
        if bytes == b"\n" && matches!(self.state, State::Following) {
            return Ok(());
        }
        if let State::Snapshot(staging) = &mut self.state
            && read_key(bytes, &mut staging.key).is_some()
        {
            return staging.add(bytes, self.caps, self.shared);
        }
        let line = Line::parse(bytes).map_err(FeedError::Line)?;
        match (&mut self.state, line) {
            (State::Snapshot(staging), Line::Key(key)) => {
                staging.key = key;
                staging.add(bytes, self.caps, self.shared)
            }
            (State::Snapshot(_), Line::End { xxh3 }) => self.end(xxh3),
            (State::Snapshot(_), _) => Err(FeedError::Unexpected("a snapshot is interrupted by another line")),
            (State::Following, Line::Snapshot { revision, keys }) => self.begin(revision, keys),
            (State::Following, Line::Key(key)) => self.change(Change::Key(key)),
            (State::Following, Line::Gone { revision, id }) => self.change(Change::Gone { revision, id }),
            (State::Following, Line::Heartbeat { revision }) => self.heartbeat(revision),
            (State::Following, Line::End { .. }) => {
                Err(FeedError::Unexpected("the end of a snapshot that never began"))
            }
            (State::Following, Line::Unknown) => Ok(()),
        }
    }

    fn begin(&mut self, revision: u64, keys: u64) -> Result<(), FeedError> {
        if let Some(in_force) = self.shared.gate.revision().filter(|in_force| revision < *in_force) {
            return Err(FeedError::Older {
                offered: revision,
                in_force,
            });
        }
        if keys > self.caps.keys {
            return Err(FeedError::TooManyKeys {
                offered: keys,
                cap: self.caps.keys,
            });
        }
        let allowed_ms = SNAPSHOT_ALLOWANCE_MS + keys * 1_000 / SLOWEST_KEYS_PER_S;
        self.progress
            .snapshot_by_ms
            .store(self.progress.now_ms() + allowed_ms, Ordering::Relaxed);
        // A garbled count must not reserve memory for keys that never come.
        let reserve = keys.min(RESERVE_AT_MOST_KEYS) as usize;
        let filling = TableBeingFilled::new();
        let resync = self.shared.gate.resync(reserve).map_err(FeedError::Gate)?;
        self.state = State::Snapshot(Box::new(Staging {
            resync,
            key: KeyUpdate::default(),
            revision,
            expected: keys,
            seen: 0,
            unusable: 0,
            bytes: 0,
            checksum: Xxh3::new(),
            courtesy: Courtesy::every(KEYS_AT_ONCE),
            _filling: filling,
        }));
        Ok(())
    }

    fn end(&mut self, xxh3: u64) -> Result<(), FeedError> {
        let State::Snapshot(staging) = std::mem::replace(&mut self.state, State::Following) else {
            return Err(FeedError::Unexpected("the end of a snapshot that never began"));
        };
        self.progress.snapshot_by_ms.store(u64::MAX, Ordering::Relaxed);
        if staging.seen != staging.expected {
            return Err(FeedError::Unexpected(
                "its snapshot has fewer keys than it announced: refused",
            ));
        }
        if staging.checksum.digest() != xxh3 {
            return Err(FeedError::Checksum);
        }
        let shared = self.shared;
        let (revision, keys, unusable) = (staging.revision, staging.seen, staging.unusable);
        if keys == 0 && shared.holds_keys.load(Ordering::Relaxed) {
            return Err(FeedError::Empty);
        }
        // Twice: from the first call on no change goes to the spool's old file, and a rewrite that began between the
        // two may have taken its keys from before the commit.
        shared.spool.iter().for_each(super::spool::Spool::detach);
        let committed = staging.resync.commit(revision);
        shared.spool.iter().for_each(super::spool::Spool::detach);
        committed.map_err(FeedError::Gate)?;
        shared.holds_keys.store(keys > 0, Ordering::Relaxed);
        shared.counts.snapshots.fetch_add(1, Ordering::Relaxed);
        if unusable > 0 {
            log::error!("feed: {unusable} of {keys} keys in the snapshot cannot be used and are left out");
        }
        log::info!("feed: snapshot of {keys} keys at revision {revision} is in force");
        self.good(revision);
        shared.spool_due.notify_one();
        Ok(())
    }

    fn change(&mut self, change: Change) -> Result<(), FeedError> {
        let shared = self.shared;
        let revision = change.revision();
        match shared.gate.revision() {
            None => return Err(FeedError::Unexpected("a change came before any snapshot")),
            // Sent again after a reconnect.
            Some(in_force) if revision <= in_force => return Ok(()),
            Some(_) => {}
        }
        let record = shared.spool.as_ref().map(|spool| (spool, change.encode()));
        let usable = change.apply(&shared.gate).map_err(FeedError::Gate)?;
        shared
            .counts
            .unusable_keys
            .fetch_add(u64::from(!usable), Ordering::Relaxed);
        // After it is in force: a rewrite of the spool that begins in between then takes the key in its new form.
        if let Some((spool, record)) = record {
            spool.append(record);
        }
        shared.holds_keys.store(true, Ordering::Relaxed);
        shared.counts.changes.fetch_add(1, Ordering::Relaxed);
        self.good(revision);
        Ok(())
    }

    fn heartbeat(&mut self, revision: u64) -> Result<(), FeedError> {
        match self.shared.gate.revision() {
            None => Err(FeedError::Unexpected("a heartbeat came before any snapshot")),
            Some(in_force) if revision < in_force => Err(FeedError::Older {
                offered: revision,
                in_force,
            }),
            Some(_) => {
                self.good(revision);
                Ok(())
            }
        }
    }

    /// The source is well, and at `revision`.
    fn good(&self, revision: u64) {
        let shared = self.shared;
        shared.newest_revision.store(revision, Ordering::Relaxed);
        shared.behind.store(false, Ordering::Relaxed);
        shared.heard();
        shared.followed();
        *shared.kept() = shared.gate.revision();
        shared.acknowledge();
        self.progress.good.fetch_add(1, Ordering::Relaxed);
    }
}

/// Room made in advance for a snapshot's keys; more make room as they come.
const RESERVE_AT_MOST_KEYS: u64 = 4_000_000;

/// Keys of a snapshot between two offers of the processor: a tenth of a millisecond's work.
const KEYS_AT_ONCE: u32 = 64;

impl Staging<'_> {
    /// Adds the key that was read from `line`.
    fn add(&mut self, line: &[u8], caps: Caps, shared: &Shared) -> Result<(), FeedError> {
        self.seen += 1;
        self.courtesy.step();
        self.bytes += line.len() as u64;
        if self.seen > self.expected {
            return Err(FeedError::Unexpected(
                "its snapshot has more keys than it announced: refused",
            ));
        }
        if self.bytes > caps.bytes {
            return Err(FeedError::TooManyBytes { cap: caps.bytes });
        }
        self.checksum.update(line);
        if !is_usable(&self.key) {
            self.unusable += 1;
            shared.counts.unusable_keys.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        }
        self.resync.add(&self.key).map(drop).map_err(FeedError::Gate)
    }
}
