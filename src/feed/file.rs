//! A key file instead of a control plane: key lines alone, read again whenever the file changes.
//!
//! A version of the file is in force whole or not at all. Files are often written in place, so a change is read only once
//! the file has held still from one look to the next, and thrown away if it moved while it was read.

use std::fmt;
use std::fs::{File, Metadata};
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::parse::{MAX_LINE_BYTES, parse_key_file_line};
use super::{LoadOutcome, Shared};
use crate::gate::KeyError;
use crate::huge_pages::TableBeingFilled;

/// A file of key lines. Blank lines and lines that start with `#` are passed over.
pub struct KeyFile {
    reading: Arc<Reading>,
    poll: Duration,
}

struct Reading {
    path: PathBuf,
    max_keys: u64,
    /// The version that was read last, in force or refused.
    read: Mutex<Option<Stamp>>,
}

/// What changes when a file does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    modified_s: i64,
    modified_ns: i64,
    /// Also changes where a tool sets the modification time back.
    changed_s: i64,
    changed_ns: i64,
    bytes: u64,
    inode: u64,
}

/// Why a version of the file is refused.
#[derive(Debug)]
enum FileError {
    Io(io::Error),
    Line { number: u64, reason: String },
    TooManyKeys { cap: u64 },
    Gate(KeyError),
    Moved,
}

impl fmt::Display for FileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FileError::Io(error) => write!(f, "cannot be read: {error}"),
            FileError::Line { number, reason } => write!(f, "line {number}: {reason}"),
            FileError::TooManyKeys { cap } => write!(f, "it has more than {cap} keys"),
            FileError::Gate(error) => error.fmt(f),
            FileError::Moved => f.write_str("it changed while it was read"),
        }
    }
}

impl From<io::Error> for FileError {
    fn from(error: io::Error) -> Self {
        FileError::Io(error)
    }
}

impl From<KeyError> for FileError {
    fn from(error: KeyError) -> Self {
        FileError::Gate(error)
    }
}

impl KeyFile {
    pub fn new(path: PathBuf, max_keys: u64, poll: Duration) -> Self {
        KeyFile {
            reading: Arc::new(Reading {
                path,
                max_keys,
                read: Mutex::new(None),
            }),
            poll,
        }
    }

    /// Reads the file before the first request is served.
    pub fn load(&self, shared: &Shared) -> LoadOutcome {
        match self.reading.read(shared) {
            Ok(keys) => LoadOutcome::Loaded {
                revision: shared.gate.revision().unwrap_or(0),
                keys,
                saved_at_ms: shared.clock.now().unix_ms,
                damage: None,
            },
            Err(FileError::Io(error)) if error.kind() == io::ErrorKind::NotFound => {
                shared.connection().last_error = Some(MISSING.to_owned());
                LoadOutcome::Missing
            }
            Err(error) => {
                shared.counts.refused.fetch_add(1, Ordering::Relaxed);
                shared.connection().last_error = Some(error.to_string());
                LoadOutcome::Refused {
                    reason: format!("the key file {} is refused: {error}", shared.source),
                }
            }
        }
    }

    /// Looks at the file for ever, and reads it when it has changed.
    pub async fn follow(&self, shared: &Arc<Shared>) {
        let mut last_seen = None;
        loop {
            tokio::time::sleep(self.poll).await;
            let (reading, at_work) = (Arc::clone(&self.reading), Arc::clone(shared));
            let looked = tokio::task::spawn_blocking(move || reading.look(last_seen, &at_work)).await;
            match looked {
                Ok(seen) => last_seen = seen,
                Err(error) => log::error!("feed: reading the key file broke off: {error}"),
            }
        }
    }
}

impl Reading {
    /// Looks once, and reads a new version that has held still since `last_seen`. Returns what it saw.
    fn look(&self, last_seen: Option<Stamp>, shared: &Shared) -> Option<Stamp> {
        let seen = match std::fs::metadata(&self.path) {
            Ok(metadata) => Stamp::of(&metadata),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // Should the same file come back, it is read again.
                *self.read.lock().unwrap_or_else(PoisonError::into_inner) = None;
                shared.lost(MISSING);
                return None;
            }
            Err(error) => {
                shared.lost(&FileError::Io(error).to_string());
                return None;
            }
        };
        let read = *self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if read == Some(seen) {
            // A refused version is no sign of life.
            if shared.connection().connected {
                shared.heard();
            }
        } else if last_seen == Some(seen) {
            match self.read(shared) {
                Ok(keys) => {
                    log::info!(
                        "feed: {keys} keys from {}, revision {:?}",
                        shared.source,
                        shared.gate.revision()
                    );
                }
                Err(FileError::Moved) => {}
                Err(error) => {
                    shared.counts.refused.fetch_add(1, Ordering::Relaxed);
                    shared.lost(&format!("its new version is refused, {error}"));
                }
            }
        }
        Some(seen)
    }

    /// Puts the file's keys into force, all or none. Returns how many.
    fn read(&self, shared: &Shared) -> Result<usize, FileError> {
        let file = File::open(&self.path)?;
        let before = Stamp::of(&file.metadata()?);
        let outcome = self.read_keys(&file, before, shared);
        if !matches!(outcome, Err(FileError::Moved)) {
            *self.read.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
        }
        if let Ok(keys) = &outcome {
            shared.counts.snapshots.fetch_add(1, Ordering::Relaxed);
            shared
                .newest_revision
                .store(shared.gate.revision().unwrap_or(0), Ordering::Relaxed);
            shared.heard();
            shared.followed();
            if *keys == 0 {
                log::warn!("feed: the key file {} has no keys", shared.source);
            }
        }
        outcome
    }

    fn read_keys(&self, file: &File, before: Stamp, shared: &Shared) -> Result<usize, FileError> {
        let revision = shared.gate.revision().unwrap_or(0) + 1;
        let mut lines = Lines::of(file);
        let expected = lines.expected(before.bytes)?.min(self.max_keys);
        let _filling = TableBeingFilled::new();
        let mut resync = shared.gate.resync(expected as usize)?;
        let mut keys = 0;
        while let Some((number, line)) = lines.next_key()? {
            let refused = |reason: String| FileError::Line { number, reason };
            let key = parse_key_file_line(line, revision).map_err(|error| refused(error.to_string()))?;
            keys += 1;
            if keys > self.max_keys {
                return Err(FileError::TooManyKeys { cap: self.max_keys });
            }
            if !resync.add(&key).map_err(|error| refused(error.to_string()))? {
                let earlier = self.line_of(&key.id)?;
                return Err(refused(format!("key {} is on line {earlier} already", key.id)));
            }
        }
        if Stamp::of(&file.metadata()?) != before {
            return Err(FileError::Moved);
        }
        resync.commit(revision)?;
        Ok(keys as usize)
    }

    /// The first line with the key. Looked for when it is wanted, because remembering the lines of a million keys takes
    /// more memory than the keys.
    fn line_of(&self, id: &str) -> Result<u64, FileError> {
        let file = File::open(&self.path)?;
        let mut lines = Lines::of(&file);
        while let Some((number, line)) = lines.next_key()? {
            if parse_key_file_line(line, 0).is_ok_and(|key| *key.id == *id) {
                return Ok(number);
            }
        }
        Err(FileError::Moved)
    }
}

/// The lines of a key file.
struct Lines<'f> {
    reader: BufReader<&'f File>,
    line: Vec<u8>,
    number: u64,
}

impl<'f> Lines<'f> {
    fn of(file: &'f File) -> Self {
        Lines {
            reader: BufReader::with_capacity(1 << 20, file),
            line: vec![],
            number: 0,
        }
    }

    /// About how many lines there are in so many bytes, by those at the beginning.
    fn expected(&mut self, bytes: u64) -> io::Result<u64> {
        let sample = self.reader.fill_buf()?;
        let lines = memchr::memchr_iter(b'\n', sample).count().max(1);
        Ok(bytes * lines as u64 / sample.len().max(1) as u64)
    }

    /// The next line with a key and its number, from 1; `None` at the end.
    fn next_key(&mut self) -> Result<Option<(u64, &[u8])>, FileError> {
        loop {
            self.line.clear();
            self.number += 1;
            let most = MAX_LINE_BYTES as u64 + 1;
            let count = (&mut self.reader).take(most).read_until(b'\n', &mut self.line)?;
            if count == 0 {
                return Ok(None);
            }
            if count > MAX_LINE_BYTES {
                return Err(FileError::Line {
                    number: self.number,
                    reason: format!("it has more than {MAX_LINE_BYTES} bytes"),
                });
            }
            if !matches!(self.line.trim_ascii().first(), None | Some(b'#')) {
                return Ok(Some((self.number, self.line.trim_ascii())));
            }
        }
    }
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Stamp {
            modified_s: metadata.mtime(),
            modified_ns: metadata.mtime_nsec(),
            changed_s: metadata.ctime(),
            changed_ns: metadata.ctime_nsec(),
            bytes: metadata.len(),
            inode: metadata.ino(),
        }
    }
}

const MISSING: &str = "there is no such file";
