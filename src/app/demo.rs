//! The demo upstream of `tollgate dev`: answers any request with JSON of what reached it.
//!
//! `/status/NNN` answers with that status, `/delay/MS` after that many milliseconds (a minute at most), `/bytes/N` with
//! that many bytes (64 MiB at most).

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::Request;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde_json::json;
use std::time::Duration;

const MAX_DELAY_MS: u64 = 60_000;
const MAX_BYTES: usize = 64 << 20;
const CHUNK: usize = 64 << 10;

/// The demo upstream's only handler.
pub fn router() -> Router {
    Router::new().fallback(answer)
}

async fn answer(request: Request) -> Response {
    let (head, body) = request.into_parts();
    let target = head
        .uri
        .path_and_query()
        .map_or("/", |target| target.as_str())
        .to_owned();
    let argument = |prefix: &str| {
        head.uri
            .path()
            .strip_prefix(prefix)
            .and_then(|text| text.parse::<u64>().ok())
    };
    let body_bytes = match to_bytes(body, usize::MAX).await {
        Ok(bytes) => bytes.len(),
        Err(_) => return (StatusCode::BAD_REQUEST, "the request's body broke off\n").into_response(),
    };
    if let Some(count) = argument("/bytes/") {
        return bytes((count as usize).min(MAX_BYTES));
    }
    if let Some(delay_ms) = argument("/delay/") {
        tokio::time::sleep(Duration::from_millis(delay_ms.min(MAX_DELAY_MS))).await;
    }
    let status = argument("/status/").and_then(|code| StatusCode::from_u16(code as u16).ok());
    let headers: Vec<(&str, String)> = head
        .headers
        .iter()
        .map(|(name, value)| (name.as_str(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
        .collect();
    let reached = json!({
        "method": head.method.as_str(),
        "target": target,
        "headers": headers,
        "body_bytes": body_bytes,
    });
    (
        status.unwrap_or(StatusCode::OK),
        [(CONTENT_TYPE, "application/json")],
        reached.to_string(),
    )
        .into_response()
}

fn bytes(count: usize) -> Response {
    let chunk = Bytes::from(vec![b'x'; CHUNK.min(count)]);
    let chunks = (0..count.div_ceil(CHUNK.max(1))).map(move |n| {
        let left = count - n * CHUNK;
        Ok::<_, std::convert::Infallible>(chunk.slice(..left.min(CHUNK)))
    });
    Body::from_stream(futures_util::stream::iter(chunks)).into_response()
}
