//! One line a request, JSON or text, through a bounded channel: a slow or dead disk never blocks a request.
//!
//! What cannot be written is dropped and counted: each line that was logged is in the end written whole or counted as
//! dropped. A line never holds a secret: no header value is in it but the request's id, and the query is left out
//! because people put keys there.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileTypeExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The form of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// One JSON object.
    Json,
    /// `TIME CLIENT "METHOD PATH" STATUS CODE KEY TIER DURATION REQUEST-ID`.
    Text,
}

/// Where lines go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// A file, appended to and opened anew at every [`AccessLog::reopen`].
    File(PathBuf),
}

/// Settings of the access log.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The form of a line.
    pub format: Format,
    /// Where lines go.
    pub output: Output,
    /// Lines that may wait before more are dropped.
    pub buffer_lines: usize,
}

/// What is said of one request.
#[derive(Debug)]
pub struct Entry<'a> {
    /// When it came, Unix milliseconds.
    pub unix_ms: i64,
    /// Whom it came from.
    pub client: &'a str,
    /// Its id.
    pub request_id: &'a str,
    /// Its method.
    pub method: &'a str,
    /// Its host.
    pub host: &'a str,
    /// Its path, without the query.
    pub path: &'a str,
    /// The response's status; 0 where none was sent.
    pub status: u16,
    /// `PASSED`, or the code of the refusal.
    pub decision: &'a str,
    /// The rule it fell under.
    pub route: &'a str,
    /// The tier it was counted in, or empty.
    pub tier: &'a str,
    /// The key's id, or empty.
    pub key_id: &'a str,
    /// The organisation, or empty.
    pub organization: &'a str,
    /// From the head to the end of the response.
    pub duration_us: u64,
    /// Of which the upstream took.
    pub upstream_us: u64,
    /// Bytes of the response's body.
    pub bytes_sent: usize,
    /// W3C trace context, or empty.
    pub traceparent: &'a str,
}

/// The access log. Clones write to the same place.
#[derive(Clone, Debug)]
pub struct AccessLog {
    format: Format,
    lines: SyncSender<Box<str>>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    dropped: AtomicU64,
    written: AtomicU64,
    reopen: AtomicBool,
    stop: AtomicBool,
}

/// Ends the writer when dropped, after it has written what waits.
#[derive(Debug)]
pub struct Writer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl AccessLog {
    /// Opens the log and starts its writer.
    ///
    /// # Errors
    /// Where the file cannot be opened, or no thread can be started.
    pub fn open(settings: &Settings) -> io::Result<(Self, Writer)> {
        let (lines, waiting) = sync_channel(settings.buffer_lines.max(1));
        let shared = Arc::new(Shared::default());
        let mut sink = Sink::open(&settings.output)?;
        let output = settings.output.clone();
        let writer = shared.clone();
        let thread = std::thread::Builder::new()
            .name("access-log".into())
            .spawn(move || write_lines(&waiting, &mut sink, &output, &writer))?;
        Ok((
            AccessLog {
                format: settings.format,
                lines,
                shared: shared.clone(),
            },
            Writer {
                shared,
                thread: Some(thread),
            },
        ))
    }

    /// Logs one request; never waits.
    pub fn log(&self, entry: &Entry<'_>) {
        let line = match self.format {
            Format::Json => entry.json(),
            Format::Text => entry.text(),
        };
        if self.lines.try_send(line.into()).is_err() {
            self.shared.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Opens the file anew, after it was rotated. Returns once that is done, so that nothing more is written to the
    /// old file, or `within` is over, where a disk hangs; blocks.
    pub fn reopen(&self, within: Duration) {
        self.shared.reopen.store(true, Ordering::Release);
        let deadline = Instant::now() + within;
        while self.shared.reopen.load(Ordering::Acquire) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Lines dropped so far, because too many were waiting or the disk refused them.
    pub fn dropped(&self) -> u64 {
        self.shared.dropped.load(Ordering::Relaxed)
    }

    /// Lines written so far.
    pub fn written(&self) -> u64 {
        self.shared.written.load(Ordering::Relaxed)
    }
}

impl Writer {
    /// Writes what waits, and ends. Gives up after `within`, where a disk hangs; false then.
    pub fn finish(mut self, within: Duration) -> bool {
        self.shared.stop.store(true, Ordering::Release);
        let Some(thread) = self.thread.take() else { return true };
        let deadline = Instant::now() + within;
        while !thread.is_finished() {
            if Instant::now() >= deadline {
                log::warn!("the access log is not written to its end: its disk hangs");
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // A writer that panicked has nothing left to write.
            let _ = thread.join();
        }
    }
}

enum Sink {
    Stdout,
    Stderr,
    File(File),
}

impl Sink {
    fn open(output: &Output) -> io::Result<Self> {
        Ok(match output {
            Output::Stdout => Sink::Stdout,
            Output::Stderr => Sink::Stderr,
            Output::File(path) => {
                // Opened for writing alone, a pipe would hold up the start until somebody reads it.
                let is_pipe = fs::metadata(path).is_ok_and(|there| there.file_type().is_fifo());
                Sink::File(OpenOptions::new().create(true).append(true).read(is_pipe).open(path)?)
            }
        })
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            // Unbuffered, as a file is: what is written is counted.
            Sink::Stdout => {
                let mut out = io::stdout().lock();
                out.write_all(bytes)?;
                out.flush()?;
                Ok(bytes.len())
            }
            Sink::Stderr => io::stderr().lock().write(bytes),
            Sink::File(file) => file.write(bytes),
        }
    }

    /// Writes as much as it can: how many bytes that was.
    fn write_all(&mut self, bytes: &[u8]) -> (usize, io::Result<()>) {
        let mut written = 0;
        while written < bytes.len() {
            match self.write(&bytes[written..]) {
                Ok(0) => return (written, Err(io::ErrorKind::WriteZero.into())),
                Ok(more) => written += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return (written, Err(error)),
            }
        }
        (written, Ok(()))
    }
}

/// Writes whatever waits in one go, so that a busy gate pays one system call for many lines.
fn write_lines(waiting: &Receiver<Box<str>>, sink: &mut Sink, output: &Output, shared: &Shared) {
    let mut batch = String::new();
    let mut failing = false;
    // Part of a line is in the file, and its end was dropped.
    let mut is_torn = false;
    loop {
        let first = match waiting.recv_timeout(LOOK_UP) {
            Ok(line) => Some(line),
            Err(RecvTimeoutError::Timeout) if !shared.stop.load(Ordering::Acquire) => None,
            Err(_) => return,
        };
        if shared.reopen.load(Ordering::Acquire) {
            match Sink::open(output) {
                Ok(opened) => (*sink, is_torn) = (opened, false),
                Err(error) => log::error!("the access log cannot be opened anew, the old file stays in use: {error}"),
            }
            shared.reopen.store(false, Ordering::Release);
        }
        if is_torn {
            batch.push('\n');
        }
        let mut lines = 0;
        for line in first.into_iter().chain(waiting.try_iter().take(4096)) {
            batch.push_str(&line);
            lines += 1;
        }
        if lines > 0 {
            let (bytes, outcome) = sink.write_all(batch.as_bytes());
            let ends = batch.as_bytes()[..bytes].iter().filter(|byte| **byte == b'\n').count();
            let whole = (ends - usize::from(is_torn && ends > 0)) as u64;
            shared.written.fetch_add(whole, Ordering::Relaxed);
            shared.dropped.fetch_add(lines - whole, Ordering::Relaxed);
            if bytes > 0 {
                is_torn = !batch.as_bytes()[..bytes].ends_with(b"\n");
            }
            match outcome {
                Err(error) => {
                    if !std::mem::replace(&mut failing, true) {
                        log::error!("the access log cannot be written, lines are dropped: {error}");
                    }
                }
                Ok(()) => {
                    if std::mem::replace(&mut failing, false) {
                        log::info!("the access log is written again");
                    }
                }
            }
        }
        batch.clear();
    }
}

/// How often an idle writer looks whether it is to open its file anew, or to end.
const LOOK_UP: Duration = Duration::from_millis(20);

impl Entry<'_> {
    fn json(&self) -> String {
        let mut line = serde_json::json!({
            "time": time(self.unix_ms), "client": self.client, "requestId": self.request_id, "method": self.method,
            "host": self.host, "path": self.path, "status": self.status, "decision": self.decision,
            "route": self.route, "durationUs": self.duration_us, "upstreamUs": self.upstream_us,
            "bytesSent": self.bytes_sent,
        });
        let optional = [
            ("tier", self.tier),
            ("keyId", self.key_id),
            ("organization", self.organization),
            ("traceparent", self.traceparent),
        ];
        for (name, value) in optional.into_iter().filter(|(_, value)| !value.is_empty()) {
            line[name] = value.into();
        }
        format!("{line}\n")
    }

    fn text(&self) -> String {
        let dash = |text: &str| {
            if text.is_empty() {
                "-".to_owned()
            } else {
                text.escape_debug().to_string()
            }
        };
        format!(
            "{} {} \"{} {}\" {} {} {} {} {}us {}\n",
            time(self.unix_ms),
            self.client,
            self.method.escape_debug(),
            self.path.escape_debug(),
            self.status,
            self.decision,
            dash(self.key_id),
            dash(self.tier),
            self.duration_us,
            self.request_id
        )
    }
}

fn time(unix_ms: i64) -> String {
    jiff::Timestamp::from_millisecond(unix_ms).map_or_else(|_| unix_ms.to_string(), |time| format!("{time:.3}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENTRY: Entry<'_> = Entry {
        unix_ms: 1_795_470_245_123,
        client: "192.0.2.1",
        request_id: "r1",
        method: "GET",
        host: "h",
        path: "/a\"b",
        status: 200,
        decision: "PASSED",
        route: "things",
        tier: "default",
        key_id: "key_1",
        organization: "",
        duration_us: 5,
        upstream_us: 3,
        bytes_sent: 36,
        traceparent: "",
    };

    #[test]
    fn lines_have_the_promised_fields() {
        let line: serde_json::Value = serde_json::from_str(&ENTRY.json()).unwrap();
        assert_eq!(
            (&line["time"], &line["path"]),
            (&"2026-11-23T21:44:05.123Z".into(), &"/a\"b".into())
        );
        assert_eq!(line.get("organization"), None);
        assert!(
            ENTRY
                .text()
                .starts_with("2026-11-23T21:44:05.123Z 192.0.2.1 \"GET /a\\\"b\" 200 PASSED key_1 default 5us r1")
        );
    }

    #[test]
    fn every_line_is_written_dropped_or_both_counts_are_wrong() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("access.log");
        let settings = Settings {
            format: Format::Json,
            output: Output::File(path.clone()),
            buffer_lines: 100_000,
        };
        let (log, writer) = AccessLog::open(&settings).unwrap();
        for _ in 0..10_000 {
            log.log(&ENTRY);
        }
        drop(writer);
        assert_eq!((log.written(), log.dropped()), (10_000, 0));
        assert_eq!(std::fs::read_to_string(path).unwrap().lines().count(), 10_000);
    }

    #[test]
    fn a_dead_disk_blocks_nobody_and_is_counted() {
        let settings = Settings {
            format: Format::Text,
            output: Output::File("/dev/full".into()),
            buffer_lines: 10,
        };
        let (log, writer) = AccessLog::open(&settings).unwrap();
        for _ in 0..1000 {
            log.log(&ENTRY);
        }
        drop(writer);
        assert_eq!((log.written(), log.dropped()), (0, 1000));
    }

    #[test]
    fn a_rotated_file_is_opened_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("access.log");
        let settings = Settings {
            format: Format::Text,
            output: Output::File(path.clone()),
            buffer_lines: 100,
        };
        let (log, writer) = AccessLog::open(&settings).unwrap();
        std::fs::rename(&path, dir.path().join("access.log.1")).unwrap();
        log.reopen(Duration::from_secs(10));
        log.log(&ENTRY);
        drop(writer);
        assert_eq!(std::fs::read_to_string(path).unwrap().lines().count(), 1);
    }

    #[test]
    fn a_pipe_that_nobody_reads_blocks_nobody_and_every_line_is_accounted_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        assert!(
            std::process::Command::new("mkfifo")
                .arg(&path)
                .status()
                .unwrap()
                .success()
        );
        let settings = Settings {
            format: Format::Text,
            output: Output::File(path),
            // More than a pipe's 64 KiB, so that the writer hangs however late its thread comes to run.
            buffer_lines: 2_000,
        };
        let (log, writer) = AccessLog::open(&settings).unwrap();
        // Far more than the pipe and the buffer hold.
        const LINES: u64 = 20_000;
        for _ in 0..LINES {
            log.log(&ENTRY);
        }
        assert!(
            !writer.finish(Duration::from_millis(50)),
            "the writer hangs, and is left behind"
        );
        let accounted = log.written() + log.dropped();
        // What the writer holds, and what waits, is neither yet.
        assert!(
            log.dropped() > 0 && accounted <= LINES && accounted + 5_000 > LINES,
            "{accounted}"
        );
    }
}
