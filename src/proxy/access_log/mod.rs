//! One line a request, JSON or text, written by a thread of its own: a slow or dead disk never blocks a request.
//!
//! A request writes its line into a buffer of its thread (`line`) and copies it to where lines wait (`queue`);
//! the writer takes many at once and makes one system call for them (`sink`). A line waits 10 ms at most for
//! others, then for the disk alone. Lines are in the order in which their requests ended.
//!
//! What cannot be written is dropped and counted: each line that was logged is in the end written whole or counted as
//! dropped. A line never holds a secret: no header value is in it but the host, the request's id and its trace
//! context, and the query is left out because people put keys there.

mod line;
mod queue;
mod sink;

use std::cell::RefCell;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub use line::{Entry, Format};
pub use sink::Output;

use queue::Queue;
use sink::Sink;

/// Settings of the access log.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The form of a line.
    pub format: Format,
    /// Where lines go.
    pub output: Output,
    /// Lines that may wait before more are dropped, beside what is being written.
    pub buffer_lines: usize,
}

/// The access log. Clones write to the same place.
#[derive(Clone, Debug)]
pub struct AccessLog {
    format: Format,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    queue: Queue,
    dropped: AtomicU64,
    written: AtomicU64,
}

/// Ends the writer when dropped, after it has written what waits.
#[derive(Debug)]
pub struct Writer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

thread_local! {
    /// A request's line, until it is copied. It grows to the longest of its thread, which the edge limits.
    static LINE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl AccessLog {
    /// Opens the log and starts its writer.
    ///
    /// # Errors
    /// Where the file cannot be opened, or no thread can be started.
    pub fn open(settings: &Settings) -> io::Result<(Self, Writer)> {
        let shared = Arc::new(Shared {
            queue: Queue::new(settings.buffer_lines.max(1)),
            dropped: AtomicU64::new(0),
            written: AtomicU64::new(0),
        });
        let sink = Sink::open(&settings.output)?;
        let (output, of_writer) = (settings.output.clone(), shared.clone());
        let thread = std::thread::Builder::new()
            .name("access-log".into())
            .spawn(move || sink::write_lines(&of_writer, sink, &output))?;
        let log = AccessLog {
            format: settings.format,
            shared: shared.clone(),
        };
        let thread = Some(thread);
        Ok((log, Writer { shared, thread }))
    }

    /// Logs one request; never waits for the disk.
    pub fn log(&self, entry: &Entry<'_>) {
        let has_room = LINE.with_borrow_mut(|line| {
            line.clear();
            entry.append_to(line, self.format);
            self.shared.queue.push(line)
        });
        if !has_room {
            self.shared.count(0, 1);
        }
    }

    /// Opens the file anew, after it was rotated. Returns once that is done, so that nothing more is written to the
    /// old file, or `within` is over, where a disk hangs; blocks.
    pub fn reopen(&self, within: Duration) {
        self.shared.queue.reopen(within);
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

impl Shared {
    fn count(&self, written: usize, dropped: usize) {
        self.written.fetch_add(written as u64, Ordering::Relaxed);
        self.dropped.fetch_add(dropped as u64, Ordering::Relaxed);
    }
}

impl Writer {
    /// Writes what waits, and ends. Gives up after `within`, where a disk hangs; false then.
    pub fn finish(mut self, within: Duration) -> bool {
        self.shared.queue.end();
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
        self.shared.queue.end();
        if let Some(thread) = self.thread.take() {
            // A writer that panicked has nothing left to write.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENTRY: Entry<'_> = Entry {
        bytes_sent: 36,
        client: None,
        decision: "PASSED",
        duration_us: 5,
        host: "h",
        key_id: "key_1",
        method: "GET",
        organization: "",
        path: "/a",
        request_id: "r1",
        route: "things",
        status: 200,
        tier: "default",
        unix_ms: 1_795_470_245_123,
        traceparent: "",
        upstream_us: 3,
    };

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
