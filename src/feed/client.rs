//! The connection to a control plane: made again for ever, given up when it falls silent or talks nonsense.
//!
//! The reader is an async task that owns every deadline; the [`Applier`] has a thread of its own behind a short queue,
//! so that neither a million lines nor a slow disk hold up the runtime, and memory stays bounded.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use http::HeaderValue;
use http::header::{ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONTENT_ENCODING};
use tokio::sync::{mpsc, watch};
use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation, OutBuffer};

use super::apply::{Applier, Caps, FeedError, Progress};
use super::backoff::Backoff;
use super::{Settings, Shared, Source};
use crate::tls::{client_of, is_plain};
use crate::wire::Ack;

/// How the connection to the control plane is secured, where its URL is `https`.
#[derive(Clone, Debug, Default)]
pub struct Tls {
    /// PEM file of the authorities that may vouch for the control plane; `None`: the system's.
    pub ca: Option<PathBuf>,
    /// PEM files with this gate's own certificate and private key, for mutual TLS.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// Accept any certificate of the control plane. For tests only.
    pub danger_skip_verify: bool,
}

/// Why there is no HTTP client.
#[derive(Debug)]
pub struct ClientError(String);

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ClientError {}

/// A client for the control plane at `url`. It follows no redirect and uses no proxy: the token goes nowhere else.
///
/// # Errors
/// If a file of `tls` cannot be read or used, or there are no authorities where they are needed.
pub fn http_client(url: &str, tls: &Tls) -> Result<reqwest::Client, ClientError> {
    let read = |path: &PathBuf| std::fs::read(path).map_err(|e| ClientError(format!("{}: {e}", path.display())));
    let bad = |path: &PathBuf, error: reqwest::Error| ClientError(format!("{}: {}", path.display(), cause(&error)));
    let mut builder = client_of(url).connect_timeout(CONNECT_TIMEOUT).no_proxy();
    if let Some(path) = &tls.ca {
        let authorities = reqwest::Certificate::from_pem_bundle(&read(path)?).map_err(|e| bad(path, e))?;
        builder = builder.tls_certs_only(authorities);
    }
    if let Some((certificate, key)) = &tls.identity {
        let both = [read(certificate)?, b"\n".to_vec(), read(key)?].concat();
        builder = builder.identity(reqwest::Identity::from_pem(&both).map_err(|e| bad(certificate, e))?);
    }
    if tls.danger_skip_verify {
        builder = builder.tls_danger_accept_invalid_certs(true);
    }
    let authorities_sought = !is_plain(url) && tls.ca.is_none();
    builder.build().map_err(|error| {
        ClientError(match authorities_sought {
            true => format!("{}; {NO_AUTHORITIES}", cause(&error)),
            false => cause(&error),
        })
    })
}

/// What to do where the system's authorities cannot be had.
const NO_AUTHORITIES: &str = "https needs certificate authorities: install the system's (Debian: ca-certificates), or name a \
    file with those of the control plane as `ca`";

/// Follows a control plane's feed.
pub struct Client {
    http: reqwest::Client,
    keys_url: String,
    acks_url: String,
    authorization: HeaderValue,
    gate_name: String,
    gate_header: Option<HeaderValue>,
    zstd: bool,
    silence: Duration,
    caps: Caps,
}

impl Client {
    /// # Panics
    /// On settings for a key file.
    pub fn new(settings: &Settings) -> Self {
        let Source::Http {
            url,
            token,
            client,
            zstd,
        } = &settings.source
        else {
            unreachable!("Feed::new makes a client for a control plane only");
        };
        Client {
            http: client.clone(),
            keys_url: format!("{url}/feed/v1/keys"),
            acks_url: format!("{url}/feed/v1/acks"),
            authorization: token.authorization(),
            gate_name: settings.gate_name.clone(),
            gate_header: HeaderValue::try_from(&settings.gate_name).ok(),
            zstd: *zstd,
            silence: settings.heartbeat * 3,
            caps: Caps {
                keys: settings.max_keys,
                bytes: settings.max_snapshot_bytes,
            },
        }
    }

    /// Follows the feed and acknowledges what is in force. Never ends.
    pub async fn follow(&self, shared: &Arc<Shared>) {
        tokio::join!(self.reconnect(shared), self.acknowledge(shared.applied.subscribe()));
    }

    async fn reconnect(&self, shared: &Arc<Shared>) {
        let mut backoff = Backoff::new();
        // A lagging replica of the control plane can be behind for a moment; only one that stays so has lost data.
        let mut behind_in_a_row = 0;
        loop {
            let progress = Arc::new(Progress::new());
            let error = self.connect(shared, &progress).await;
            if progress.good() > 0 {
                backoff.reset();
                behind_in_a_row = 0;
            }
            if error.is_refusal() {
                shared.counts.refused.fetch_add(1, Ordering::Relaxed);
            }
            if let FeedError::Older { .. } = error {
                behind_in_a_row += 1;
                if behind_in_a_row >= BEHIND_AFTER && !shared.behind.swap(true, Ordering::Relaxed) {
                    log::error!("feed: {} stays behind the keys in force: {error}", shared.source);
                }
            }
            shared.lost(&error.to_string());
            tokio::time::sleep(backoff.delay()).await;
        }
    }

    /// One connection, from the request to the reason why it ended.
    async fn connect(&self, shared: &Arc<Shared>, progress: &Arc<Progress>) -> FeedError {
        // See the module's head: changes of one that is behind would be taken for old ones.
        let after = shared
            .gate
            .revision()
            .filter(|_| !shared.behind.load(Ordering::Relaxed));
        let url = match after {
            Some(revision) => format!("{}?after={revision}", self.keys_url),
            None => self.keys_url.clone(),
        };
        let mut request = self
            .http
            .get(url)
            .header(AUTHORIZATION, self.authorization.clone())
            .header(ACCEPT, "application/x-ndjson");
        if let Some(name) = &self.gate_header {
            request = request.header("x-tollgate-gate", name.clone());
        }
        if self.zstd {
            request = request.header(ACCEPT_ENCODING, "zstd");
        }
        let response = match tokio::time::timeout(self.silence, request.send()).await {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => return FeedError::Http(cause(&error)),
            Err(_) => return FeedError::Silent(self.silence),
        };
        if response.status() != http::StatusCode::OK {
            return FeedError::Status(response.status().as_u16());
        }
        let decoder = match response.headers().get(CONTENT_ENCODING).map(HeaderValue::as_bytes) {
            None | Some(b"identity") => None,
            Some(b"zstd") if self.zstd => match Decompressor::new() {
                Ok(decoder) => Some(decoder),
                Err(_) => return FeedError::Compression,
            },
            Some(_) => return FeedError::Compression,
        };
        shared.counts.connections.fetch_add(1, Ordering::Relaxed);
        // The control plane may be a new process that knows nothing of what was acknowledged before.
        shared.acknowledge();
        self.read(response, decoder, shared, progress).await
    }

    async fn read(
        &self,
        mut response: reqwest::Response,
        decoder: Option<Decompressor>,
        shared: &Arc<Shared>,
        progress: &Arc<Progress>,
    ) -> FeedError {
        let (queue, chunks) = mpsc::channel(QUEUED_CHUNKS);
        let mut applying = {
            let (shared, progress, caps) = (Arc::clone(shared), Arc::clone(progress), self.caps);
            tokio::task::spawn_blocking(move || apply(chunks, decoder, &shared, &progress, caps))
        };
        let given_up = loop {
            let (deadline, reason) = progress.deadline(self.silence);
            tokio::select! {
                chunk = response.chunk() => match chunk {
                    // The applier's end closes the queue; it knows why.
                    Ok(Some(chunk)) => if queue.send(chunk).await.is_err() { break None },
                    Ok(None) => break None,
                    Err(error) => break Some(FeedError::Http(cause(&error))),
                },
                () = tokio::time::sleep_until(deadline.into()) => {
                    // It may have moved on while this task waited.
                    if progress.deadline(self.silence).0 <= deadline {
                        break Some(reason);
                    }
                }
                outcome = &mut applying => return outcome.unwrap_or_else(broken),
            }
        };
        drop(queue);
        let outcome = applying.await.unwrap_or_else(broken);
        match given_up {
            // What the lines said comes before how the connection ended.
            Some(reason) if !outcome.is_refusal() || outcome == FeedError::Cut => reason,
            _ => outcome,
        }
    }

    /// Sends the newest revision in force whenever there is a newer one; those in between are not missed.
    async fn acknowledge(&self, mut applied: watch::Receiver<Option<u64>>) {
        let mut backoff = Backoff::new();
        let mut failing = false;
        // The sender lives in `Shared`, which outlives this future.
        while applied.changed().await.is_ok() {
            loop {
                let Some(revision) = *applied.borrow_and_update() else {
                    break;
                };
                let ack = Ack {
                    gate: self.gate_name.clone(),
                    revision,
                    version: Some(env!("CARGO_PKG_VERSION").to_owned()),
                };
                let sent = self
                    .http
                    .post(&self.acks_url)
                    .header(AUTHORIZATION, self.authorization.clone())
                    .timeout(ACK_TIMEOUT)
                    .json(&ack)
                    .send()
                    .await;
                let problem = match sent {
                    Ok(response) if response.status().is_success() => None,
                    Ok(response) => Some(format!("status {}", response.status().as_u16())),
                    Err(error) => Some(cause(&error)),
                };
                let Some(problem) = problem else {
                    (backoff, failing) = (Backoff::new(), false);
                    break;
                };
                if !std::mem::replace(&mut failing, true) {
                    log::warn!("feed: revision {revision} cannot be acknowledged: {problem}; trying again");
                }
                // A newer revision does not wait for this one's turn.
                tokio::select! {
                    () = tokio::time::sleep(backoff.delay()) => {}
                    changed = applied.changed() => if changed.is_err() { return },
                }
            }
        }
    }
}

/// Applies chunks until there are no more, or one is refused. Runs on a thread of its own.
fn apply(
    mut chunks: mpsc::Receiver<Bytes>,
    mut decoder: Option<Decompressor>,
    shared: &Shared,
    progress: &Progress,
    caps: Caps,
) -> FeedError {
    let mut applier = Applier::new(shared, progress, caps);
    // All that has come, so that the reader is woken once for it and not for each small chunk.
    let mut come = Vec::with_capacity(QUEUED_CHUNKS);
    while chunks.blocking_recv_many(&mut come, QUEUED_CHUNKS) > 0 {
        for chunk in come.drain(..) {
            let applied = match &mut decoder {
                None => applier.push(&chunk),
                Some(decoder) => decoder.push(&chunk, &mut |plain| applier.push(plain)),
            };
            if let Err(error) = applied {
                return error;
            }
        }
    }
    applier.finish()
}

fn broken(error: tokio::task::JoinError) -> FeedError {
    log::error!("feed: applying the stream broke off: {error}");
    FeedError::Unexpected("applying its stream broke off")
}

/// A compressed stream, undone piece by piece.
struct Decompressor {
    decoder: Decoder<'static>,
    plain: Vec<u8>,
}

impl Decompressor {
    fn new() -> std::io::Result<Self> {
        let mut decoder = Decoder::new()?;
        decoder.set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX))?;
        Ok(Decompressor {
            decoder,
            plain: vec![0; 256 * 1024],
        })
    }

    fn push(&mut self, chunk: &[u8], each: &mut dyn FnMut(&[u8]) -> Result<(), FeedError>) -> Result<(), FeedError> {
        let mut input = InBuffer::around(chunk);
        loop {
            let mut output = OutBuffer::around(&mut self.plain[..]);
            self.decoder
                .run(&mut input, &mut output)
                .map_err(|_| FeedError::Compression)?;
            let count = output.pos();
            each(&self.plain[..count])?;
            // A full buffer may have left something inside the decoder.
            if input.pos() == chunk.len() && count < self.plain.len() {
                return Ok(());
            }
        }
    }
}

/// The innermost cause of an error, which is what says something; without the URL, which may hold a password.
fn cause(error: &reqwest::Error) -> String {
    let mut innermost: &dyn std::error::Error = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    if error.is_timeout() {
        "timed out".to_owned()
    } else if std::ptr::addr_eq(innermost, error) {
        // Its own text names the URL.
        "the request failed".to_owned()
    } else {
        innermost.to_string()
    }
}

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const ACK_TIMEOUT: Duration = Duration::from_secs(5);
/// Chunks between reader and applier; hyper's are at most some 400 KiB.
const QUEUED_CHUNKS: usize = 16;
/// 8 MiB of history: what the widest level of zstd uses without asking, and all that a stream may cost.
const WINDOW_LOG_MAX: u32 = 23;
const BEHIND_AFTER: u32 = 3;
