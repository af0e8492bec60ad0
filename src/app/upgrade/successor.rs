//! The new process's side.

use super::{AN_ANSWER, BUILDING, Channel, Message, Role, VERSION, directory, waiting_place};
use crate::app::AppError;
use std::fs::{self, File};
use std::io;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A process that takes over from another.
pub struct Successor {
    channel: Channel,
    predecessor: u32,
    listeners: Vec<(Role, String, TcpListener)>,
    passage: Option<Passage>,
}

/// The socket through which the old process passes requests on. Its file is removed with it.
pub struct Passage {
    path: PathBuf,
}

impl Drop for Passage {
    fn drop(&mut self) {
        // It may never have been made.
        let _ = fs::remove_file(&self.path);
    }
}

impl Successor {
    /// Waits until a running process offers its listeners.
    ///
    /// # Errors
    /// Nobody does within a minute, or another process waits already.
    pub fn wait(state_dir: &Path) -> Result<Self, AppError> {
        Self::wait_for(state_dir, PATIENCE).map_err(|error| AppError::Failed(format!("cannot take over: {error}")))
    }

    fn wait_for(state_dir: &Path, patience: Duration) -> io::Result<Self> {
        let directory = directory(state_dir)?;
        let lock = File::create(directory.join("lock"))?;
        if lock.try_lock().is_err() {
            return Err(io::Error::other("another new process waits already"));
        }
        let place = waiting_place(&directory);
        // One that is left over belongs to nobody: the lock is ours.
        let _ = fs::remove_file(&place);
        let listener = UnixListener::bind(&place)
            .map_err(|error| io::Error::new(error.kind(), format!("cannot listen on {}: {error}", place.display())))?;
        log::info!("waiting for the running process to hand over (QUIT)");
        let accepted = accept(&listener, patience);
        let _ = fs::remove_file(&place);
        let mut channel = Channel::new(accepted?)?;
        let (predecessor, described) = match channel.receive(AN_ANSWER)? {
            Message::Hello {
                version: VERSION,
                pid,
                listeners,
            } => (pid, listeners),
            Message::Hello { version, .. } => {
                let why = format!("the running process speaks version {version} of the protocol, this one {VERSION}");
                let said = Message::Failed { why: why.clone() };
                channel.send(&said, &[])?;
                return Err(io::Error::other(why));
            }
            other => return Err(io::Error::other(format!("the running process says {other:?}"))),
        };
        let descriptors = std::mem::take(&mut channel.descriptors);
        if descriptors.len() != described.len() {
            return Err(io::Error::other("not every listener came over"));
        }
        let listeners = described
            .into_iter()
            .zip(descriptors)
            .map(|(described, descriptor)| (described.role, described.asked, TcpListener::from(descriptor)));
        Ok(Successor {
            channel,
            predecessor,
            listeners: listeners.collect(),
            passage: None,
        })
    }

    /// The old process's listener for this role and address, if it has one.
    pub fn take_listener(&mut self, role: Role, asked: &str) -> Option<TcpListener> {
        let found = self
            .listeners
            .iter()
            .position(|(its, address, _)| *its == role && address == asked)?;
        Some(self.listeners.swap_remove(found).2)
    }

    /// Opens the passage.
    pub fn open_passage(&mut self, state_dir: &Path) -> io::Result<(UnixListener, PathBuf)> {
        let path = directory(state_dir)?.join(format!("{}.sock", std::process::id()));
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path)
            .map_err(|error| io::Error::new(error.kind(), format!("cannot listen on {}: {error}", path.display())))?;
        listener.set_nonblocking(true)?;
        self.passage = Some(Passage { path: path.clone() });
        Ok((listener, path))
    }

    /// Says that all is built; returns once the old process decides no more and has written everything down. Answers
    /// whether that one had keys.
    pub fn ready(&mut self) -> Result<bool, AppError> {
        // What this process does not listen on is closed by whoever has it last.
        for (role, asked, _) in self.listeners.drain(..) {
            log::warn!("the {role:?} listener on {asked} is not in the configuration any more");
        }
        let passage = self.passage.as_ref().map(|passage| passage.path.clone());
        let ready = Message::Ready {
            pid: std::process::id(),
            passage,
        };
        let answer = self
            .channel
            .send(&ready, &[])
            .and_then(|()| self.channel.receive(BUILDING));
        match answer {
            Ok(Message::Go { had_keys }) => Ok(had_keys),
            Ok(other) => Err(self.unexpected(&other)),
            Err(error) => Err(self.gone(&error)),
        }
    }

    /// Says that everything was taken up; returns once the old process can never decide again.
    pub fn taken(&mut self) -> Result<(), AppError> {
        let answer = self
            .channel
            .send(&Message::Taken {}, &[])
            .and_then(|()| self.channel.receive(AN_ANSWER));
        match answer {
            Ok(Message::Yours {}) => Ok(()),
            Ok(other) => Err(self.unexpected(&other)),
            Err(error) => Err(self.gone(&error)),
        }
    }

    /// Tells the old process why there is no taking over.
    pub fn give_up(mut self, error: &AppError) {
        let why = error.to_string();
        // It may be gone.
        let _ = self.channel.send(&Message::Failed { why }, &[]);
    }

    /// Says that this process serves, and waits for the end of the one before; blocks.
    pub fn serve_until_alone(mut self, has_predecessor: &Arc<AtomicBool>) {
        if let Err(error) = self.channel.send(&Message::Serving {}, &[]) {
            log::debug!("the old process has ended already: {error}");
        }
        loop {
            match self.channel.receive(Duration::from_secs(3600)) {
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {}
                _ => break,
            }
        }
        log::info!("process {} has ended", self.predecessor);
        drop(self.passage.take());
        has_predecessor.store(false, Ordering::Release);
    }

    fn unexpected(&self, message: &Message) -> AppError {
        AppError::Failed(format!(
            "cannot take over: process {} says {message:?}",
            self.predecessor
        ))
    }

    fn gone(&self, error: &io::Error) -> AppError {
        AppError::Failed(format!("cannot take over from process {}: {error}", self.predecessor))
    }
}

fn accept(listener: &UnixListener, patience: Duration) -> io::Result<std::os::unix::net::UnixStream> {
    listener.set_nonblocking(true)?;
    let deadline = Instant::now() + patience;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        if Instant::now() >= deadline {
            let why = format!("no running process has handed over within {patience:?}");
            return Err(io::Error::new(io::ErrorKind::TimedOut, why));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Long enough to type a command.
const PATIENCE: Duration = Duration::from_secs(60);
