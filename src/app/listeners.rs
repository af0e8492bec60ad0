//! Listening sockets, bound before anything starts: an address in use is an error of the command, and port 0 has
//! become a number by the time anybody must be told it.

use async_trait::async_trait;
use pingora::server::{ListenFds, ShutdownWatch};
use pingora::services::{ServiceReadyNotifier, ServiceWithDependents};
use socket2::{Domain, Protocol, Socket, Type};
use std::fs;
use std::io::{self, Write as _};
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::IntoRawFd;
use std::path::Path;

/// Connections that may wait to be accepted. The kernel caps it at `net.core.somaxconn`, 4,096 on today's systems.
const BACKLOG: i32 = 4096;

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

/// Hands bound sockets to Pingora, under the addresses that its listeners ask for.
pub struct Handover(Vec<(String, Option<TcpListener>)>);

impl Handover {
    /// Sockets to hand over.
    pub fn new(listeners: impl IntoIterator<Item = (TcpListener, SocketAddr)>) -> Self {
        Handover(
            listeners
                .into_iter()
                .map(|(listener, address)| (address.to_string(), Some(listener)))
                .collect(),
        )
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
            for (address, listener) in &mut self.0 {
                if let Some(listener) = listener.take() {
                    fds.add(address.clone(), listener.into_raw_fd());
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
        Some(self.0.iter().map(|(address, _)| address.clone()).collect())
    }
}
