//! One line a request, JSON or text, through a bounded channel: a slow or dead disk never blocks a request.
//!
//! What cannot be written is dropped and counted. A line never holds a secret: no header value is in it but the
//! request's id, and the query is left out because people put keys there.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

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

    /// Opens the file anew before the next line, after it was rotated.
    pub fn reopen(&self) {
        self.shared.reopen.store(true, Ordering::Relaxed);
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

impl Drop for Writer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
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
            Output::File(path) => Sink::File(OpenOptions::new().create(true).append(true).open(path)?),
        })
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Sink::Stdout => io::stdout().lock().write_all(bytes).and_then(|()| io::stdout().flush()),
            Sink::Stderr => io::stderr().lock().write_all(bytes),
            Sink::File(file) => file.write_all(bytes),
        }
    }
}

/// Writes whatever waits in one go, so that a busy gate pays one system call for many lines.
fn write_lines(waiting: &Receiver<Box<str>>, sink: &mut Sink, output: &Output, shared: &Shared) {
    let mut batch = String::new();
    loop {
        let first = match waiting.recv_timeout(Duration::from_millis(100)) {
            Ok(line) => Some(line),
            Err(RecvTimeoutError::Timeout) if !shared.stop.load(Ordering::Relaxed) => None,
            Err(_) => return,
        };
        if shared.reopen.swap(false, Ordering::Relaxed) {
            match Sink::open(output) {
                Ok(opened) => *sink = opened,
                Err(error) => log::error!("the access log cannot be opened anew, the old file stays in use: {error}"),
            }
        }
        let mut lines = 0;
        for line in first.into_iter().chain(waiting.try_iter().take(4096)) {
            batch.push_str(&line);
            lines += 1;
        }
        if lines == 0 {
            continue;
        }
        let counter = if sink.write(batch.as_bytes()).is_ok() {
            &shared.written
        } else {
            &shared.dropped
        };
        counter.fetch_add(lines, Ordering::Relaxed);
        batch.clear();
    }
}

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
        log.reopen();
        log.log(&ENTRY);
        drop(writer);
        assert_eq!(std::fs::read_to_string(path).unwrap().lines().count(), 1);
    }
}
