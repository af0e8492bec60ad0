//! Reading JSON bodies and queries field by field, so that everything that is wrong can be told at once.
//!
//! A field that nobody asked for is a fault too: a misspelt `expiresAt` must not make a key that lives for ever.
//! `null` stands for an absent field, except where a call says that it means something.

use std::collections::HashMap;
use std::time::Duration;

use axum::extract::{FromRequest, FromRequestParts, Query, Request};
use axum::http::header;
use axum::http::request::Parts;
use serde::de::DeserializeOwned;
use serde_json::error::Category;
use serde_json::{Map, Value};

use super::error::ApiError;
use crate::control::model::{Fault, FieldFault};
use crate::control::time;

/// The fields of a body or a query, taken out one by one.
pub struct Fields {
    rest: Map<String, Value>,
    faults: Vec<FieldFault>,
}

impl Fields {
    /// A string.
    pub fn text(&mut self, name: &str) -> Option<String> {
        match self.take(name)? {
            Value::String(text) => Some(text),
            _ => self.fault(name, "must be a string"),
        }
    }

    /// A whole number.
    pub fn integer(&mut self, name: &str) -> Option<i64> {
        match self.take(name)? {
            Value::Number(number) if number.is_i64() => number.as_i64(),
            // 60.0 is the integer 60 in JSON Schema's eyes. 2^53 bounds what a float holds exactly.
            Value::Number(number) => match number.as_f64() {
                Some(float) if float.fract() == 0.0 && float.abs() <= 9_007_199_254_740_992.0 => Some(float as i64),
                _ => self.fault(name, "must be a whole number"),
            },
            _ => self.fault(name, "must be a whole number"),
        }
    }

    /// True or false.
    pub fn boolean(&mut self, name: &str) -> Option<bool> {
        match self.take(name)? {
            Value::Bool(boolean) => Some(boolean),
            _ => self.fault(name, "must be true or false"),
        }
    }

    /// A list of strings, at most 100.
    pub fn texts(&mut self, name: &str) -> Option<Vec<String>> {
        let Value::Array(list) = self.take(name)? else {
            return self.fault(name, "must be a list of strings");
        };
        if list.len() > 100 {
            return self.fault(name, "must have at most 100 entries");
        }
        let mut texts = Vec::with_capacity(list.len());
        for (index, value) in list.into_iter().enumerate() {
            match value {
                Value::String(text) => texts.push(text),
                _ => {
                    self.fault::<()>(&format!("{name}[{index}]"), "must be a string");
                    // Holds its place, so that the faults of later entries are told with the right index.
                    texts.push(String::new());
                }
            }
        }
        Some(texts)
    }

    /// A date, in ms.
    pub fn date(&mut self, name: &str) -> Option<i64> {
        match self.take(name)? {
            Value::String(text) => match time::parse(&text) {
                Some(at_ms) => Some(at_ms),
                None => self.fault(name, "must be a date as in RFC 3339, such as 2030-01-31T12:00:00Z"),
            },
            _ => self.fault(name, "must be a string with a date"),
        }
    }

    /// A date, where `null` says something of its own.
    pub fn date_or_null(&mut self, name: &str) -> Option<Option<i64>> {
        if self.rest.get(name) == Some(&Value::Null) {
            self.rest.remove(name);
            return Some(None);
        }
        self.date(name).map(Some)
    }

    /// One of a few words.
    pub fn word<T: Copy>(&mut self, name: &str, words: &[(&str, T)]) -> Option<T> {
        let text = self.text(name)?;
        match words.iter().find(|(word, _)| *word == text) {
            Some((_, meaning)) => Some(*meaning),
            None => {
                let known: Vec<_> = words.iter().map(|(word, _)| *word).collect();
                self.fault(name, &format!("must be one of {}", known.join(", ")))
            }
        }
    }

    /// A whole number that a query carries as text, within a range.
    pub fn number(&mut self, name: &str, range: std::ops::RangeInclusive<i64>) -> Option<i64> {
        let text = self.text(name)?;
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        match text.parse::<i64>() {
            Ok(number) if digits && range.contains(&number) => Some(number),
            _ => self.fault(
                name,
                &format!("must be a whole number from {} to {}", range.start(), range.end()),
            ),
        }
    }

    /// A string of limited length, as in a filter.
    pub fn short(&mut self, name: &str, most: usize) -> Option<String> {
        let text = self.text(name)?;
        let fine = text.chars().count() <= most && !text.chars().any(char::is_control);
        if fine {
            Some(text)
        } else {
            self.fault(name, &format!("must have at most {most} characters, and no controls"))
        }
    }

    /// Adds a fault that the caller found.
    pub fn fault<T>(&mut self, name: &str, message: &str) -> Option<T> {
        self.faults.push(FieldFault::new(name, message));
        None
    }

    /// All faults, those of fields that nobody took included.
    pub fn finish(mut self) -> Vec<FieldFault> {
        for name in self.rest.keys() {
            let shown: String = name.chars().filter(|c| !c.is_control()).take(64).collect();
            self.faults
                .push(FieldFault::new(shown, "is not a field of this request"));
        }
        self.faults
    }

    /// As [`Fields::finish`], for calls that have no more to check.
    pub fn done(self) -> Result<(), ApiError> {
        let faults = self.finish();
        if faults.is_empty() {
            Ok(())
        } else {
            Err(crate::control::model::Fault::Validation(faults).into())
        }
    }

    fn take(&mut self, name: &str) -> Option<Value> {
        self.rest.remove(name).filter(|value| !value.is_null())
    }
}

/// A JSON object as body.
pub struct Body(pub Fields);

impl<S: Send + Sync> FromRequest<S> for Body {
    type Rejection = ApiError;

    async fn from_request(request: Request, _state: &S) -> Result<Self, ApiError> {
        let value = json(request, MOST_BYTES).await?;
        let Value::Object(rest) = value else {
            return Err(ApiError::Malformed("the body must be a JSON object".to_owned()));
        };
        Ok(Self(Fields {
            rest,
            faults: Vec::new(),
        }))
    }
}

/// A JSON object as body, or `null`, or no body at all.
pub struct OptionalBody(pub Fields);

impl<S: Send + Sync> FromRequest<S> for OptionalBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, _state: &S) -> Result<Self, ApiError> {
        let has_type = request.headers().contains_key(header::CONTENT_TYPE);
        if has_type {
            return match json(request, MOST_BYTES).await? {
                Value::Object(rest) => Ok(Self(Fields {
                    rest,
                    faults: Vec::new(),
                })),
                Value::Null => Ok(Self(Fields {
                    rest: Map::new(),
                    faults: Vec::new(),
                })),
                _ => Err(ApiError::Malformed("the body must be a JSON object".to_owned())),
            };
        }
        match read(request, MOST_BYTES).await?.is_empty() {
            true => Ok(Self(Fields {
                rest: Map::new(),
                faults: Vec::new(),
            })),
            false => Err(ApiError::NotJson),
        }
    }
}

/// The fields of the query.
pub struct QueryFields(pub Fields);

impl<S: Send + Sync> FromRequestParts<S> for QueryFields {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, ApiError> {
        let Query(pairs) = Query::<Vec<(String, String)>>::try_from_uri(&parts.uri)
            .map_err(|_| ApiError::Malformed("the query is not well-formed".to_owned()))?;
        let mut faults = Vec::new();
        let mut rest: HashMap<String, Value> = HashMap::new();
        for (name, value) in pairs {
            if rest.insert(name.clone(), Value::String(value)).is_some() {
                faults.push(FieldFault::new(
                    name.chars().take(64).collect::<String>(),
                    "is given twice",
                ));
            }
        }
        Ok(Self(Fields {
            rest: rest.into_iter().collect(),
            faults,
        }))
    }
}

/// A JSON body of at most `most_bytes`.
pub async fn json<T: DeserializeOwned>(request: Request, most_bytes: usize) -> Result<T, ApiError> {
    let content_type = request
        .headers()
        .get(header::CONTENT_TYPE)
        .and_then(|v| v.to_str().ok())
        .unwrap_or_default();
    let essence = content_type
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase();
    if essence != "application/json" {
        return Err(ApiError::NotJson);
    }
    let bytes = read(request, most_bytes).await?;
    serde_json::from_slice(&bytes).map_err(|error| match error.classify() {
        // It is JSON, but not what was expected.
        Category::Data => Fault::field("body", error.to_string()).into(),
        // serde's own message may quote the body, and a body may hold a password: only the place is told.
        _ => ApiError::Malformed(format!(
            "the body is not JSON, at line {} column {}",
            error.line(),
            error.column()
        )),
    })
}

async fn read(request: Request, most_bytes: usize) -> Result<axum::body::Bytes, ApiError> {
    let announced = request
        .headers()
        .get(header::CONTENT_LENGTH)
        .and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|length| length > most_bytes as u64) {
        return Err(ApiError::BodyTooLarge);
    }
    let body = axum::body::to_bytes(request.into_body(), most_bytes);
    match tokio::time::timeout(BODY_DEADLINE, body).await {
        Err(_) => Err(ApiError::BodyTimeout),
        Ok(Ok(bytes)) => Ok(bytes),
        // A broken connection gets no answer anyway, so what is left is the limit.
        Ok(Err(_)) => Err(ApiError::BodyTooLarge),
    }
}

/// The largest honest body is a key with a hundred scopes: under 8 KiB.
const MOST_BYTES: usize = 64 * 1024;
/// The whole body, not each part of it.
const BODY_DEADLINE: Duration = Duration::from_secs(10);
