//! The one page that shows a secret, and what a reload of it shows instead.
//!
//! The page is the direct answer to the POST that made the secret, never stored by anybody (`Cache-Control:
//! no-store`), so that the secret is in no address, no cookie and no database. A reload sends the form again, and
//! its token makes that harmless.

use std::time::Duration;

use askama::Template;
use axum::response::Response;

use super::page::{Shell, page};
use super::parts::Markup;
use crate::control::api::App;
use crate::control::settings::Settings;

/// A secret to show.
#[derive(Template)]
#[template(path = "reveal.html")]
pub struct Revealed<'a> {
    pub shell: Shell,
    pub title: &'a str,
    /// What it is, such as `API key`.
    pub what: &'a str,
    pub name: &'a str,
    pub secret: &'a str,
    /// What else is to be said, in sentences.
    pub notes: Vec<Markup>,
    /// A line to paste.
    pub line: Option<Line>,
    pub done: &'a str,
}

/// A command to paste.
pub struct Line {
    pub command: String,
    /// Whether it works as it stands.
    pub is_complete: bool,
}

/// Shows a secret.
pub fn reveal(revealed: Revealed<'_>) -> Response {
    page(&revealed)
}

/// Says that it was shown already.
pub fn already(shell: Shell, what: &str, name: &str, done: &str) -> Response {
    page(&AlreadyPage {
        shell,
        what,
        name,
        done,
    })
}

/// A request through the gate with this key.
pub fn request_line(settings: &Settings, secret: &str) -> Line {
    let base = settings.gate_url.as_deref().map(|url| url.trim_end_matches('/'));
    let url = format!("{}/", base.unwrap_or(NO_GATE_URL));
    Line {
        command: format!(
            "curl -i {} -H {}",
            quoted(&url),
            quoted(&format!("x-api-key: {secret}"))
        ),
        is_complete: base.is_some(),
    }
}

/// Waits a moment until the gates know what was changed, so that a line pasted at once works.
pub async fn let_gates_follow(app: &App, revision: u64) {
    app.wait_until_applied(revision, Duration::from_secs(2)).await;
}

/// As one word of a POSIX shell.
pub fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

const NO_GATE_URL: &str = "https://your-gate.example";

#[derive(Template)]
#[template(path = "already.html")]
struct AlreadyPage<'a> {
    shell: Shell,
    what: &'a str,
    name: &'a str,
    done: &'a str,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_can_be_pasted() {
        let mut settings = Settings {
            gate_url: Some("http://127.0.0.1:8080/".into()),
            ..Settings::default()
        };
        let line = request_line(&settings, "pxk_live_x");
        assert_eq!(
            line.command,
            "curl -i 'http://127.0.0.1:8080/' -H 'x-api-key: pxk_live_x'"
        );
        assert!(line.is_complete);
        settings.gate_url = None;
        assert!(!request_line(&settings, "k").is_complete);
        assert_eq!(quoted("it's"), "'it'\\''s'");
    }
}
