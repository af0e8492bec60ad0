//! Batches on disk from before they are sent until they are acknowledged.
//!
//! The protocol, which makes each count arrive exactly once:
//! - A process draws a random *run*; its batches are (run, 1), (run, 2), …, and the ledger applies each pair once.
//!   No process ever numbers batches in another's run, so a number is never used for two things.
//! - A batch is on disk before it is sent, and never changes once it was sent. Whoever does not hear an answer sends it
//!   again; after a crash the next process does, under its old run and number.
//! - Batches that were never sent may be merged, which happens when they are large and when many pile up. The merged file
//!   names those that it replaces, and takes effect by its renaming: after a crash either it or they count, never both.
//!
//! What a flush brought is sent at once if it fits into one batch. More of it is gathered over several flushes, because
//! sums by the minute are not worth an update of the ledger every second: a key that is always busy makes one entry of
//! ten, and keys that are not lie together in the ledger when they come together.
//!
//! A file holds lines: a header, then each batch as the checksum of its JSON and the JSON as it is posted.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use super::usage::Tally;
use crate::clock::Now;
use crate::courtesy;
use crate::wire::UsageBatch;

/// Batches that wait for the control plane.
pub struct Outbox {
    directory: PathBuf,
    gate: String,
    run: String,
    next_sequence: u64,
    cap_bytes: u64,
    files: VecDeque<Waiting>,
    /// What lies in the files that are [`Waiting::gathered`].
    gathered: Tally,
    /// For how many flushes.
    flushes: u32,
}

/// One file of batches.
struct Waiting {
    name: String,
    bytes: u64,
    /// Where the JSON of each batch lies that is not acknowledged yet: offset and length.
    left: VecDeque<(usize, usize)>,
    /// Not to be sent yet, but with what comes.
    gathered: bool,
    /// Something of it may have reached the control plane: it must not change.
    sent: bool,
    /// Refused; not tried before this time (monotonic).
    not_before_ns: u64,
}

/// One batch to post.
pub struct Parcel {
    /// The file it lies in.
    pub name: String,
    pub body: Vec<u8>,
    offset: usize,
}

#[derive(Serialize, Deserialize)]
struct Header {
    tollgate_usage: u32,
    #[serde(default)]
    replaces: Vec<String>,
}

impl Outbox {
    /// Opens the directory, with what earlier processes left in it.
    pub fn open(directory: PathBuf, gate: String, cap_bytes: u64, now: Now) -> io::Result<Self> {
        fs::create_dir_all(&directory)?;
        let mut names = Vec::new();
        for entry in fs::read_dir(&directory)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name.ends_with(SUFFIX) {
                names.push(name);
            } else if name.ends_with(UNFINISHED) {
                fs::remove_file(directory.join(name))?;
            }
        }
        // Names begin with the time.
        names.sort_unstable();
        let run = new_run()?;
        let mut outbox = Outbox {
            directory,
            gate,
            run,
            next_sequence: 1,
            cap_bytes,
            files: VecDeque::new(),
            gathered: Tally::default(),
            flushes: 0,
        };
        let mut replaced = Vec::new();
        for name in names {
            match outbox.read(&name) {
                Ok((waiting, replaces)) => {
                    outbox.files.push_back(waiting);
                    replaced.extend(replaces);
                }
                Err(error) => log::error!(
                    "meter: {} cannot be read and is left aside: {error}",
                    outbox.path(&name).display()
                ),
            }
        }
        // A crash came between the merged file and the removal of what it replaces.
        for name in replaced {
            if outbox.files.iter().any(|file| file.name == name) {
                outbox.remove(&name);
            }
        }
        let (batches, bytes) = outbox.waiting();
        if batches > 0 {
            log::info!(
                "meter: {batches} batches of usage ({bytes} bytes) wait since before {}",
                now.unix_ms
            );
        }
        Ok(outbox)
    }

    /// How many batches wait, and the bytes of their files.
    pub fn waiting(&self) -> (u64, u64) {
        let batches = self.files.iter().map(|file| file.left.len() as u64).sum();
        (batches, self.files.iter().map(|file| file.bytes).sum())
    }

    /// Moves a tally to the disk. After an error it is where it was, and nothing of it will be sent.
    pub fn push(&mut self, tally: &mut Tally, now: Now) -> io::Result<()> {
        let written = self.write(tally, Vec::new(), now)?;
        self.files.push_back(Waiting {
            gathered: true,
            ..written
        });
        self.gathered.append(std::mem::take(tally));
        Ok(())
    }

    /// A flush is over: whether anything that was pushed may be sent now.
    pub fn flushed(&mut self, now: Now) -> io::Result<bool> {
        if self.gathered.is_empty() {
            return Ok(false);
        }
        self.flushes += 1;
        let is_due = self.gathered.entries() <= ENTRIES_IN_A_BATCH || self.flushes >= GATHERED_FLUSHES;
        if is_due {
            self.release(now)?;
        }
        Ok(is_due)
    }

    /// Lets everything be sent that was pushed.
    pub fn release(&mut self, now: Now) -> io::Result<()> {
        let gathered = self.names(|file| file.gathered);
        let mut tally = std::mem::take(&mut self.gathered);
        let merged = if gathered.len() > 1 {
            tally.sum_up();
            let written = self.write(&tally, gathered.clone(), now);
            Some(written.inspect_err(|_| self.gathered = tally)?)
        } else {
            None
        };
        self.flushes = 0;
        self.files.iter_mut().for_each(|file| file.gathered = false);
        merged.map_or(Ok(()), |merged| self.replace(&gathered, merged))
    }

    /// Merges what was never sent, where many files pile up.
    pub fn merge_if_many(&mut self, now: Now) -> io::Result<()> {
        let mergeable = self.names(|file| !file.sent && !file.gathered);
        if mergeable.len() < MERGE_AT {
            return Ok(());
        }
        let mut tally = Tally::default();
        for name in &mergeable {
            self.batches_of(name)?.into_iter().for_each(|batch| tally.add(batch));
        }
        tally.sum_up();
        let this_hour = now.unix_ms.div_euclid(3_600_000) * 60;
        let sent_bytes: u64 = self.files.iter().filter(|file| file.sent).map(|file| file.bytes).sum();
        let room = self.cap_bytes.saturating_sub(sent_bytes);
        for span in [60, 24 * 60] {
            if estimated_bytes(&tally) > room {
                tally.coarsen(span, this_hour);
            }
        }
        let merged = self.write(&tally, mergeable.clone(), now)?;
        self.replace(&mergeable, merged)
    }

    fn names(&self, of: impl Fn(&Waiting) -> bool) -> Vec<String> {
        let files = self.files.iter().filter(|file| of(file));
        files.map(|file| file.name.clone()).collect()
    }

    /// Puts the file that says so in the place of others.
    fn replace(&mut self, replaced: &[String], merged: Waiting) -> io::Result<()> {
        for name in replaced {
            self.remove(name);
        }
        self.files.push_back(merged);
        // Before the merged file can be gone, those that it replaces are gone for good.
        File::open(&self.directory)?.sync_all()
    }

    /// The oldest batch that is due. It counts as sent from now on.
    pub fn next(&mut self, now: Now) -> Option<Parcel> {
        loop {
            let file = self
                .files
                .iter_mut()
                .find(|file| !file.gathered && file.not_before_ns <= now.elapsed_ns)?;
            file.sent = true;
            let name = file.name.clone();
            let Some(&(offset, length)) = file.left.front() else {
                self.remove(&name);
                continue;
            };
            let path = self.path(&name);
            let mut body = vec![0; length];
            match File::open(&path).and_then(|file| file.read_exact_at(&mut body, offset as u64)) {
                Ok(()) => return Some(Parcel { name, body, offset }),
                Err(error) => log::error!("meter: {} cannot be read and is left aside: {error}", path.display()),
            }
            self.files.retain(|file| file.name != name);
        }
    }

    /// The control plane has the batch.
    pub fn delivered(&mut self, parcel: &Parcel) {
        let Some(file) = self.files.iter_mut().find(|file| file.name == parcel.name) else {
            return;
        };
        file.left.retain(|(offset, _)| *offset != parcel.offset);
        if file.left.is_empty() {
            self.remove(&parcel.name);
        }
    }

    /// The control plane will not have the batch as it is; it may be mended. Others go first.
    pub fn set_aside(&mut self, parcel: &Parcel, now: Now) {
        if let Some(file) = self.files.iter_mut().find(|file| file.name == parcel.name) {
            file.not_before_ns = now.elapsed_ns + REFUSED_FOR_NS;
        }
    }

    fn write(&mut self, tally: &Tally, replaces: Vec<String>, now: Now) -> io::Result<Waiting> {
        let first = self.next_sequence;
        // Numbers are not used again even if this fails: the renaming may have taken place.
        self.next_sequence += tally.entries().div_ceil(ENTRIES_IN_A_BATCH) as u64;
        let name = format!("{:015}-{}-{first:012}{SUFFIX}", now.unix_ms.max(0), self.run);
        let unfinished = self.path(&name).with_extension("new");
        let written: io::Result<_> = (|| {
            let written = self.write_batches(&unfinished, tally, first, replaces)?;
            fs::rename(&unfinished, self.path(&name))?;
            File::open(&self.directory)?.sync_all()?;
            Ok(written)
        })();
        let (left, bytes) = written.inspect_err(|_| self.discard(&unfinished, &name))?;
        Ok(Waiting {
            name,
            bytes,
            left,
            gathered: false,
            sent: false,
            not_before_ns: 0,
        })
    }

    /// Whatever is there of a file that could not be written must not be sent beside the next try; it was not sent yet.
    fn discard(&self, unfinished: &Path, name: &str) {
        let _ = fs::remove_file(unfinished);
        let path = self.path(name);
        match fs::remove_file(&path) {
            Err(removing) if removing.kind() != io::ErrorKind::NotFound => {
                log::error!("meter: {} may count twice after a restart: {removing}", path.display());
            }
            _ => {}
        }
    }

    /// Where the JSON of each batch lies, and the bytes of all.
    fn write_batches(
        &self,
        path: &Path,
        tally: &Tally,
        sequence: u64,
        replaces: Vec<String>,
    ) -> io::Result<(VecDeque<(usize, usize)>, u64)> {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)?;
        let mut line = serde_json::to_vec(&Header {
            tollgate_usage: VERSION,
            replaces,
        })?;
        line.push(b'\n');
        courtesy::write_all(&mut file, &line)?;
        let mut bytes = line.len();
        let mut left = VecDeque::new();
        for batch in tally.batches(&self.gate, &self.run, sequence, ENTRIES_IN_A_BATCH) {
            line.clear();
            line.resize(CHECKSUM_DIGITS + 1, b' ');
            serde_json::to_writer(&mut line, &batch)?;
            let checksum = xxh3_64(&line[CHECKSUM_DIGITS + 1..]);
            write!(&mut line[..], "{checksum:016x}")?;
            left.push_back((bytes + CHECKSUM_DIGITS + 1, line.len() - CHECKSUM_DIGITS - 1));
            line.push(b'\n');
            courtesy::write_all(&mut file, &line)?;
            bytes += line.len();
        }
        file.sync_all()?;
        Ok((left, bytes as u64))
    }

    /// A file of an earlier process, which may have sent any of it.
    fn read(&self, name: &str) -> io::Result<(Waiting, Vec<String>)> {
        let bytes = fs::read(self.path(name))?;
        let (header, lines) = split(&bytes)?;
        let mut left = VecDeque::new();
        let mut damaged = 0;
        for line in lines {
            match line.checked() {
                Some(_) => left.push_back((line.offset, line.json.len())),
                None => damaged += 1,
            }
        }
        if damaged > 0 {
            log::error!(
                "meter: {damaged} batches in {} are damaged and lost",
                self.path(name).display()
            );
        }
        let waiting = Waiting {
            name: name.to_owned(),
            bytes: bytes.len() as u64,
            left,
            gathered: false,
            sent: true,
            not_before_ns: 0,
        };
        Ok((waiting, header.replaces))
    }

    fn batches_of(&self, name: &str) -> io::Result<Vec<UsageBatch>> {
        let bytes = fs::read(self.path(name))?;
        let (_, lines) = split(&bytes)?;
        lines
            .map(|line| {
                let json = line.checked().ok_or_else(|| io::Error::other("a batch is damaged"))?;
                Ok(serde_json::from_slice(json)?)
            })
            .collect()
    }

    fn remove(&mut self, name: &str) {
        self.files.retain(|file| file.name != name);
        if let Err(error) = fs::remove_file(self.path(name)) {
            log::error!("meter: cannot remove {}: {error}", self.path(name).display());
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}

/// A line that holds a batch.
struct Line<'b> {
    checksum: &'b [u8],
    json: &'b [u8],
    offset: usize,
}

impl<'b> Line<'b> {
    fn checked(&self) -> Option<&'b [u8]> {
        let checksum = u64::from_str_radix(std::str::from_utf8(self.checksum).ok()?, 16).ok()?;
        (xxh3_64(self.json) == checksum).then_some(self.json)
    }
}

fn split(bytes: &[u8]) -> io::Result<(Header, impl Iterator<Item = Line<'_>>)> {
    let not_ours = || io::Error::other("it is damaged, or written by another version");
    let header_end = bytes.iter().position(|byte| *byte == b'\n').ok_or_else(not_ours)?;
    let header: Header = serde_json::from_slice(&bytes[..header_end]).map_err(|_| not_ours())?;
    if header.tollgate_usage != VERSION {
        return Err(not_ours());
    }
    let mut offset = header_end + 1;
    let lines = bytes[offset..].split_inclusive(|byte| *byte == b'\n').map(move |line| {
        let start = offset;
        offset += line.len();
        let text = line.strip_suffix(b"\n").unwrap_or_default();
        let (checksum, json) = text.split_at_checked(CHECKSUM_DIGITS).unwrap_or((text, &[]));
        Line {
            checksum,
            json: json.strip_prefix(b" ").unwrap_or_default(),
            offset: start + CHECKSUM_DIGITS + 1,
        }
    });
    Ok((header, lines))
}

/// 128 random bits as 32 hex digits.
fn new_run() -> io::Result<String> {
    let mut random = [0; 16];
    getrandom::fill(&mut random).map_err(io::Error::other)?;
    Ok(random.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn estimated_bytes(tally: &Tally) -> u64 {
    tally.entries() as u64 * TYPICAL_ENTRY_BYTES
}

const VERSION: u32 = 1;
const SUFFIX: &str = ".usage";
const UNFINISHED: &str = ".new";
const CHECKSUM_DIGITS: usize = 16;
/// Some 200 KiB of JSON. A control plane on SQLite is busy with them for 10 to 20 ms, in which a change has to wait.
const ENTRIES_IN_A_BATCH: usize = 2_000;
/// Some nine seconds: that late a busy gate's usage is in the ledger. It lies on the disk after the first.
const GATHERED_FLUSHES: u32 = 10;
const TYPICAL_ENTRY_BYTES: u64 = 120;
/// A minute without the control plane.
const MERGE_AT: usize = 64;
const REFUSED_FOR_NS: u64 = 60_000_000_000;
