//! The OpenAPI document, made from the routes, and the page to read it with, which loads nothing from elsewhere.

use std::sync::Arc;

use axum::Router;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde::Deserialize;
use serde_json::{Value, json};
use utoipa::{PartialSchema, ToSchema};

use super::App;
use super::caller::cookie_name;
use super::error::{ErrorBody, ErrorEnvelope, FieldError};
use super::render;
use crate::control::settings::Settings;

/// What a name may be: no control characters, and one character at least that is not a space.
const NAME: &str = r"^[^\x00-\x1f\x7f-\x9f]*[^\x00-\x20\x7f-\xa0][^\x00-\x1f\x7f-\x9f]*$";

/// What an e-mail address may be; the same rule as in the service.
const EMAIL: &str = r"^[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?$";

/// A gate's acknowledgement.
#[derive(Deserialize, ToSchema)]
#[allow(dead_code, reason = "describes the body, which `wire` reads")]
pub struct AckRequest {
    #[schema(min_length = 1, max_length = 64, pattern = "^[!-~]+$", example = "gate-1")]
    gate: String,
    #[schema(minimum = 0, maximum = 9007199254740992_u64)]
    revision: u64,
    #[schema(max_length = 64)]
    version: Option<String>,
}

/// What a gate has counted since its last batch.
#[derive(Deserialize, ToSchema)]
#[allow(dead_code, reason = "describes the body, which `wire` reads")]
pub struct UsageRequest {
    #[schema(min_length = 1, max_length = 64, pattern = "^[!-~]+$", example = "gate-1")]
    gate: String,
    /// Names this life of the gate's counter.
    #[schema(min_length = 1, max_length = 64, pattern = "^[!-~]+$")]
    run: String,
    #[schema(minimum = 1, maximum = 9007199254740992_u64)]
    sequence: u64,
    #[schema(value_type = Vec<PermitCountRequest>, required = false)]
    permits: Vec<PermitCountRequest>,
    #[schema(required = false)]
    refusals: Vec<RefusalCountRequest>,
    #[schema(required = false)]
    last_used: Vec<LastUsedRequest>,
}

/// Permits of one key in one tier in one minute.
#[derive(Deserialize, ToSchema)]
#[allow(dead_code, reason = "describes the body, which `wire` reads")]
struct PermitCountRequest {
    #[schema(min_length = 1, max_length = 128, pattern = "^[!-~]+$")]
    key: String,
    #[schema(min_length = 1, max_length = 128, pattern = "^[!-~]+$")]
    tier: String,
    #[schema(min_length = 1, max_length = 32, pattern = "^[!-~]+$")]
    environment: String,
    /// Minutes since the Unix epoch.
    #[schema(minimum = 0, maximum = 4_000_000_000_u64)]
    minute: i64,
    #[schema(minimum = 0, maximum = 9007199254740992_u64)]
    count: u64,
}

/// Refusals of one code in one minute.
#[derive(Deserialize, ToSchema)]
#[allow(dead_code, reason = "describes the body, which `wire` reads")]
struct RefusalCountRequest {
    #[schema(min_length = 1, max_length = 128, pattern = "^[!-~]+$")]
    key: Option<String>,
    #[schema(max_length = 32, pattern = "^[!-~]*$")]
    environment: Option<String>,
    #[schema(max_length = 128, pattern = "^[!-~]*$")]
    tier: String,
    #[schema(min_length = 1, max_length = 64, pattern = "^[!-~]+$")]
    code: String,
    #[schema(minimum = 0, maximum = 4_000_000_000_u64)]
    minute: i64,
    #[schema(minimum = 0, maximum = 9007199254740992_u64)]
    count: u64,
}

/// When a secret was last used.
#[derive(Deserialize, ToSchema)]
#[allow(dead_code, reason = "describes the body, which `wire` reads")]
struct LastUsedRequest {
    #[schema(min_length = 1, max_length = 128, pattern = "^[!-~]+$")]
    key: String,
    /// The first 16 hex digits of its digest.
    secret: String,
    /// Milliseconds since the Unix epoch.
    #[schema(minimum = 0, maximum = 253402128000000_u64)]
    at_ms: i64,
}

/// Puts into the document what is the same everywhere (who may call, and how a call can fail) and what this
/// installation offers. The routes themselves say only what is their own.
pub fn complete(document: utoipa::openapi::OpenApi, settings: &Settings) -> Value {
    // A document that was just built from Rust values is always representable.
    let mut document = serde_json::to_value(document).unwrap_or_else(|_| json!({}));
    document["openapi"] = json!("3.1.0");
    document["info"] = json!({
        "title": "Tollgate control API",
        "version": env!("CARGO_PKG_VERSION"),
        "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        "description": "Keys, their life and what they used. Answers are `{\"success\":true,\"data\":…}`, refusals \
            `{\"success\":false,\"error\":{\"code\",\"message\",\"requestId\"}}`. Unknown fields are refused, so that a \
            misspelt one is not lost. What belongs to another organisation is 404.",
    });
    document["tags"] = json!(TAGS.map(|(name, description)| json!({"name": name, "description": description})));
    document["components"]["securitySchemes"] = json!({
        "session": {"type": "apiKey", "in": "cookie", "name": cookie_name(settings),
            "description": "The session that a login gives. Requests from pages of other sites are refused."},
        "token": {"type": "http", "scheme": "bearer", "bearerFormat": "pxm_…",
            "description": "An access token; acts for one organisation."},
        "operator": {"type": "http", "scheme": "bearer", "description": "The operator's admin token."},
        "gate": {"type": "http", "scheme": "bearer", "description": "The feed token."},
    });
    for (name, schema) in [
        ("ErrorEnvelope", schema::<ErrorEnvelope>()),
        ("ErrorBody", schema::<ErrorBody>()),
        ("FieldError", schema::<FieldError>()),
    ] {
        document["components"]["schemas"][name] = schema;
    }
    for schema in [
        "RegisterRequest",
        "CreateKeyRequest",
        "UpdateKeyRequest",
        "CreateTokenRequest",
        "UpdateOwnOrganizationRequest",
        "UpdateOrganizationRequest",
    ] {
        document["components"]["schemas"][schema]["properties"]["name"]["pattern"] = json!(NAME);
    }
    document["components"]["schemas"]["RegisterRequest"]["properties"]["email"]["pattern"] = json!(EMAIL);
    let environments: Vec<_> = settings.environments.iter().map(|e| &e.name).collect();
    let scopes: Vec<_> = settings.scopes.iter().map(|s| &s.name).collect();
    let plans: Vec<_> = settings.plans.iter().map(|p| &p.name).collect();
    let schemas = &mut document["components"]["schemas"];
    schemas["CreateKeyRequest"]["properties"]["environment"]["enum"] = json!(environments);
    schemas["CreateKeyRequest"]["properties"]["scopes"]["items"]["enum"] = json!(scopes);
    schemas["UpdateKeyRequest"]["properties"]["scopes"]["items"]["enum"] = json!(scopes);
    let no_plan: Option<&String> = None;
    let plan: Vec<_> = plans.into_iter().map(Some).chain([no_plan]).collect();
    schemas["UpdateOrganizationRequest"]["properties"]["plan"]["enum"] = json!(plan);
    if let Some(paths) = document["paths"].as_object_mut() {
        for (path, item) in paths {
            let Some(methods) = item.as_object_mut() else { continue };
            for (method, operation) in methods {
                complete_operation(path, method, operation);
            }
        }
    }
    document
}

/// The document and its page.
pub struct Documents {
    json: Arc<str>,
    page: Arc<str>,
}

impl Documents {
    pub fn new(document: Value) -> Self {
        let page = render::page(&document);
        Self {
            json: document.to_string().into(),
            page: page.into(),
        }
    }

    pub fn router(self) -> Router<App> {
        let Self { json, page } = self;
        Router::new()
            .route(
                "/openapi.json",
                get(move || async move { typed("application/json", json.to_string()) }),
            )
            .route(
                "/docs",
                get(move || async move { typed("text/html; charset=utf-8", page.to_string()) }),
            )
            .route(
                "/docs/style.css",
                get(|| async { typed("text/css; charset=utf-8", render::STYLE.to_owned()) }),
            )
    }
}

fn typed(content_type: &'static str, text: String) -> Response {
    let mut response = text.into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    // The same for everybody, and changed only by a new version.
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("public, max-age=300"));
    headers.insert(
        header::CONTENT_SECURITY_POLICY,
        HeaderValue::from_static("default-src 'none'; style-src 'self'; frame-ancestors 'none'; base-uri 'none'"),
    );
    response
}

fn complete_operation(path: &str, method: &str, operation: &mut Value) {
    let is_public = operation
        .get("security")
        .is_some_and(|security| *security == json!([{}]));
    let tag = operation["tags"][0].as_str().unwrap_or_default().to_owned();
    let session_only = SESSION_ONLY.contains(&operation["operationId"].as_str().unwrap_or_default());
    if !is_public {
        operation["security"] = match tag.as_str() {
            "Operator" => json!([{"operator": []}]),
            "Feed" => json!([{"gate": []}]),
            _ if session_only => json!([{"session": []}]),
            _ => json!([{"session": []}, {"token": []}]),
        };
    }
    let changes = !matches!(method, "get" | "head");
    let has_body = operation.get("requestBody").is_some();
    let id = operation["operationId"].as_str().unwrap_or_default().to_owned();
    let mut refusals: Vec<(&str, &str)> = vec![
        ("500", "Our fault; the log has it under the request's id."),
        (
            "503",
            "The database is not available, or too much waits. Nothing was changed.",
        ),
    ];
    refusals.push(("400", "The request cannot be read."));
    refusals.push(("422", "Fields are wrong; each is named."));
    if !is_public || id == "login" {
        refusals.push(("401", "Nobody known is asking."));
    }
    if changes || session_only {
        refusals.push(("403", "From a page of another site, or not for this caller."));
    }
    if path.contains('{') || id == "showOrganization" || id == "listPlans" {
        refusals.push(("404", "There is no such thing, or it belongs to somebody else."));
    }
    if has_body {
        refusals.push(("408", "The body took too long."));
        refusals.push(("413", "The body is too large."));
        refusals.push(("415", "The body is not JSON."));
    }
    if changes && !matches!(id.as_str(), "acknowledge" | "postUsage" | "login" | "logout") {
        refusals.push(("409", "It does not fit the present state; the code says why."));
    }
    if matches!(id.as_str(), "register" | "login" | "changePassword") {
        refusals.push((
            "429",
            "Too many attempts; `Retry-After` says when the next one may come.",
        ));
    }
    let Some(responses) = operation["responses"].as_object_mut() else {
        return;
    };
    for (status, description) in refusals {
        let mut response = json!({
            "description": description,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorEnvelope"}}},
        });
        if matches!(status, "429" | "503") {
            let schema = json!({"type": "integer", "minimum": 1});
            response["headers"] = json!({"Retry-After": {"description": "In seconds.", "schema": schema}});
        }
        if status == "401" {
            let schema = json!({"type": "string"});
            response["headers"] = json!({"WWW-Authenticate": {"description": "How to ask.", "schema": schema}});
        }
        responses.entry(status).or_insert(response);
    }
}

fn schema<T: PartialSchema>() -> Value {
    serde_json::to_value(T::schema()).unwrap_or(Value::Null)
}

/// What a token cannot do: it is about a person's own sessions and password.
const SESSION_ONLY: [&str; 6] = [
    "logout",
    "showSession",
    "listSessions",
    "endOtherSessions",
    "endSession",
    "changePassword",
];

const TAGS: [(&str, &str); 9] = [
    (
        "Account",
        "Registering, signing in and out, sessions, the organisation.",
    ),
    ("Keys", "API keys and their life."),
    ("Access tokens", "For scripts and the command line."),
    ("Usage", "What was used."),
    ("Audit", "Who did what, when, from where."),
    ("Catalogue", "What there is to choose from."),
    ("Operator", "Beyond any organisation; with the operator's token."),
    ("Feed", "What gates follow and post."),
    ("Health", "For load balancers."),
];
