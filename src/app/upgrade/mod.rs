//! A new process takes over from a running one: no request is lost, and no permit is given twice or forgotten.
//!
//! The new process is started with `run --upgrade`, by hand or by the old one (`tollgate upgrade`, `POST /upgrade`). It
//! checks its configuration, listens on a socket in the private directory `STATE/run/upgrade`, and waits. The old one
//! connects when it is asked to (QUIT), and they talk, a line of JSON each:
//!
//! | | old process | new process |
//! |---|---|---|
//! | 1 | `hello`: its listening sockets (SCM_RIGHTS) | |
//! | 2 | | builds all that it can, opens the *passage*; `ready` |
//! | 3 | **decides no more**; ends what one process does at a time: usage and window counts are on disk, the spool has the last change, the database is closed; `go` | |
//! | 4 | | loads spool, journal and usage; `taken` |
//! | 5 | gives up for good: `yours` | |
//! | 6 | | accepts and **decides**; `serving` |
//! | 7 | accepts no more, tells its clients to close, finishes, ends | sees the connection end |
//!
//! # Why it is exact
//! *Nobody decides between the two bold points, and each decision lies before the first or after the second.* Every
//! decision of the proxy happens while its reader holds the proxy's duty (an `ArcSwap`); the old process swaps that for
//! [`Duty::PassOn`](crate::proxy::Proxy::pass_on_to) and waits until nobody holds the old one. So when the counts are written in step 3 they
//! are all the permits that it ever gave, and the new process has read them before its first decision. A window's
//! counts travel in the journal, which has them at the nanosecond of each sub-bucket's end: none is lost or doubled, and none leaves the window
//! early but for what the two readings of the wall clock differ by, 2 ms at most.
//!
//! *Requests that come to the old process later* — on connections that it accepted before, kept alive, or HTTP/2 with
//! its many streams — are decided, counted, logged and answered by the new one: the old one hands each on, untouched,
//! through the passage, a Unix socket of the new process, and only carries bytes. So such a connection may live on, and be closed as
//! its client expects it: by `Connection: close` with an answer, by GOAWAY, or after it was idle for some seconds.
//!
//! *Requests that come between the bold points* wait, those on new connections in the listen queue, those on old ones in
//! the passage's queue: for as long as writing and reading spool and journal takes, milliseconds for thousands of keys.
//!
//! *Requests that the old process decided on before* are finished by it, however long they last (up to its grace time). Their permits were
//! counted when they were given. Only places under a concurrency cap are not handed over: the two processes count those apart while both run.
//!
//! # When it fails
//! Up to step 5 the new process has decided nothing, and ends if the old one is gone. So until then the old one can take up its work
//! again where it left it: its windows are still in its memory. After step 5 it does so only if the new process has
//! ended; what that one counted in its short life is then forgiven as after any kill -9.
//!
//! A second upgrade is refused until the process before has ended, since it passes requests on to this one.

mod predecessor;
mod successor;

pub use predecessor::{Held, RunningGate, Upgrade};
pub use successor::Successor;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg, sockopt::socket_peercred,
};
use serde::{Deserialize, Serialize};
use std::fs::DirBuilder;
use std::io::{self, IoSlice, IoSliceMut, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What the two say to each other.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Message {
    Hello {
        /// Of this protocol.
        version: u32,
        pid: u32,
        /// One for each descriptor that comes with it.
        listeners: Vec<Described>,
    },
    Ready {
        pid: u32,
        /// Where requests are passed on to; `None` without a gate.
        passage: Option<PathBuf>,
    },
    Go {
        /// Whether the old process had keys: the new one must have them, too.
        had_keys: bool,
    },
    Taken {},
    Yours {},
    Serving {},
    /// Why the sender gives up.
    Failed {
        why: String,
    },
}

/// A listening socket that is handed over.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Described {
    role: Role,
    /// The address as the configuration has it: port 0 stays recognisable.
    asked: String,
}

/// Whose listener it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    Gate,
    Control,
    Admin,
}

const VERSION: u32 = 1;

/// The connection between the two.
struct Channel {
    stream: UnixStream,
    received: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

impl Channel {
    /// A conversation over `stream`, with a process of the same user (or of root) only.
    fn new(stream: UnixStream) -> io::Result<Self> {
        let peer = socket_peercred(&stream)?;
        if peer.uid != rustix::process::geteuid() && !peer.uid.is_root() {
            let why = format!("process {} belongs to another user", peer.pid.as_raw_nonzero());
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        }
        Ok(Channel {
            stream,
            received: Vec::new(),
            descriptors: Vec::new(),
        })
    }

    fn send(&mut self, message: &Message, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        let mut sent = 0;
        if !descriptors.is_empty() {
            let mut space = [const { MaybeUninit::uninit() }; ANCILLARY_BYTES];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            if !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
                return Err(io::Error::other(format!(
                    "more than {MOST_LISTENERS} listeners cannot be handed over"
                )));
            }
            sent = sendmsg(
                &self.stream,
                &[IoSlice::new(&line)],
                &mut ancillary,
                SendFlags::NOSIGNAL,
            )?;
        }
        self.stream.write_all(&line[sent..])
    }

    /// The next message; [`Message::Failed`] is an error, too.
    fn receive(&mut self, within: Duration) -> io::Result<Message> {
        self.stream.set_read_timeout(Some(within))?;
        loop {
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                return match serde_json::from_slice(&line)? {
                    Message::Failed { why } => Err(io::Error::other(why)),
                    message => Ok(message),
                };
            }
            let mut buffer = [0; 4096];
            let mut space = [const { MaybeUninit::uninit() }; ANCILLARY_BYTES];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let read = match recvmsg(
                &self.stream,
                &mut [IoSliceMut::new(&mut buffer)],
                &mut ancillary,
                RecvFlags::CMSG_CLOEXEC,
            ) {
                Ok(received) => received.bytes,
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::AGAIN) => {
                    let why = format!("it has not answered within {within:?}");
                    return Err(io::Error::new(io::ErrorKind::TimedOut, why));
                }
                Err(error) => return Err(error.into()),
            };
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                    self.descriptors.extend(descriptors);
                }
            }
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.received.extend_from_slice(&buffer[..read]);
            if self.received.len() > LONGEST_LINE {
                return Err(io::Error::other("it says too much"));
            }
        }
    }
}

/// The private directory for what only the two need to see. Made if missing.
fn directory(state_dir: &Path) -> io::Result<PathBuf> {
    let run = state_dir.join("run");
    std::fs::create_dir_all(&run)?;
    let directory = run.join("upgrade");
    match DirBuilder::new().mode(0o700).create(&directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(directory),
    }
}

/// Where the new process waits.
fn waiting_place(directory: &Path) -> PathBuf {
    directory.join("new.sock")
}

/// Descriptors in one message: Linux allows 253.
const MOST_LISTENERS: usize = 64;
const ANCILLARY_BYTES: usize = rustix::cmsg_space!(ScmRights(MOST_LISTENERS));
const LONGEST_LINE: usize = 64 * 1024;
/// For what is no more than a turn of the other's thread.
const AN_ANSWER: Duration = Duration::from_secs(10);
/// For building a gate, or loading a spool of millions of keys.
const BUILDING: Duration = Duration::from_secs(120);
