//! `GET /feed/v1/keys`: what gates follow.
//!
//! Each connection has a cursor, its revision, and reads from the store what lies beyond it whenever something was
//! committed. So a slow gate holds up nobody and costs no memory: it is as far behind as it is, and several changes of one
//! key reach it as one line. Between the reader and the socket there is a channel of a few pieces; a gate that takes none
//! of them for [`PATIENCE`] is cut off, and comes back where it was.

use std::io::Write as _;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use tokio::sync::mpsc;
use xxhash_rust::xxh3::Xxh3;

use super::api::App;
use super::api::caller::{Gate, is_gate_name};
use super::api::error::ApiError;
use super::api::fields::QueryFields;
use super::model::Fault;
use super::store::{Changes, SnapshotReader};
use crate::wire::FeedLine;

/// Follow the keys.
///
/// Newline-delimited JSON that does not end by itself: a snapshot where `after` is absent or too old, then every change as
/// it happens, and a heartbeat every five seconds. Compressed with zstd if accepted.
#[utoipa::path(
    get, path = "/feed/v1/keys", tag = "Feed", operation_id = "followKeys",
    params(
        ("after" = Option<u64>, Query, description = "The revision that the gate has.", minimum = 0),
        ("gate" = Option<String>, Query, description = "The gate's name, if no `x-tollgate-gate` header gives it.",
            min_length = 1, max_length = 64, pattern = "^[!-~]+$"),
    ),
    responses((status = 200, description = "The feed.", body = String, content_type = "application/x-ndjson")),
)]
pub async fn follow(
    State(app): State<App>,
    gate: Gate,
    QueryFields(mut fields): QueryFields,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let asked = fields.number("after", 0..=i64::MAX).map(i64::unsigned_abs);
    let named = fields.text("gate");
    if named.as_deref().is_some_and(|name| !is_gate_name(name)) {
        fields.fault::<()>("gate", "must have 1 to 64 visible ASCII characters");
    }
    fields.done()?;
    let name = gate.name.or(named);
    // The store is asked before the answer begins, so that a database that is away is a 503 and not a broken stream.
    let first = app.store.feed_changes(asked.unwrap_or(u64::MAX), 1).await?;
    let after = match first {
        Changes::Resync => None,
        Changes::Lines { .. } => asked,
    };
    // The store knows it, so it is one of ours, whether or not this process has heard of it.
    if let Some(after) = after {
        app.hub.publish(after);
    }
    if let Some(ahead) = asked.filter(|asked| *asked > app.hub.revision() && after.is_none()) {
        log::warn!(
            "{} has revision {ahead}, the database only {}: was it restored from a backup? Then let the gates load it anew \
             by POST /api/v1/admin/feed/resync",
            name.as_deref().unwrap_or("a gate"),
            app.hub.revision()
        );
    }
    let compress = accepts_zstd(&headers);
    let (pieces, receiver) = mpsc::channel(PIECES);
    let connected = match name.as_deref() {
        Some(name) => Some(app.gate_connected(name, asked.unwrap_or(0)).await),
        None => None,
    };
    tokio::spawn(async move {
        let ended = match Sender::new(pieces, compress) {
            Ok(sender) => serve(&app, sender, after).await,
            Err(end) => end,
        };
        log::info!(
            "the feed of {} ended: {ended}",
            name.as_deref().unwrap_or("a gate without a name")
        );
        if let Some(connected) = connected {
            connected.end(app.now_ms());
        }
    });
    let body = Body::from_stream(futures_util::stream::unfold(receiver, |mut receiver| async move {
        let piece = receiver.recv().await?;
        Some((Ok::<Bytes, std::convert::Infallible>(piece), receiver))
    }));
    let mut response = body.into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"));
    headers.insert(header::VARY, HeaderValue::from_static("accept-encoding"));
    if compress {
        headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("zstd"));
    }
    Ok(response)
}

/// Sends until something ends it; answers what.
async fn serve(app: &App, mut sender: Sender, after: Option<u64>) -> End {
    let mut closing = app.hub.closing();
    let work = async {
        let mut at = match after {
            Some(at) => at,
            None => send_snapshot(app, &mut sender).await?,
        };
        let mut revisions = app.hub.revisions();
        let mut heartbeat = tokio::time::interval(app.settings.heartbeat);
        heartbeat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            revisions.borrow_and_update();
            at = send_changes(app, &mut sender, at).await?;
            tokio::select! {
                changed = revisions.changed() => changed.map_err(|_| End::Closing)?,
                // Also looks at the store once more: another process may have written.
                _ = heartbeat.tick() => {
                    at = send_changes(app, &mut sender, at).await?;
                    sender.line(&FeedLine::Heartbeat { revision: at }).await?;
                }
            }
        }
    };
    let result: Result<std::convert::Infallible, End> = tokio::select! {
        result = work => result,
        _ = closing.wait_for(|closing| *closing) => Err(End::Closing),
    };
    match result {
        Err(end) => end,
        Ok(never) => match never {},
    }
}

/// Everything, as it is at one revision; answers which.
async fn send_snapshot(app: &App, sender: &mut Sender) -> Result<u64, End> {
    let mut reader = app.store.feed_snapshot().await?;
    app.hub.publish(reader.revision());
    let whole = send_whole(reader.as_mut(), sender);
    // An open snapshot keeps SQLite from reusing its log, so no gate may hold one for long.
    tokio::time::timeout(SNAPSHOT_DEADLINE, whole)
        .await
        .map_err(|_| End::Slow)?
}

async fn send_whole(reader: &mut dyn SnapshotReader, sender: &mut Sender) -> Result<u64, End> {
    let revision = reader.revision();
    sender
        .line(&FeedLine::Snapshot {
            revision,
            keys: reader.keys(),
        })
        .await?;
    let mut checksum = Xxh3::new();
    while let Some(lines) = reader.next().await? {
        checksum.update(lines.as_bytes());
        sender.send(lines).await?;
    }
    sender
        .line(&FeedLine::End {
            xxh3: format!("{:016x}", checksum.digest()),
        })
        .await?;
    Ok(revision)
}

/// Everything that happened since; answers the revision that the gate is then at.
async fn send_changes(app: &App, sender: &mut Sender, mut at: u64) -> Result<u64, End> {
    loop {
        match app.store.feed_changes(at, CHANGES_AT_ONCE).await? {
            Changes::Resync => at = send_snapshot(app, sender).await?,
            Changes::Lines { text, through } if text.is_empty() => return Ok(through),
            Changes::Lines { text, through } => {
                // Before the gate can acknowledge it; the writer says so too, but perhaps a moment later.
                app.hub.publish(through);
                sender.send(text).await?;
                at = through;
            }
        }
    }
}

/// The way to the socket: compressed where the gate likes it, and never waiting for ever.
struct Sender {
    pieces: mpsc::Sender<Bytes>,
    encoder: Option<zstd::stream::write::Encoder<'static, Vec<u8>>>,
}

impl Sender {
    fn new(pieces: mpsc::Sender<Bytes>, compress: bool) -> Result<Self, End> {
        let encoder = match compress {
            // Level 1: digests do not compress, and the rest does at any level.
            true => Some(zstd::stream::write::Encoder::new(Vec::new(), 1).map_err(End::encoder)?),
            false => None,
        };
        Ok(Self { pieces, encoder })
    }

    async fn line(&mut self, line: &FeedLine) -> Result<(), End> {
        let mut text = serde_json::to_string(line).map_err(|e| End::Fault(Fault::Internal(e.to_string())))?;
        text.push('\n');
        self.send(text).await
    }

    async fn send(&mut self, text: String) -> Result<(), End> {
        let piece = match &mut self.encoder {
            None => Bytes::from(text),
            Some(encoder) => {
                encoder
                    .write_all(text.as_bytes())
                    .and_then(|()| encoder.flush())
                    .map_err(End::encoder)?;
                Bytes::from(std::mem::take(encoder.get_mut()))
            }
        };
        match tokio::time::timeout(PATIENCE, self.pieces.send(piece)).await {
            Err(_) => Err(End::Slow),
            Ok(Err(_)) => Err(End::Gone),
            Ok(Ok(())) => Ok(()),
        }
    }
}

/// Why a feed ended.
#[derive(Debug)]
enum End {
    /// The gate closed the connection.
    Gone,
    /// It does not read.
    Slow,
    /// The control plane stops.
    Closing,
    Fault(Fault),
}

impl End {
    fn encoder(error: std::io::Error) -> Self {
        End::Fault(Fault::Internal(format!("zstd: {error}")))
    }
}

impl From<Fault> for End {
    fn from(fault: Fault) -> Self {
        End::Fault(fault)
    }
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            End::Gone => f.write_str("the gate closed it"),
            End::Slow => f.write_str("the gate does not read"),
            End::Closing => f.write_str("the control plane stops"),
            End::Fault(fault) => fault.fmt(f),
        }
    }
}

fn accepts_zstd(headers: &HeaderMap) -> bool {
    let lines = headers
        .get_all(header::ACCEPT_ENCODING)
        .iter()
        .filter_map(|line| line.to_str().ok());
    lines.flat_map(|line| line.split(',')).any(|coding| {
        let mut parts = coding.split(';').map(str::trim);
        let is_zstd = parts.next().is_some_and(|name| name.eq_ignore_ascii_case("zstd"));
        is_zstd && !parts.any(|weight| matches!(weight, "q=0" | "q=0.0" | "q=0.00" | "q=0.000"))
    })
}

/// Pieces between the reader and the socket, each at most a thousand lines (about 300 KB).
const PIECES: usize = 4;
/// Lines of one read while catching up.
const CHANGES_AT_ONCE: u32 = 1_000;
/// How long a gate may take nothing at all.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long a whole snapshot may take: a million keys over a link of 10 Mbit/s.
const SNAPSHOT_DEADLINE: Duration = Duration::from_secs(300);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zstd_is_used_where_it_is_accepted() {
        let accepts = |value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static(value));
            accepts_zstd(&headers)
        };
        assert!(accepts("gzip, zstd"));
        assert!(accepts("ZSTD;q=0.5"));
        assert!(!accepts("gzip"));
        assert!(!accepts("zstd;q=0"));
        assert!(!accepts("zstdx"));
    }
}
