//! What gates post: acknowledgements and usage. What they follow is in `feed_server`.

use axum::extract::{Request, State};
use serde::Serialize;
use utoipa::ToSchema;

use super::caller::{Gate, is_gate_name};
use super::error::ApiError;
use super::fields::json;
use super::{App, Envelope, Reply};
use crate::control::service::check::Check;
use crate::wire::{Ack, UsageBatch};

/// The newest revision there is.
#[derive(Serialize, ToSchema)]
pub struct AckAnswer {
    revision: u64,
}

/// Whether a batch was new.
#[derive(Serialize, ToSchema)]
pub struct UsageTaken {
    /// False: it was in the ledger already, so nothing was counted again.
    applied: bool,
}

/// A gate has applied everything up to a revision.
#[utoipa::path(
    post, path = "/feed/v1/acks", tag = "Feed", operation_id = "acknowledge",
    request_body(content = super::document::AckRequest, content_type = "application/json"),
    responses((status = 200, description = "Noted.", body = Envelope<AckAnswer>)),
)]
pub async fn acknowledge(State(app): State<App>, _: Gate, request: Request) -> Result<Reply<AckAnswer>, ApiError> {
    let ack: Ack = json(request, 4 * 1024).await?;
    let fits = |version: &String| version.chars().count() <= 64 && !version.chars().any(char::is_control);
    let version_fits = ack.version.as_ref().is_none_or(fits);
    let mut check = Check::new(Vec::new());
    if !is_gate_name(&ack.gate) {
        check.fault("gate", "must have 1 to 64 visible ASCII characters");
    }
    if ack.revision > LARGEST_REVISION {
        check.fault("revision", "must be at most 2^53");
    }
    if !version_fits {
        check.fault("version", "must have at most 64 characters, and no control characters");
    }
    check.finish()?;
    app.gate_acknowledged(&ack.gate, ack.revision, ack.version).await?;
    Ok(Reply::ok(AckAnswer {
        revision: app.hub.revision(),
    }))
}

/// What a gate has counted. Each batch counts once, however often and in whatever order it is sent.
#[utoipa::path(
    post, path = "/feed/v1/usage", tag = "Feed", operation_id = "postUsage",
    request_body(content = super::document::UsageRequest, content_type = "application/json"),
    responses((status = 200, description = "In the ledger.", body = Envelope<UsageTaken>)),
)]
pub async fn usage(State(app): State<App>, _: Gate, request: Request) -> Result<Reply<UsageTaken>, ApiError> {
    let batch: UsageBatch = json(request, MOST_BATCH_BYTES).await?;
    let applied = app.apply_usage(&batch).await?;
    Ok(Reply::ok(UsageTaken { applied }))
}

/// A hundred thousand keys that were all used within one flush make about 16 MB.
const MOST_BATCH_BYTES: usize = 32 * 1024 * 1024;
/// 2^53: what JSON's numbers hold exactly everywhere.
const LARGEST_REVISION: u64 = 1 << 53;
