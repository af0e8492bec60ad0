//! Listening sockets, there before anything starts: an address in use is an error of the command, and port 0 has
//! become a number by the time anybody must be told it. They come from a process that hands over, from the service
//! manager (socket activation), or are bound here.

use super::upgrade::{Held, Role, Successor};
use async_trait::async_trait;
use listenfd::ListenFd;
use pingora::server::{ListenFds, ShutdownWatch};
use pingora::services::{ServiceReadyNotifier, ServiceWithDependents};
use rustix::io::{FdFlags, fcntl_setfd};
use socket2::{Domain, Protocol, Socket, Type};
use std::fs;
use std::io::{self, Write as _};
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{IntoRawFd, OwnedFd};
use std::path::Path;

/// A listening socket and its address.
pub type BoundListener = (TcpListener, SocketAddr);

/// Where the listening sockets of a process come from.
pub struct Sockets<'s> {
    predecessor: Option<&'s mut Successor>,
    activated: Vec<BoundListener>,
    /// A second descriptor of each, to be handed over one day.
    held: Vec<Held>,
}

impl<'s> Sockets<'s> {
    /// Those of the process before, if there is one, and those that the service manager gave.
    ///
    /// # Errors
    /// The service manager gave something else than a TCP listener.
    pub fn new(predecessor: Option<&'s mut Successor>) -> io::Result<Self> {
        let mut given = ListenFd::from_env();
        let mut activated = vec![];
        for index in 0..given.len() {
            let listener = given.take_tcp_listener(index).map_err(|error| {
                io::Error::new(error.kind(), format!("socket activation, descriptor {index}: {error}"))
            })?;
            let Some(listener) = listener else { continue };
            // A new process gets its sockets by being handed them, not by inheriting numbers.
            fcntl_setfd(&listener, FdFlags::CLOEXEC)?;
            listener.set_nonblocking(true)?;
            let address = listener.local_addr()?;
            activated.push((listener, address));
        }
        Ok(Sockets {
            predecessor,
            activated,
            held: vec![],
        })
    }

    /// A socket that listens on `asked` (`HOST:PORT`, port 0 allowed).
    ///
    /// # Errors
    /// Says which address, and why not.
    pub fn listen(&mut self, role: Role, asked: &str) -> io::Result<BoundListener> {
        let inherited = self.predecessor.as_mut().and_then(|old| old.take_listener(role, asked));
        let (listener, address) = match inherited {
            Some(listener) => {
                let address = listener.local_addr()?;
                (listener, address)
            }
            None => match self.take_activated(asked) {
                Some(activated) => activated,
                None => bind(asked)?,
            },
        };
        self.held.push(Held {
            role,
            asked: asked.to_owned(),
            listener: listener.try_clone()?,
        });
        Ok((listener, address))
    }

    /// Ends the search: what nobody listens on is closed. Returns a second descriptor of each socket.
    pub fn finish(self) -> Vec<Held> {
        for (_, address) in self.activated {
            log::warn!("the service manager listens on {address}, and the configuration does not");
        }
        self.held
    }

    fn take_activated(&mut self, asked: &str) -> Option<BoundListener> {
        let wanted: Vec<SocketAddr> = asked.to_socket_addrs().ok()?.collect();
        let found = self
            .activated
            .iter()
            .position(|(_, address)| wanted.contains(address))?;
        Some(self.activated.swap_remove(found))
    }
}

/// Connections that may wait to be accepted. The kernel caps it at `net.core.somaxconn`, 4,096 on today's systems.
const BACKLOG: i32 = 4096;

/// How much of a response the kernel takes from us before the client takes it. By default that grows to megabytes for
/// each connection, and a client counts as making progress only once a third of it is gone. A slow client is woken for
/// when half of this is, which 500 bytes a second reach within the 60 s that it is given (`limits.response_grace`).
/// What is on its way to the client is not bounded by it.
const UNSENT_BYTES: u32 = 32 * 1024;

/// Binds `address` (`HOST:PORT`, port 0 allowed).
///
/// # Errors
/// Says which address, and why not.
pub fn bind(address: &str) -> io::Result<(TcpListener, SocketAddr)> {
    let why = |error: io::Error| io::Error::new(error.kind(), format!("cannot listen on {address}: {error}"));
    let resolved = address.to_socket_addrs().map_err(why)?.next();
    let resolved = resolved.ok_or_else(|| why(io::Error::other("the name has no address")))?;
    let listen = || {
        let socket = Socket::new(Domain::for_address(resolved), Type::STREAM, Some(Protocol::TCP))?;
        // Without it a restart would have to wait for the old process's connections to leave TIME_WAIT.
        socket.set_reuse_address(true)?;
        // Accepted sockets inherit it.
        socket.set_tcp_notsent_lowat(UNSENT_BYTES)?;
        socket.set_nonblocking(true)?;
        socket.bind(&resolved.into())?;
        socket.listen(BACKLOG)?;
        let listener = TcpListener::from(socket);
        let bound = listener.local_addr()?;
        Ok((listener, bound))
    };
    listen().map_err(why)
}

/// Writes the address in use as one line, for whoever has to find it.
///
/// # Errors
/// Says which file, and why not.
pub fn write_address(state_dir: &Path, name: &str, address: SocketAddr) -> io::Result<()> {
    let dir = state_dir.join("run");
    let path = dir.join(format!("{name}.addr"));
    let write = || {
        fs::create_dir_all(&dir)?;
        // Renamed into place, so that nobody reads half an address.
        let draft = dir.join(format!(".{name}.addr"));
        let mut file = fs::File::create(&draft)?;
        writeln!(file, "{address}")?;
        fs::rename(&draft, &path)
    };
    write().map_err(|error| io::Error::new(error.kind(), format!("cannot write {}: {error}", path.display())))
}

/// Hands listening sockets to Pingora, under the names that its listeners ask for.
pub struct Handover(Vec<(String, Option<OwnedFd>)>);

impl Handover {
    /// Sockets to hand over.
    pub fn new(sockets: impl IntoIterator<Item = (OwnedFd, String)>) -> Self {
        Handover(sockets.into_iter().map(|(socket, name)| (name, Some(socket))).collect())
    }
}

#[async_trait]
impl ServiceWithDependents for Handover {
    async fn start_service(
        &mut self,
        fds: Option<ListenFds>,
        _shutdown: ShutdownWatch,
        _listeners_per_fd: usize,
        ready: ServiceReadyNotifier,
    ) {
        if let Some(fds) = fds {
            let mut fds = fds.lock();
            for (name, socket) in &mut self.0 {
                if let Some(socket) = socket.take() {
                    fds.add(name.clone(), socket.into_raw_fd());
                }
            }
        }
        ready.notify_ready();
    }

    fn name(&self) -> &str {
        "listeners"
    }

    fn threads(&self) -> Option<usize> {
        Some(1)
    }

    fn listen_addresses(&self) -> Option<Vec<String>> {
        Some(self.0.iter().map(|(name, _)| name.clone()).collect())
    }
}
