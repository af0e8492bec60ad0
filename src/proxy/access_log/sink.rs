//! The writer's side: where lines go, and what is known of those that do not get there.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileTypeExt as _;
use std::path::PathBuf;

use super::Shared;
use super::queue::{Chunk, Task};

/// Where lines go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// A file, appended to and opened anew at every [`AccessLog::reopen`](super::AccessLog::reopen).
    File(PathBuf),
}

/// An output that is open. What was written is not in a buffer of ours: it is counted as written.
pub(super) enum Sink {
    Stdout,
    Stderr,
    File(File),
}

impl Sink {
    pub(super) fn open(output: &Output) -> io::Result<Self> {
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
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
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

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes what the requests leave, until it is to end.
pub(super) fn write_lines(shared: &Shared, sink: Sink, output: &Output) {
    let mut pen = Pen::new(sink);
    let mut written = Chunk::default();
    loop {
        match shared.queue.next(written) {
            Task::Write(chunk) => {
                let whole = pen.write(&chunk);
                shared.count(whole, chunk.lines - whole);
                written = chunk;
            }
            Task::Reopen(turn) => {
                match Sink::open(output) {
                    Ok(opened) => pen.go_on_in(opened),
                    Err(error) => {
                        log::error!("the access log cannot be opened anew, the old file stays in use: {error}");
                    }
                }
                shared.queue.reopened(turn);
                written = Chunk::default();
            }
            Task::End => return,
        }
    }
}

/// Writes whole lines, whatever happened to those before.
pub(super) struct Pen<W> {
    sink: W,
    is_failing: bool,
    /// Part of a line is in the file, and its end was dropped.
    is_torn: bool,
}

impl<W: Write> Pen<W> {
    pub(super) fn new(sink: W) -> Self {
        Pen {
            sink,
            is_failing: false,
            is_torn: false,
        }
    }

    fn go_on_in(&mut self, sink: W) {
        (self.sink, self.is_torn) = (sink, false);
    }

    /// How many lines were written whole; the others are lost.
    pub(super) fn write(&mut self, chunk: &Chunk) -> usize {
        let (bytes, outcome) = self
            .mend()
            .map_or_else(|error| (0, Err(error)), |()| self.put(&chunk.bytes));
        if bytes > 0 {
            self.is_torn = chunk.bytes[bytes - 1] != b'\n';
        }
        self.tell(outcome);
        memchr::memchr_iter(b'\n', &chunk.bytes[..bytes]).count()
    }

    /// Ends what is torn: the next line is not to be its end.
    fn mend(&mut self) -> io::Result<()> {
        if self.is_torn {
            self.put(b"\n").1?;
            self.is_torn = false;
        }
        Ok(())
    }

    /// Writes as much as it can: how many bytes that was.
    fn put(&mut self, bytes: &[u8]) -> (usize, io::Result<()>) {
        let mut written = 0;
        while written < bytes.len() {
            match self.sink.write(&bytes[written..]) {
                Ok(0) => return (written, Err(io::ErrorKind::WriteZero.into())),
                Ok(more) => written += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return (written, Err(error)),
            }
        }
        (written, Ok(()))
    }

    /// Says it once where nothing can be written, and once where it can be again.
    fn tell(&mut self, outcome: io::Result<()>) {
        match outcome {
            Err(error) => {
                if !std::mem::replace(&mut self.is_failing, true) {
                    log::error!("the access log cannot be written, lines are dropped: {error}");
                }
            }
            Ok(()) => {
                if std::mem::replace(&mut self.is_failing, false) {
                    log::info!("the access log is written again");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk that takes so many bytes, and keeps each write apart.
    #[derive(Default)]
    struct Disk {
        writes: Vec<Vec<u8>>,
        room: usize,
    }

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let taken = bytes.len().min(self.room);
            if taken == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.room -= taken;
            self.writes.push(bytes[..taken].to_vec());
            Ok(taken)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn chunk(text: &str) -> Chunk {
        Chunk {
            bytes: text.into(),
            lines: text.lines().count(),
        }
    }

    #[test]
    fn a_chunk_leaves_in_one_write() {
        let mut pen = Pen::new(Disk {
            room: 100,
            ..Disk::default()
        });
        assert_eq!(pen.write(&chunk("one\ntwo\nthree\n")), 3);
        assert_eq!(pen.sink.writes, [b"one\ntwo\nthree\n"]);
    }

    #[test]
    fn a_line_after_a_torn_one_stands_by_itself() {
        let mut pen = Pen::new(Disk {
            room: 6,
            ..Disk::default()
        });
        assert_eq!(pen.write(&chunk("one\ntwo\nthree\n")), 1);
        assert_eq!(pen.write(&chunk("four\n")), 0, "the disk is full");
        pen.sink.room = 100;
        assert_eq!(pen.write(&chunk("five\n")), 1);
        assert_eq!(pen.write(&chunk("six\n")), 1);
        assert_eq!(pen.sink.writes.concat(), b"one\ntw\nfive\nsix\n");
    }

    #[test]
    fn what_was_torn_in_the_old_file_is_not_mended_in_the_new_one() {
        let mut pen = Pen::new(Disk {
            room: 2,
            ..Disk::default()
        });
        assert_eq!(pen.write(&chunk("one\n")), 0);
        pen.go_on_in(Disk {
            room: 100,
            ..Disk::default()
        });
        assert_eq!(pen.write(&chunk("two\n")), 1);
        assert_eq!(pen.sink.writes.concat(), b"two\n");
    }
}
