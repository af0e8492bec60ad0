//! Accepting connections: how many there may be, how long a handshake and a head may take, who may come at all.
//!
//! `axum::serve` has neither limit, and the portal is reachable from outside.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::ConnectInfo;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tower::ServiceExt as _;

use crate::tls::ListenerTls;

/// Serves until `shutdown`, then lets every request that is under way end. How long that may take is the caller's to say:
/// dropping this future ends everything.
///
/// With `tls`, a client that does not show the certificate that it demands gets no further than the handshake.
pub async fn serve(
    listener: TcpListener,
    tls: Option<Arc<ListenerTls>>,
    router: Router,
    shutdown: impl Future<Output = ()>,
) {
    let (closing, closed) = watch::channel(false);
    let slots = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    let refusals = Arc::new(RefusedHandshakes::default());
    let mut connections = JoinSet::new();
    tokio::pin!(shutdown);
    loop {
        // Taken before accepting, so that what is too much waits in the kernel's queue and costs nothing here.
        let accepted = async {
            // The semaphore is never closed.
            let slot = Arc::clone(&slots).acquire_owned().await.ok();
            (listener.accept().await, slot)
        };
        tokio::select! {
            (accepted, slot) = accepted => match accepted {
                Ok((stream, peer)) => {
                    let (router, closed) = (router.clone(), closed.clone());
                    let (tls, refusals) = (tls.clone(), refusals.clone());
                    connections.spawn(async move {
                        if let Err(error) = stream.set_nodelay(true) {
                            log::debug!("TCP_NODELAY was not set: {error}");
                        }
                        match tls {
                            None => converse(stream, peer, router, closed).await,
                            Some(tls) => match shake_hands(stream, &tls).await {
                                Ok(stream) => converse(stream, peer, router, closed).await,
                                Err(why) => refusals.tell(peer, &why),
                            },
                        }
                        drop(slot);
                    });
                }
                Err(error) => {
                    // Out of descriptors, mostly: some come back as connections end.
                    log::warn!("the control plane cannot accept a connection: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(_) = connections.join_next() => {}
            () = &mut shutdown => break,
        }
    }
    drop(listener);
    closing.send_replace(true);
    while connections.join_next().await.is_some() {}
}

async fn shake_hands(stream: TcpStream, tls: &ListenerTls) -> Result<TlsStream<TcpStream>, String> {
    let handshake = TlsAcceptor::from(tls.config()).accept(stream);
    match tokio::time::timeout(HANDSHAKE_DEADLINE, handshake).await {
        Ok(shaken) => shaken.map_err(|error| error.to_string()),
        Err(_) => Err("it did not finish in time".to_owned()),
    }
}

/// Says why handshakes fail, at most once a second: whoever can connect can make them fail as fast as he likes.
#[derive(Default)]
struct RefusedHandshakes(Mutex<Told>);

#[derive(Default)]
struct Told {
    last: Option<Instant>,
    since: u64,
}

impl RefusedHandshakes {
    fn tell(&self, peer: SocketAddr, why: &str) {
        let mut told = self.0.lock().unwrap_or_else(|e| e.into_inner());
        if told.last.is_some_and(|last| last.elapsed() < Duration::from_secs(1)) {
            told.since += 1;
            return;
        }
        let more = match told.since {
            0 => String::new(),
            count => format!(" ({count} more since the last such line)"),
        };
        log::warn!("the control plane refused the TLS handshake of {peer}: {why}{more}");
        *told = Told {
            last: Some(Instant::now()),
            since: 0,
        };
    }
}

async fn converse<S>(stream: S, peer: SocketAddr, router: Router, mut closed: watch::Receiver<bool>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = tower::service_fn(move |mut request: hyper::Request<Incoming>| {
        request.extensions_mut().insert(ConnectInfo(peer));
        router.clone().oneshot(request.map(Body::new))
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_DEADLINE)
        .max_buf_size(MOST_HEAD_BYTES);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MOST_STREAMS)
        .max_header_list_size(MOST_HEAD_BYTES as u32)
        .keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE);
    let connection = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = wait_until_set(&mut closed) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        log::debug!("a connection from {peer} ended badly: {error}");
    }
}

async fn wait_until_set(flag: &mut watch::Receiver<bool>) {
    // The guard that `wait_for` gives must not live on over an await. An error means that the sender is gone: set, too.
    let _ = flag.wait_for(|set| *set).await;
}

/// Each costs a descriptor and some kilobytes; the usual limit of descriptors is 1,024 soft and 524,288 hard.
const MOST_CONNECTIONS: usize = 4_096;
/// For the whole TLS handshake, as at the gate.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);
/// From the connection's first byte, or from the answer before, to the end of the head; idle connections end by it too.
const HEAD_DEADLINE: Duration = Duration::from_secs(30);
/// As the gate's limit.
const MOST_HEAD_BYTES: usize = 32 * 1024;
/// Of one HTTP/2 connection.
const MOST_STREAMS: u32 = 100;
/// An HTTP/2 peer that does not answer a ping for as long is gone.
const KEEP_ALIVE: Duration = Duration::from_secs(20);
