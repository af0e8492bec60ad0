//! HTTP to the control plane and to the operator's listener: one request, one answer, one kind of failure.

use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::Value;

use super::args::Connection;
use super::{Exit, Failure};
use crate::tls::client_of;

/// Longer than the control plane waits for its database, shorter than a person's patience.
const TIMEOUT: Duration = Duration::from_secs(30);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A server and, if it asks for one, a token.
pub struct Client {
    base: String,
    token: Option<String>,
    http: reqwest::Client,
    runtime: tokio::runtime::Runtime,
}

impl Client {
    /// The control API as the holder of a token.
    ///
    /// # Errors
    /// Usage, if there is no token.
    pub fn control(connection: &Connection) -> Result<Self, Failure> {
        let token = match &connection.token_file {
            Some(path) => std::fs::read_to_string(path)
                .map_err(|error| Failure::new(Exit::Usage, format!("cannot read {}: {error}", path.display())))?,
            None => std::env::var("TOLLGATE_TOKEN").unwrap_or_default(),
        };
        let token = token.trim();
        if token.is_empty() {
            let message = "no access token: set TOLLGATE_TOKEN, or give --token-file. The portal makes tokens, under Access tokens";
            return Err(Failure::new(Exit::Usage, message));
        }
        Self::new(&connection.url, Some(token.to_owned()), TIMEOUT)
    }

    /// A server that asks for no token.
    pub fn open(url: &str, timeout: Duration) -> Result<Self, Failure> {
        Self::new(url, None, timeout)
    }

    fn new(url: &str, token: Option<String>, timeout: Duration) -> Result<Self, Failure> {
        let base = url.trim_end_matches('/').to_owned();
        if !base.starts_with("http://") && !base.starts_with("https://") {
            return Err(Failure::new(
                Exit::Usage,
                format!("\"{base}\" is not a URL; it begins with http:// or https://"),
            ));
        }
        let builder = client_of(&base).timeout(timeout).connect_timeout(CONNECT_TIMEOUT);
        let http = builder.build().map_err(|error| {
            Failure::new(
                Exit::Failure,
                format!(
                    "cannot make an HTTPS client: {error}; does this machine have certificate authorities (Debian: \
                     ca-certificates)?"
                ),
            )
        })?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Self {
            base,
            token,
            http,
            runtime,
        })
    }

    /// The `data` of a JSON answer.
    ///
    /// # Errors
    /// Not reachable, or refused with the server's own words.
    pub fn call(
        &self,
        method: Method,
        path: &str,
        query: &[(&str, String)],
        body: Option<&Value>,
    ) -> Result<Value, Failure> {
        self.call_with(method, path, query, body, None)
    }

    /// As [`Client::call`], with an `Idempotency-Key`.
    pub fn call_with(
        &self,
        method: Method,
        path: &str,
        query: &[(&str, String)],
        body: Option<&Value>,
        idempotency_key: Option<&str>,
    ) -> Result<Value, Failure> {
        let (status, text) = self.send(method, path, query, body, idempotency_key)?;
        let answer: Value = serde_json::from_str(&text).map_err(|_| self.strange(status, &text))?;
        if status.is_success() {
            return match answer {
                Value::Object(mut fields) if fields.contains_key("data") => {
                    Ok(fields.remove("data").unwrap_or_default())
                }
                other => Ok(other),
            };
        }
        Err(refusal(status, answer))
    }

    /// An answer as text.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn text(&self, path: &str, query: &[(&str, String)]) -> Result<String, Failure> {
        let (status, text) = self.send(Method::GET, path, query, None, None)?;
        if status.is_success() {
            return Ok(text);
        }
        match serde_json::from_str(&text) {
            Ok(answer) => Err(refusal(status, answer)),
            Err(_) => Err(self.strange(status, &text)),
        }
    }

    /// The status and the text of an answer, whatever they are.
    pub fn send(
        &self,
        method: Method,
        path: &str,
        query: &[(&str, String)],
        body: Option<&Value>,
        idempotency_key: Option<&str>,
    ) -> Result<(StatusCode, String), Failure> {
        let mut url = reqwest::Url::parse(&format!("{}{path}", self.base))
            .map_err(|error| Failure::new(Exit::Usage, format!("\"{}\" is not a URL: {error}", self.base)))?;
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        let mut request = self
            .http
            .request(method, url)
            .header("accept", "application/json, */*;q=0.5");
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        if let Some(key) = idempotency_key {
            request = request.header("idempotency-key", key);
        }
        if let Some(body) = body {
            request = request.json(body);
        }
        self.runtime.block_on(async {
            let response = request.send().await.map_err(|error| self.unreachable(&error))?;
            let status = response.status();
            let text = response.text().await.map_err(|error| self.unreachable(&error))?;
            Ok((status, text))
        })
    }

    fn unreachable(&self, error: &reqwest::Error) -> Failure {
        // The innermost cause is what a person can act on; the outer ones repeat the URL.
        let mut cause: &dyn std::error::Error = error;
        while let Some(inner) = cause.source() {
            cause = inner;
        }
        let why = if error.is_timeout() {
            "no answer in time".to_owned()
        } else {
            cause.to_string()
        };
        Failure::new(Exit::NotReachable, format!("cannot reach {}: {why}", self.base))
    }

    fn strange(&self, status: StatusCode, text: &str) -> Failure {
        let first: String = text
            .lines()
            .next()
            .unwrap_or("")
            .chars()
            .filter(|c| !c.is_control())
            .take(120)
            .collect();
        Failure::new(
            Exit::Failure,
            format!(
                "{} answered {status} with something that is not JSON: {first}",
                self.base
            ),
        )
    }
}

fn refusal(status: StatusCode, answer: Value) -> Failure {
    let error = &answer["error"];
    let mut message = error["message"]
        .as_str()
        .unwrap_or_else(|| status.canonical_reason().unwrap_or("refused"))
        .to_owned();
    if let Some(code) = error["code"].as_str() {
        message.push_str(&format!(" ({code})"));
    }
    for field in error["fields"].as_array().into_iter().flatten() {
        let (name, fault) = (
            field["field"].as_str().unwrap_or(""),
            field["message"].as_str().unwrap_or(""),
        );
        message.push_str(&format!("\n  {name} {fault}"));
    }
    let exit = if status.is_server_error() {
        Exit::Failure
    } else {
        Exit::Refused
    };
    Failure {
        exit,
        message,
        json: Some(answer),
    }
}
