//! The spool's file: what its bytes mean, written and read. See the parent for why.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, mpsc};

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use xxhash_rust::xxh3::Xxh3;

use crate::courtesy::WRITTEN_AT_ONCE_BYTES;
use crate::feed::record::{Change, decode_key, encode_key, is_usable};
use crate::gate::{Gate, KeyError, KeyUpdate};
use crate::huge_pages::TableBeingFilled;

/// Where changes are appended.
pub struct Log {
    pub file: Arc<File>,
    chain: Chain,
    keys_end: u64,
    end: u64,
}

/// What a spool held.
pub struct Loaded {
    pub log: Option<Log>,
    pub saved_at_ms: i64,
    pub damage: Option<String>,
}

/// Why nothing of a spool is used.
pub enum ReadError {
    Io(io::Error),
    Unusable(&'static str),
    Gate(KeyError),
}

impl From<KeyError> for ReadError {
    fn from(error: KeyError) -> Self {
        ReadError::Gate(error)
    }
}

impl From<io::Error> for ReadError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => ReadError::Unusable("it is cut off"),
            _ => ReadError::Io(error),
        }
    }
}

/// Reads a whole spool into the gate: its keys if all of them are as they were written, then as many changes as are.
pub fn read(file: File, key: &MacKey, gate: &Gate) -> Result<Loaded, ReadError> {
    let file_bytes = file.metadata()?.len();
    let mut reader = BufReader::with_capacity(CHUNK_BYTES, &file);
    let header = Header::read(&mut reader)?;
    let keys_end = header.keys_end().filter(|end| end + SEAL_BYTES as u64 <= file_bytes);
    let Some(keys_end) = keys_end else {
        return Err(ReadError::Unusable("it is cut off"));
    };

    let _filling = TableBeingFilled::new();
    let mut resync = gate.resync(header.keys.min(header.keys_bytes / MIN_KEY_BYTES) as usize)?;
    let mut sealing = Sealing::new(key);
    let (mut keys, mut unusable) = (0_u64, 0_u64);
    for_each_key(&mut reader, header.keys_bytes, &mut sealing, |update| {
        keys += 1;
        if is_usable(update) {
            resync.add(update)?;
        } else {
            unusable += 1;
        }
        Ok(())
    })?;
    let mut seal = [0; SEAL_BYTES];
    reader.read_exact(&mut seal)?;
    let right = sealing.finish(&header);
    if seal[..8] != right[..8] || keys != header.keys {
        return Err(ReadError::Unusable("it is damaged"));
    }
    // Compared in plain time: whoever can time this reads the file already, and has one try a start.
    if seal != right {
        return Err(ReadError::Unusable("it was not written with this feed token"));
    }
    resync.commit(header.revision)?;
    if unusable > 0 {
        log::error!("feed: {unusable} of {keys} keys in the spool cannot be used and are left out");
    }
    let end = keys_end + SEAL_BYTES as u64;
    read_changes(reader, &file, key, gate, header, Chain::from_seal(&seal), end)
}

/// Calls `each` for every key in the next `bytes` of the file, in its order. A thread of its own reads, seals and decodes
/// what comes next meanwhile: that is a third of the work, and a gate that starts has nothing else to do.
fn for_each_key(
    reader: &mut (impl Read + Send),
    bytes: u64,
    sealing: &mut Sealing,
    mut each: impl FnMut(&KeyUpdate) -> Result<(), ReadError>,
) -> Result<(), ReadError> {
    let (full, batches) = mpsc::sync_channel::<Batch>(BATCHES);
    let (done, used) = mpsc::channel();
    std::thread::scope(|scope| {
        let decoding = scope.spawn(move || decode(reader, bytes, sealing, &full, &used));
        let mut outcome = Ok(());
        while let (Ok(()), Ok(batch)) = (&outcome, batches.recv()) {
            outcome = batch.keys().iter().try_for_each(&mut each);
            // Nobody waits for the last ones.
            let _ = done.send(batch);
        }
        drop(batches);
        let decoded = decoding.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        outcome.and(decoded)
    })
}

/// Decodes keys into batches, those that are used up again, until all are on their way or nobody takes them any more.
fn decode(
    reader: &mut impl Read,
    bytes: u64,
    sealing: &mut Sealing,
    full: &mpsc::SyncSender<Batch>,
    used: &mpsc::Receiver<Batch>,
) -> Result<(), ReadError> {
    let (mut buffer, mut left, mut batch) = (Vec::new(), bytes, Batch::default());
    while left > 0 {
        let carried = buffer.len();
        let chunk = left.min(CHUNK_BYTES as u64) as usize;
        buffer.resize(carried + chunk, 0);
        reader.read_exact(&mut buffer[carried..])?;
        left -= chunk as u64;
        sealing.update(&buffer[carried..]);
        let mut rest = &buffer[..];
        loop {
            let mut attempt = rest;
            if decode_key(&mut attempt, batch.place()).is_none() {
                break;
            }
            rest = attempt;
            batch.len += 1;
            if batch.len == BATCH_KEYS {
                let next = used.try_recv().map(Batch::emptied).unwrap_or_default();
                if full.send(std::mem::replace(&mut batch, next)).is_err() {
                    return Ok(());
                }
            }
        }
        let used_up = buffer.len() - rest.len();
        if rest.len() > MAX_RECORD_BYTES {
            return Err(ReadError::Unusable("it is damaged"));
        }
        buffer.drain(..used_up);
    }
    if !buffer.is_empty() {
        return Err(ReadError::Unusable("it is damaged"));
    }
    // Where nobody takes it, the reason is told there.
    let _ = full.send(batch);
    Ok(())
}

/// Keys on their way from the file into the gate. Decoded into again, they keep the texts that are the same.
#[derive(Default)]
struct Batch {
    keys: Vec<KeyUpdate>,
    len: usize,
}

impl Batch {
    /// Where the next key goes.
    fn place(&mut self) -> &mut KeyUpdate {
        if self.keys.len() == self.len {
            self.keys.push(KeyUpdate::default());
        }
        &mut self.keys[self.len]
    }

    fn keys(&self) -> &[KeyUpdate] {
        &self.keys[..self.len]
    }

    fn emptied(mut self) -> Self {
        self.len = 0;
        self
    }
}

fn read_changes(
    mut reader: BufReader<&File>,
    file: &File,
    key: &MacKey,
    gate: &Gate,
    header: Header,
    mut chain: Chain,
    keys_end: u64,
) -> Result<Loaded, ReadError> {
    let (mut end, mut saved_at_ms) = (keys_end, header.heard_at_ms);
    let damage = loop {
        match read_change(&mut reader, key, &mut chain) {
            Ok(Some((change, bytes))) => {
                if let Change::Heard { unix_ms } = change {
                    saved_at_ms = unix_ms;
                }
                change.apply(gate)?;
                end += bytes;
            }
            Ok(None) => break None,
            Err(error) => break Some(format!("its changes from byte {end} on are left out ({error})")),
        }
    };
    let log = match damage {
        Some(_) => None,
        None => Some(Log {
            file: Arc::new(file.try_clone()?),
            chain,
            keys_end,
            end,
        }),
    };
    if let Some(log) = &log {
        (&*log.file).seek(SeekFrom::Start(log.end))?;
    }
    Ok(Loaded {
        log,
        saved_at_ms,
        damage,
    })
}

impl Log {
    pub fn append(&mut self, key: &MacKey, record: &[u8]) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(record.len() + 24);
        bytes.extend_from_slice(&(record.len() as u32).to_le_bytes());
        bytes.extend_from_slice(record);
        bytes.extend_from_slice(self.chain.advance(key, record));
        (&*self.file).write_all(&bytes)?;
        self.end += bytes.len() as u64;
        Ok(())
    }

    /// Whether the changes take more room than the keys, so that those are better written anew.
    pub fn is_outgrown(&self) -> bool {
        self.end - self.keys_end > OUTGROWN_AT_LEAST_BYTES.max(self.keys_end / 2)
    }
}

/// The next change of the log and its size, or `None` at the end of the file.
fn read_change(reader: &mut impl Read, key: &MacKey, chain: &mut Chain) -> Result<Option<(Change, u64)>, &'static str> {
    let mut length = [0; 4];
    match fill(reader, &mut length) {
        0 => return Ok(None),
        4 => {}
        _ => return Err("cut off"),
    }
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_RECORD_BYTES {
        return Err("damaged");
    }
    let mut record = vec![0; length + TAG_BYTES];
    if fill(reader, &mut record) < record.len() {
        return Err("cut off");
    }
    let tag = record.split_off(length);
    // Compared in plain time: whoever can time this reads the file already, and has no second try.
    if chain.advance(key, &record) != tag {
        return Err("damaged");
    }
    let change = Change::decode(&record).ok_or("written by another version")?;
    Ok(Some((change, (4 + length + TAG_BYTES) as u64)))
}

/// Reads until `buffer` is full or nothing more comes; how much that was.
fn fill(reader: &mut impl Read, buffer: &mut [u8]) -> usize {
    let mut filled = 0;
    while filled < buffer.len() {
        match reader.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    filled
}

/// Writes all keys to a new file, and forces them to the disk. `None`: a snapshot is being built, so there will be others.
pub fn write_keys(path: &Path, key: &MacKey, gate: &Gate, heard_at_ms: i64) -> io::Result<Option<Log>> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    // Before the keys are taken: the changes after it are applied on top again, which does no harm.
    let revision = gate.revision().unwrap_or(0);
    let mut header = Header {
        revision,
        keys: 0,
        keys_bytes: 0,
        heard_at_ms,
    };
    let mut sealing = Sealing::new(key);
    let mut writer = BufWriter::with_capacity(WRITTEN_AT_ONCE_BYTES, &file);
    writer.write_all(&header.encode())?;
    let (mut bytes, mut outcome) = (Vec::with_capacity(256), Ok(()));
    let exported = gate.export_keys(&mut |update| {
        if outcome.is_ok() {
            bytes.clear();
            encode_key(&update, &mut bytes);
            header.keys += 1;
            header.keys_bytes += bytes.len() as u64;
            sealing.update(&bytes);
            outcome = writer.write_all(&bytes);
        }
    });
    outcome?;
    if exported.is_none() {
        return Ok(None);
    }
    let seal = sealing.finish(&header);
    writer.write_all(&seal)?;
    writer.seek(SeekFrom::Start(0))?;
    writer.write_all(&header.encode())?;
    let end = HEADER_BYTES as u64 + header.keys_bytes + SEAL_BYTES as u64;
    writer.seek(SeekFrom::Start(end))?;
    drop(writer);
    file.sync_all()?;
    Ok(Some(Log {
        file: Arc::new(file),
        chain: Chain::from_seal(&seal),
        keys_end: end,
        end,
    }))
}

/// Checksum and MAC of the keys and then the header, which is known last: it counts them.
struct Sealing {
    checksum: Xxh3,
    mac: Hmac<Sha256>,
}

impl Sealing {
    fn new(key: &MacKey) -> Self {
        Sealing {
            checksum: Xxh3::new(),
            mac: key.start(),
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        self.checksum.update(bytes);
        self.mac.update(bytes);
    }

    fn finish(mut self, header: &Header) -> [u8; SEAL_BYTES] {
        self.update(&header.encode());
        let mut seal = [0; SEAL_BYTES];
        seal[..8].copy_from_slice(&self.checksum.digest().to_le_bytes());
        self.mac.update(&seal[..8]);
        seal[8..].copy_from_slice(&self.mac.finalize().into_bytes());
        seal
    }
}

struct Header {
    revision: u64,
    keys: u64,
    keys_bytes: u64,
    heard_at_ms: i64,
}

impl Header {
    fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..16].copy_from_slice(&self.revision.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.keys.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.keys_bytes.to_le_bytes());
        bytes[32..].copy_from_slice(&self.heard_at_ms.to_le_bytes());
        bytes
    }

    fn read(reader: &mut impl Read) -> Result<Header, ReadError> {
        let mut bytes = [0; HEADER_BYTES];
        reader.read_exact(&mut bytes)?;
        if bytes[..8] != *MAGIC {
            return Err(ReadError::Unusable("it is damaged, or written by another version"));
        }
        let number = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(word)
        };
        Ok(Header {
            revision: number(8),
            keys: number(16),
            keys_bytes: number(24),
            heard_at_ms: number(32) as i64,
        })
    }

    fn keys_end(&self) -> Option<u64> {
        self.keys_bytes
            .checked_add(HEADER_BYTES as u64)
            .filter(|end| end.checked_add(SEAL_BYTES as u64).is_some())
    }
}

/// The MAC's key, made ready.
pub struct MacKey(Hmac<Sha256>);

impl MacKey {
    /// Derived with a label, so that the token itself keys nothing but this derivation.
    pub fn derive(token: &[u8]) -> Self {
        let mut derivation = Hmac::<Sha256>::new_from_slice(token).expect("HMAC takes keys of any length");
        derivation.update(b"tollgate spool 1");
        let key = derivation.finalize().into_bytes();
        MacKey(Hmac::<Sha256>::new_from_slice(&key).expect("HMAC takes keys of any length"))
    }

    fn start(&self) -> Hmac<Sha256> {
        self.0.clone()
    }
}

/// The MAC that the next change's is built on.
struct Chain([u8; 32]);

impl Chain {
    fn from_seal(seal: &[u8; SEAL_BYTES]) -> Self {
        let mut mac = [0; 32];
        mac.copy_from_slice(&seal[8..]);
        Chain(mac)
    }

    /// The tag of the next record: half of its MAC; the chain goes on from the whole.
    fn advance(&mut self, key: &MacKey, record: &[u8]) -> &[u8] {
        let mut mac = key.start();
        mac.update(&self.0);
        mac.update(record);
        self.0.copy_from_slice(&mac.finalize().into_bytes());
        &self.0[..TAG_BYTES]
    }
}

const MAGIC: &[u8; 8] = b"TGSPOOL\x01";
const HEADER_BYTES: usize = 40;
const SEAL_BYTES: usize = 8 + 32;
/// 128 bits of MAC on each change.
const TAG_BYTES: usize = 16;
const CHUNK_BYTES: usize = 1 << 20;
/// Half a millisecond's work.
const BATCH_KEYS: usize = 512;
/// Batches that are decoded in advance.
const BATCHES: usize = 4;
/// A record holds what a line of the feed can, in fewer bytes.
const MAX_RECORD_BYTES: usize = crate::feed::parse::MAX_LINE_BYTES;
/// Flags, revision, five counts.
const MIN_KEY_BYTES: u64 = 8;
/// Changes below this are not worth writing the keys again; at 1,000 changes a second some 20 s.
const OUTGROWN_AT_LEAST_BYTES: u64 = 4 << 20;
