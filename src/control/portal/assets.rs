//! Style sheet, scripts and icon, from within the binary.

use std::sync::LazyLock;

use axum::extract::{Path, RawQuery};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};

use super::page::Problem;
use crate::control::model::Fault;

/// Where a page finds an asset. The query changes with the content, so browsers may keep it for good.
pub fn url(name: &str) -> String {
    match ASSETS.iter().find(|asset| asset.name == name) {
        Some(asset) => format!("/assets/{}?v={}", asset.name, asset.version),
        None => format!("/assets/{name}"),
    }
}

/// `GET /assets/{name}`.
pub async fn serve(Path(name): Path<String>, RawQuery(query): RawQuery) -> Result<Response, Problem> {
    let asset = ASSETS.iter().find(|asset| asset.name == name).ok_or(Fault::NotFound)?;
    let current = query.is_some_and(|query| query.strip_prefix("v=") == Some(&asset.version));
    let keep = if current {
        "public, max-age=31536000, immutable"
    } else {
        "no-cache"
    };
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static(asset.content_type)),
        (header::CACHE_CONTROL, HeaderValue::from_static(keep)),
    ];
    Ok((headers, asset.content).into_response())
}

struct Asset {
    name: &'static str,
    content_type: &'static str,
    content: &'static [u8],
    version: String,
}

static ASSETS: LazyLock<[Asset; 6]> = LazyLock::new(|| {
    const CSS: &str = "text/css; charset=utf-8";
    const SCRIPT: &str = "text/javascript; charset=utf-8";
    let asset = |name, content_type, content: &'static [u8]| Asset {
        name,
        content_type,
        content,
        version: format!("{:016x}", xxhash_rust::xxh3::xxh3_64(content)),
    };
    [
        asset("portal.css", CSS, include_bytes!("assets/portal.css")),
        asset("portal.js", SCRIPT, include_bytes!("assets/portal.js")),
        asset("htmx.min.js", SCRIPT, include_bytes!("assets/htmx.min.js")),
        asset("uPlot.iife.min.js", SCRIPT, include_bytes!("assets/uPlot.iife.min.js")),
        asset("uPlot.min.css", CSS, include_bytes!("assets/uPlot.min.css")),
        asset("icon.svg", "image/svg+xml", include_bytes!("assets/icon.svg")),
    ]
});
