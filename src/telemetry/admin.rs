//! The operator's listener: metrics, health, status, reload, upgrade. It belongs on loopback and has no authentication.

use super::metrics::{Exposition, Metrics};
use axum::extract::State;
use axum::http::header::{ACCEPT, CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

/// What a reload, or an upgrade, came to.
pub type ReloadFuture = Pin<Box<dyn Future<Output = Result<Value, Value>> + Send>>;

/// What the listener tells, supplied by whoever wires the process.
pub struct Admin {
    /// All metrics.
    pub metrics: Metrics,
    /// `Err(why not)` while requests cannot be served.
    pub ready: Box<dyn Fn() -> Result<(), String> + Send + Sync>,
    /// Everything about the process, for a person.
    pub status: Box<dyn Fn() -> Value + Send + Sync>,
    /// Reads the configuration again and applies it whole or not at all.
    pub reload: Box<dyn Fn() -> ReloadFuture + Send + Sync>,
    /// Starts a new process from the same files and hands over to it.
    pub upgrade: Box<dyn Fn() -> ReloadFuture + Send + Sync>,
}

impl fmt::Debug for Admin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Admin")
    }
}

/// The routes of the listener.
pub fn router(admin: Arc<Admin>) -> Router {
    Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route(
            "/status",
            get(|State(admin): State<Arc<Admin>>| async move { no_store(Json((admin.status)())) }),
        )
        .route(
            "/reload",
            post(|State(admin): State<Arc<Admin>>| async move { told((admin.reload)().await) }),
        )
        .route(
            "/upgrade",
            post(|State(admin): State<Arc<Admin>>| async move { told((admin.upgrade)().await) }),
        )
        .fallback(|| async {
            let message = "This listener has GET /metrics, /livez, /readyz, /status and POST /reload, /upgrade.";
            (StatusCode::NOT_FOUND, failure("NOT_FOUND", message))
        })
        .with_state(admin)
}

async fn readyz(State(admin): State<Arc<Admin>>) -> Response {
    match (admin.ready)() {
        Ok(()) => "ok\n".into_response(),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {why}\n")).into_response(),
    }
}

async fn metrics(State(admin): State<Arc<Admin>>, headers: HeaderMap) -> Response {
    let accept = headers.get(ACCEPT).and_then(|value| value.to_str().ok());
    let exposition = Exposition::accepted(accept.unwrap_or_default());
    let text = admin.metrics.render(exposition);
    ([(CONTENT_TYPE, exposition.content_type())], text).into_response()
}

fn told(outcome: Result<Value, Value>) -> Response {
    match outcome {
        Ok(data) => Json(json!({"success": true, "data": data})).into_response(),
        Err(error) => (
            StatusCode::UNPROCESSABLE_ENTITY,
            Json(json!({"success": false, "error": error})),
        )
            .into_response(),
    }
}

fn failure(code: &str, message: &str) -> Json<Value> {
    Json(json!({"success": false, "error": {"code": code, "message": message}}))
}

fn no_store(body: impl IntoResponse) -> Response {
    ([(CACHE_CONTROL, "no-store")], body).into_response()
}
