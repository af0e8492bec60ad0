//! The only place where a fault becomes an answer.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::control::model::{Fault, FieldFault};

/// Why a request is refused.
#[derive(Clone, Debug)]
pub enum ApiError {
    Fault(Fault),
    /// No session, no token, or one that is not (or no longer) valid.
    Unauthenticated,
    /// Signed in, but this needs a session of a person, not a token.
    SessionRequired,
    CrossSite,
    NoSuchRoute,
    NoSuchMethod,
    /// The body or the query cannot be read at all.
    Malformed(String),
    NotJson,
    BodyTooLarge,
    BodyTimeout,
    /// A handler panicked.
    Panicked,
}

impl From<Fault> for ApiError {
    fn from(fault: Fault) -> Self {
        ApiError::Fault(fault)
    }
}

/// What a refusal looks like.
#[derive(Serialize, ToSchema)]
pub struct ErrorEnvelope {
    /// Always false here.
    #[schema(example = false)]
    pub success: bool,
    pub error: ErrorBody,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ErrorBody {
    /// What programs go by.
    #[schema(example = "VALIDATION_ERROR")]
    pub code: String,
    /// What people read.
    pub message: String,
    /// Names this request in the logs.
    pub request_id: String,
    /// With `VALIDATION_ERROR`: everything that is wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub fields: Option<Vec<FieldError>>,
}

/// What is wrong with one field.
#[derive(Serialize, ToSchema)]
pub struct FieldError {
    /// The field, or the part of it, such as `scopes[2]`.
    pub field: String,
    /// Follows the field's name.
    pub message: String,
}

/// A refusal before it has its request id: it travels in the response's extensions, and the frame writes the body.
#[derive(Clone)]
pub struct Refusal {
    pub code: &'static str,
    pub message: String,
    pub fields: Option<Vec<FieldFault>>,
    /// For the log only.
    pub cause: Option<String>,
}

impl Refusal {
    pub fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            fields: None,
            cause: None,
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let (status, refusal) = describe(self.clone());
        let mut response = status.into_response();
        response.extensions_mut().insert(refusal);
        let headers = response.headers_mut();
        match &self {
            ApiError::Unauthenticated => {
                headers.insert(
                    header::WWW_AUTHENTICATE,
                    HeaderValue::from_static("Bearer realm=\"tollgate control\""),
                );
            }
            ApiError::Fault(Fault::Throttled { retry_after_s }) => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from(*retry_after_s));
            }
            ApiError::Fault(Fault::Unavailable(_) | Fault::Busy) => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            }
            // What is left of the body would be read as the next request.
            ApiError::BodyTooLarge | ApiError::BodyTimeout => {
                headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            _ => {}
        }
        response
    }
}

fn describe(error: ApiError) -> (StatusCode, Refusal) {
    let plain = |status, code, message: &str| (status, Refusal::new(code, message));
    match error {
        ApiError::Fault(fault) => describe_fault(fault),
        ApiError::Unauthenticated => plain(
            StatusCode::UNAUTHORIZED,
            "UNAUTHENTICATED",
            "Sign in, or present a valid access token.",
        ),
        ApiError::SessionRequired => plain(
            StatusCode::FORBIDDEN,
            "SESSION_REQUIRED",
            "This needs the session of a person, not an access token.",
        ),
        ApiError::CrossSite => plain(
            StatusCode::FORBIDDEN,
            "CROSS_SITE_REQUEST",
            "A page of another site sent this request, so it was not carried out.",
        ),
        ApiError::NoSuchRoute => plain(StatusCode::NOT_FOUND, "NOT_FOUND", "There is nothing here."),
        ApiError::NoSuchMethod => plain(
            StatusCode::METHOD_NOT_ALLOWED,
            "METHOD_NOT_ALLOWED",
            "This method is not allowed here.",
        ),
        ApiError::Malformed(why) => (
            StatusCode::BAD_REQUEST,
            Refusal::new("MALFORMED_REQUEST", format!("The request cannot be read: {why}.")),
        ),
        ApiError::NotJson => plain(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "UNSUPPORTED_MEDIA_TYPE",
            "The body must be JSON, with `Content-Type: application/json`.",
        ),
        ApiError::BodyTooLarge => plain(
            StatusCode::PAYLOAD_TOO_LARGE,
            "BODY_TOO_LARGE",
            "The body is too large.",
        ),
        ApiError::BodyTimeout => plain(
            StatusCode::REQUEST_TIMEOUT,
            "BODY_TIMEOUT",
            "The body took too long to arrive.",
        ),
        ApiError::Panicked => internal("a handler panicked".to_owned()),
    }
}

fn describe_fault(fault: Fault) -> (StatusCode, Refusal) {
    let plain = |status, code, message: &str| (status, Refusal::new(code, message));
    match fault {
        Fault::Validation(fields) => {
            let mut refusal = Refusal::new("VALIDATION_ERROR", "Some fields are wrong.");
            refusal.fields = Some(fields);
            (StatusCode::UNPROCESSABLE_ENTITY, refusal)
        }
        Fault::NotFound => plain(StatusCode::NOT_FOUND, "NOT_FOUND", "There is no such thing."),
        Fault::EmailTaken => plain(
            StatusCode::CONFLICT,
            "EMAIL_TAKEN",
            "There is an account with this e-mail address already.",
        ),
        Fault::WrongCredentials => plain(
            StatusCode::UNAUTHORIZED,
            "WRONG_CREDENTIALS",
            "The e-mail address or the password is wrong.",
        ),
        Fault::RegistrationClosed => plain(
            StatusCode::FORBIDDEN,
            "REGISTRATION_CLOSED",
            "New accounts are not being taken.",
        ),
        Fault::InvitationInvalid => plain(
            StatusCode::FORBIDDEN,
            "INVITATION_INVALID",
            "The invitation is unknown, was used already, or has expired.",
        ),
        Fault::KeyRevoked => plain(
            StatusCode::CONFLICT,
            "KEY_REVOKED",
            "The key is revoked, so it cannot be changed.",
        ),
        Fault::TooManyLivingSecrets => plain(
            StatusCode::CONFLICT,
            "TOO_MANY_SECRETS",
            "The key has ten living secrets. End the grace of the old ones, or wait for it, and rotate again.",
        ),
        Fault::TooMany { what, limit } => (
            StatusCode::CONFLICT,
            Refusal::new("LIMIT_REACHED", format!("There may be no more than {limit} {what}.")),
        ),
        Fault::IdempotencyKeyReused => plain(
            StatusCode::CONFLICT,
            "IDEMPOTENCY_KEY_REUSED",
            "This Idempotency-Key was used for a different request.",
        ),
        Fault::Throttled { retry_after_s } => (
            StatusCode::TOO_MANY_REQUESTS,
            Refusal::new(
                "TOO_MANY_ATTEMPTS",
                format!("Too many attempts. Retry after {retry_after_s} seconds."),
            ),
        ),
        Fault::Busy => plain(
            StatusCode::SERVICE_UNAVAILABLE,
            "BUSY",
            "Too much is waiting. Retry shortly.",
        ),
        Fault::Unavailable(cause) => {
            let mut refusal = Refusal::new("UNAVAILABLE", "The database is not available. Nothing was changed.");
            refusal.cause = Some(cause);
            (StatusCode::SERVICE_UNAVAILABLE, refusal)
        }
        Fault::Internal(cause) => internal(cause),
    }
}

fn internal(cause: String) -> (StatusCode, Refusal) {
    let mut refusal = Refusal::new("INTERNAL_ERROR", "Something went wrong on our side.");
    refusal.cause = Some(cause);
    (StatusCode::INTERNAL_SERVER_ERROR, refusal)
}
