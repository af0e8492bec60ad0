//! Forms and queries, and forms that work once.

use std::time::Duration;

use axum::Form;
use axum::extract::{FromRequest, FromRequestParts, Query, Request};
use axum::http::request::Parts;

use super::Shared;
use super::page::Problem;
use crate::control::api::error::ApiError;
use crate::control::model::Fault;
use crate::control::secret::{digest, id};

/// The fields of a form or a query. Absent, empty and blank are one: browsers send empty fields along.
#[derive(Clone, Default)]
pub struct Input(Vec<(String, String)>);

impl Input {
    /// The field's text without blanks around it.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.raw(name).map(str::trim).filter(|text| !text.is_empty())
    }

    /// As [`Input::text`], owned.
    pub fn owned(&self, name: &str) -> Option<String> {
        self.text(name).map(str::to_owned)
    }

    /// The field's text as it was sent, for passwords; empty counts as absent.
    pub fn raw(&self, name: &str) -> Option<&str> {
        let found = self.0.iter().find(|(found, _)| found == name);
        found.map(|(_, value)| value.as_str()).filter(|value| !value.is_empty())
    }

    /// Every value of a field that may come several times.
    pub fn all(&self, name: &str) -> Vec<String> {
        let found = self.0.iter().filter(|(found, _)| found == name);
        found.map(|(_, value)| value.clone()).collect()
    }

    /// The field's text, or nothing.
    pub fn shown(&self, name: &str) -> String {
        self.text(name).unwrap_or_default().chars().take(1_024).collect()
    }
}

/// A posted form.
pub struct Posted(pub Input);

impl FromRequest<Shared> for Posted {
    type Rejection = Problem;

    async fn from_request(request: Request, portal: &Shared) -> Result<Self, Problem> {
        let form = Form::<Vec<(String, String)>>::from_request(request, portal);
        match tokio::time::timeout(BODY_DEADLINE, form).await {
            Err(_) => Err(ApiError::BodyTimeout.into()),
            Ok(Ok(Form(fields))) => Ok(Self(Input(fields))),
            Ok(Err(rejection)) if rejection.status() == 413 => Err(ApiError::BodyTooLarge.into()),
            Ok(Err(_)) => Err(ApiError::Malformed("it is not a form".to_owned()).into()),
        }
    }
}

/// The query of the address.
pub struct Asked(pub Input);

impl FromRequestParts<Shared> for Asked {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, portal: &Shared) -> Result<Self, Problem> {
        match Query::<Vec<(String, String)>>::from_request_parts(parts, portal).await {
            Ok(Query(fields)) => Ok(Self(Input(fields))),
            Err(_) => Err(ApiError::Malformed("the query is not one".to_owned()).into()),
        }
    }
}

/// A token for a form that makes something: sent twice, the form makes one thing. It has a date, because what is known
/// of earlier forms is forgotten after a day.
pub fn form_token(now_ms: i64) -> Result<String, Fault> {
    Ok(format!("portal-{now_ms:x}-{}", id("")?))
}

/// The token of a posted form, if it is ours to judge still.
pub fn read_form_token(input: &Input, now_ms: i64) -> Option<&str> {
    let token = input.text("form_token")?;
    let (date, rest) = token.strip_prefix("portal-")?.split_once('-')?;
    let age_ms = now_ms - i64::from_str_radix(date, 16).ok()?;
    let is_ours = rest.len() == 19 && rest.bytes().all(|b| b.is_ascii_alphanumeric());
    // Another replica's clock may be ahead of ours.
    (is_ours && (-60_000..FORM_LIFE_MS).contains(&age_ms)).then_some(token)
}

/// The id of what a form makes, the same for the same form.
pub fn one_time_id(prefix: &str, owner: &str, form_token: &str) -> String {
    const BASE62: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    let bytes = digest(&format!("{prefix}\n{owner}\n{form_token}"));
    let characters = bytes.iter().take(19).map(|b| char::from(BASE62[usize::from(b % 62)]));
    prefix.chars().chain(characters).collect()
}

/// Text as a part of a query.
pub fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~/".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

/// `path` with those of the fields that are not empty.
pub fn link(path: &str, fields: &[(&str, &str)]) -> String {
    let fields = fields.iter().filter(|(_, value)| !value.is_empty());
    let query: Vec<_> = fields
        .map(|(name, value)| format!("{name}={}", encode(value)))
        .collect();
    if query.is_empty() {
        path.to_owned()
    } else {
        format!("{path}?{}", query.join("&"))
    }
}

/// A path of ours to go on to after signing in; anything else could lead to another site.
pub fn own_path(text: &str) -> Option<&str> {
    let rest = text.strip_prefix('/')?;
    let is_ours = !rest.starts_with(['/', '\\']) && text.len() <= 1_024 && text.bytes().all(|b| b.is_ascii_graphic());
    (is_ours && !text.contains('\\')).then_some(text)
}

/// The whole body, not each part of it.
const BODY_DEADLINE: Duration = Duration::from_secs(10);
/// Half of the time for which the outcome of a form is remembered.
const FORM_LIFE_MS: i64 = 12 * 3_600_000;

#[cfg(test)]
mod tests {
    use super::*;

    fn input(name: &str, value: &str) -> Input {
        Input(vec![(name.to_owned(), value.to_owned())])
    }

    #[test]
    fn form_tokens_live_for_half_a_day() {
        let token = form_token(1_000_000).unwrap();
        let sent = input("form_token", &token);
        assert_eq!(read_form_token(&sent, 1_000_000), Some(token.as_str()));
        assert!(read_form_token(&sent, 1_000_000 + FORM_LIFE_MS - 1).is_some());
        assert!(read_form_token(&sent, 1_000_000 + FORM_LIFE_MS).is_none());
        assert!(read_form_token(&sent, 0).is_none());
        assert!(read_form_token(&input("form_token", "portal-zz-x"), 0).is_none());
        assert!(read_form_token(&Input::default(), 0).is_none());
    }

    #[test]
    fn one_form_makes_one_id() {
        assert_eq!(one_time_id("tok_", "org_1", "t"), one_time_id("tok_", "org_1", "t"));
        assert_ne!(one_time_id("tok_", "org_1", "t"), one_time_id("tok_", "org_2", "t"));
        assert_eq!(one_time_id("tok_", "o", "t").len(), 23);
    }

    #[test]
    fn only_paths_of_ours_are_followed() {
        assert_eq!(own_path("/keys?q=a%20b"), Some("/keys?q=a%20b"));
        for bad in [
            "",
            "keys",
            "//evil.example",
            "/\\evil.example",
            "https://evil.example",
            "/a\nb",
            "/x\\y",
        ] {
            assert_eq!(own_path(bad), None, "{bad}");
        }
    }

    #[test]
    fn links_leave_out_what_is_empty() {
        assert_eq!(
            link("/keys", &[("q", "a&b é"), ("status", "")]),
            "/keys?q=a%26b%20%C3%A9"
        );
        assert_eq!(link("/keys", &[("q", "")]), "/keys");
    }
}
