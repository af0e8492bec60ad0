//! The journal: window counts on disk, so that a restart forgives nothing.
//!
//! `windows.journal` is a magic number and then records, appended about once a second for the windows that changed:
//! length, XXH3-64, and the whole of one window. The last record of a window counts. Times are absolute, in
//! nanoseconds since the Unix epoch, so that nothing is rounded; what the wall clock was off by between two processes
//! is all the error there is. When the file has grown to several times what it must hold, it is written anew beside
//! itself and renamed; at every start too.
//!
//! From the first damaged record on nothing is believed: what follows may belong to anything.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use crate::clock::Now;
use crate::courtesy::{self, Courtesy, WRITTEN_AT_ONCE_BYTES};
use crate::gate::Gate;
use crate::gate::window::WindowCounts;

/// The journal of one gate.
pub struct Journal {
    path: PathBuf,
    file: Option<File>,
    bytes: u64,
    /// What the file had when it was last written anew.
    compact_bytes: u64,
    /// Records that could not be written yet.
    unwritten: Vec<u8>,
}

/// What [`super::Meter::load_journal`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JournalOutcome {
    Missing,
    /// Counts were put back. `damage`: where the journal stopped being believed, if it did.
    Restored {
        windows: u64,
        permits: u64,
        damage: Option<String>,
    },
    /// The file is there and cannot be read.
    Unusable {
        reason: String,
    },
}

impl Journal {
    pub fn new(path: PathBuf) -> Self {
        Journal {
            path,
            file: None,
            bytes: 0,
            compact_bytes: 0,
            unwritten: Vec::new(),
        }
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Puts every window that still counts back into the gate, and writes the file anew.
    pub fn load(&mut self, gate: &Gate, now: Now) -> JournalOutcome {
        let (mut windows, mut permits) = (0, 0);
        let compacted = self.compact(now, &mut |record| {
            let counts = record.counts(now);
            windows += 1;
            permits += counts.total();
            gate.restore_window(record.key_id, record.tier, &counts, now);
        });
        match compacted {
            Ok(damage) => JournalOutcome::Restored {
                windows,
                permits,
                damage,
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => JournalOutcome::Missing,
            Err(error) => JournalOutcome::Unusable {
                reason: format!("the journal {}: {error}", self.path.display()),
            },
        }
    }

    /// Appends the windows that changed since the last time, and forces them to the disk. What could not be written is
    /// written the next time.
    pub fn append(&mut self, gate: &Gate, now: Now) -> io::Result<()> {
        let mut changed = std::mem::take(&mut self.unwritten);
        let clock = WallClock::at(now);
        let mut courtesy = Courtesy::every(RECORDS_AT_ONCE);
        gate.drain_windows(now, &mut |window| {
            courtesy.step();
            let counts = window
                .counts
                .iter()
                .map(|(last_ns, count)| (clock.unix_ns(last_ns), count));
            encode(window.key_id, window.tier, window.window_ms, counts, &mut changed);
        });
        if changed.is_empty() {
            return Ok(());
        }
        if let Err(error) = self.write(&changed) {
            // A gate whose disk is full keeps counting; memory stays bounded, and the oldest are newest elsewhere.
            if changed.len() > UNWRITTEN_AT_MOST_BYTES {
                changed.clear();
            }
            self.unwritten = changed;
            return Err(error);
        }
        if self.bytes > COMPACT_ABOVE_BYTES.max(4 * self.compact_bytes)
            && let Some(damage) = self.compact(now, &mut |_| {})?
        {
            log::error!("meter: the journal was damaged while in use: {damage}");
        }
        Ok(())
    }

    fn write(&mut self, records: &[u8]) -> io::Result<()> {
        let mut file = match self.file.take() {
            // A process that took over has written it anew.
            Some(file) if is_still_at(&file, &self.path) => file,
            _ => self.open()?,
        };
        if let Err(error) = courtesy::write_all(&mut file, records).and_then(|()| file.sync_data()) {
            // Half a record would hide all that follow.
            if file.set_len(self.bytes).is_ok() {
                self.file = Some(file);
            }
            return Err(error);
        }
        self.bytes += records.len() as u64;
        self.file = Some(file);
        Ok(())
    }

    fn open(&mut self) -> io::Result<File> {
        let mut file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&self.path)?;
        self.bytes = file.metadata()?.len();
        if self.bytes < MAGIC.len() as u64 {
            file.set_len(0)?;
            file.write_all(MAGIC)?;
            self.bytes = MAGIC.len() as u64;
        }
        Ok(file)
    }

    /// Writes the file anew with the last record of each window that still counts, which `each` sees too. Answers
    /// where the file was damaged, if it was.
    fn compact(&mut self, now: Now, each: &mut dyn FnMut(&Record<'_>)) -> io::Result<Option<String>> {
        // Twice over the file rather than all of it in memory. 16 bytes name a window: for two of a billion to have
        // the same name has a chance of one in 10^20.
        let mut last: HashMap<u128, u64, ahash::RandomState> = HashMap::default();
        let mut reader = Reader::open(&self.path)?;
        let damage = loop {
            match reader.next() {
                Ok(Some(record)) => {
                    last.insert(record.name(), record.offset);
                }
                Ok(None) => break None,
                Err(Damage(what)) => {
                    break Some(format!("from byte {} on it is ignored ({what})", reader.offset));
                }
            }
        };
        let mut kept: Vec<u64> = last.into_values().collect();
        courtesy::sort_by(&mut kept, u64::cmp);

        let beside = self.path.with_extension("journal.new");
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&beside)?;
        let mut writer = BufWriter::with_capacity(WRITTEN_AT_ONCE_BYTES, file);
        writer.write_all(MAGIC)?;
        let mut bytes = MAGIC.len() as u64;
        let mut kept = kept.into_iter().peekable();
        let mut reader = Reader::open(&self.path)?;
        while kept.peek().is_some() {
            let Ok(Some(record)) = reader.next() else { break };
            if kept.next_if_eq(&record.offset).is_some() && record.still_counts(now) {
                writer.write_all(record.whole)?;
                bytes += record.whole.len() as u64;
                each(&record);
            }
        }
        let file = writer.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_all()?;
        fs::rename(&beside, &self.path)?;
        if let Some(directory) = self.path.parent() {
            File::open(directory)?.sync_all()?;
        }
        // Opened again to append.
        self.file = None;
        self.bytes = bytes;
        self.compact_bytes = bytes;
        Ok(damage)
    }
}

fn is_still_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(open), Ok(there)) => (open.dev(), open.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

/// Reads records until the end or the first damage.
struct Reader {
    reader: BufReader<File>,
    record: Vec<u8>,
    counts: Vec<(i64, u32)>,
    /// Where the next record begins.
    offset: u64,
    courtesy: Courtesy,
}

/// What is wrong with a record.
struct Damage(&'static str);

impl Reader {
    fn open(path: &Path) -> io::Result<Self> {
        Ok(Reader {
            reader: BufReader::with_capacity(1 << 20, File::open(path)?),
            record: Vec::new(),
            counts: Vec::new(),
            offset: 0,
            courtesy: Courtesy::every(RECORDS_AT_ONCE),
        })
    }

    fn next(&mut self) -> Result<Option<Record<'_>>, Damage> {
        self.courtesy.step();
        if self.offset == 0 {
            let mut magic = [0; MAGIC.len()];
            if self.fill(&mut magic)? < magic.len() || magic != *MAGIC {
                return Err(Damage("not a journal of this version"));
            }
            self.offset = MAGIC.len() as u64;
        }
        let mut head = [0; HEAD_BYTES];
        match self.fill(&mut head)? {
            0 => return Ok(None),
            HEAD_BYTES => {}
            _ => return Err(Damage("cut off")),
        }
        let length = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
        if length > MAX_RECORD_BYTES {
            return Err(Damage("damaged"));
        }
        let mut record = std::mem::take(&mut self.record);
        record.clear();
        record.extend_from_slice(&head);
        record.resize(HEAD_BYTES + length, 0);
        let filled = self.fill(&mut record[HEAD_BYTES..])?;
        self.record = record;
        if filled < length {
            return Err(Damage("cut off"));
        }
        if xxh3_64(&self.record[HEAD_BYTES..]).to_le_bytes() != self.record[4..HEAD_BYTES] {
            return Err(Damage("damaged"));
        }
        let offset = self.offset;
        let record = Record::decode(&self.record, offset, &mut self.counts).ok_or(Damage("damaged"))?;
        self.offset += self.record.len() as u64;
        Ok(Some(record))
    }

    /// Reads until `buffer` is full or the file ends; how much that was.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize, Damage> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.reader.read(&mut buffer[filled..]) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(Damage("the disk cannot read it")),
            }
        }
        Ok(filled)
    }
}

/// One window as it was written.
struct Record<'b> {
    key_id: &'b str,
    tier: &'b str,
    window_ms: u64,
    counts: &'b [(i64, u32)],
    offset: u64,
    /// The bytes that say which window it is.
    window: &'b [u8],
    whole: &'b [u8],
}

impl<'b> Record<'b> {
    /// `counts` is where its counts are put.
    fn decode(whole: &'b [u8], offset: u64, counts: &'b mut Vec<(i64, u32)>) -> Option<Self> {
        let record = whole.get(HEAD_BYTES..)?;
        let bytes = &mut &*record;
        let key_id = take_str(bytes)?;
        let tier = take_str(bytes)?;
        let window = &record[..record.len() - bytes.len()];
        let window_ms = take_varint(bytes)?;
        let step_ns = step_ns(window_ms);
        let entries = take_varint(bytes)?;
        let mut unix_ns = unzigzag(take_varint(bytes)?);
        counts.clear();
        for _ in 0..entries {
            let steps = i64::try_from(take_varint(bytes)?).ok()?;
            let off_ns = unzigzag(take_varint(bytes)?);
            unix_ns = unix_ns.checked_add(steps.checked_mul(step_ns)?)?.checked_add(off_ns)?;
            counts.push((unix_ns, u32::try_from(take_varint(bytes)?).ok()?));
        }
        bytes.is_empty().then_some(Record {
            key_id,
            tier,
            window_ms,
            counts,
            offset,
            window,
            whole,
        })
    }

    /// Both parts of what it is made of begin with their length, so no two windows have the same.
    fn name(&self) -> u128 {
        xxh3_128(self.window)
    }

    fn still_counts(&self, now: Now) -> bool {
        let window_ns = i128::from(self.window_ms) * 1_000_000;
        let now_ns = i128::from(now.unix_ms) * 1_000_000;
        self.counts
            .iter()
            .any(|(unix_ns, _)| i128::from(*unix_ns) + window_ns + A_SECOND_NS > now_ns)
    }

    fn counts(&self, now: Now) -> WindowCounts {
        let clock = WallClock::at(now);
        WindowCounts::from_pairs(
            self.counts
                .iter()
                .filter_map(|(unix_ns, count)| Some((clock.elapsed_ns(*unix_ns)?, *count))),
        )
    }
}

/// Converts between the clock's monotonic time and wall time, exactly.
struct WallClock {
    unix_ns_at_origin: i64,
}

impl WallClock {
    fn at(now: Now) -> Self {
        // `Now` is made as origin + elapsed, in whole milliseconds: this is that origin again.
        WallClock {
            unix_ns_at_origin: (now.unix_ms - (now.elapsed_ns / 1_000_000) as i64) * 1_000_000,
        }
    }

    fn unix_ns(&self, elapsed_ns: u64) -> i64 {
        self.unix_ns_at_origin.saturating_add_unsigned(elapsed_ns)
    }

    /// `None`: before the clock's origin, 32 days ago, longer than any window.
    fn elapsed_ns(&self, unix_ns: i64) -> Option<u64> {
        u64::try_from(unix_ns.checked_sub(self.unix_ns_at_origin)?).ok()
    }
}

fn encode(
    key_id: &str,
    tier: &str,
    window_ms: u64,
    counts: impl ExactSizeIterator<Item = (i64, u32)>,
    bytes: &mut Vec<u8>,
) {
    if counts.len() == 0 {
        return;
    }
    let start = bytes.len();
    bytes.resize(start + HEAD_BYTES, 0);
    put_str(bytes, key_id);
    put_str(bytes, tier);
    put_varint(bytes, window_ms);
    put_varint(bytes, counts.len() as u64);
    // Sub-buckets lie a sixtieth of the window apart, give or take a nanosecond: small numbers all.
    let step_ns = step_ns(window_ms);
    let mut before = None;
    for (unix_ns, count) in counts {
        let base = *before.get_or_insert_with(|| {
            put_varint(bytes, zigzag(unix_ns));
            unix_ns
        });
        let steps = ((unix_ns - base + step_ns / 2) / step_ns).max(0);
        put_varint(bytes, steps as u64);
        put_varint(bytes, zigzag(unix_ns - base - steps * step_ns));
        put_varint(bytes, u64::from(count));
        before = Some(unix_ns);
    }
    let length = bytes.len() - start - HEAD_BYTES;
    let checksum = xxh3_64(&bytes[start + HEAD_BYTES..]);
    bytes[start..start + 4].copy_from_slice(&(length as u32).to_le_bytes());
    bytes[start + 4..start + HEAD_BYTES].copy_from_slice(&checksum.to_le_bytes());
}

/// A sixtieth of the window.
fn step_ns(window_ms: u64) -> i64 {
    (window_ms.clamp(1, MAX_WINDOW_MS) * 1_000_000 / 60) as i64
}

fn zigzag(value: i64) -> u64 {
    (value << 1 ^ value >> 63) as u64
}

fn unzigzag(value: u64) -> i64 {
    (value >> 1) as i64 ^ -((value & 1) as i64)
}

fn put_varint(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

fn take_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f).checked_shl(shift)?;
        if *byte < 0x80 {
            return Some(value);
        }
    }
    None
}

fn put_str(bytes: &mut Vec<u8>, text: &str) {
    put_varint(bytes, text.len() as u64);
    bytes.extend_from_slice(text.as_bytes());
}

fn take_str<'b>(bytes: &mut &'b [u8]) -> Option<&'b str> {
    let length = usize::try_from(take_varint(bytes)?).ok()?;
    let (text, rest) = bytes.split_at_checked(length)?;
    *bytes = rest;
    std::str::from_utf8(text).ok()
}

const MAGIC: &[u8; 8] = b"TGJOURN\x01";
/// Length and checksum.
const HEAD_BYTES: usize = 12;
/// 61 sub-buckets take some 700 bytes with an id and a tier of ordinary length.
const MAX_RECORD_BYTES: usize = 64 * 1024;
const MAX_WINDOW_MS: u64 = 30 * 24 * 3600 * 1_000;
const A_SECOND_NS: i128 = 1_000_000_000;
/// Records that are made or read between two offers of the processor.
const RECORDS_AT_ONCE: u32 = 128;
/// Some 100,000 windows of an ordinary kind; not worth the trouble below that.
const COMPACT_ABOVE_BYTES: u64 = 16 << 20;
const UNWRITTEN_AT_MOST_BYTES: usize = 64 << 20;
