//! The audit log: who did what, when, from where.

use askama::Template;
use axum::extract::State;
use axum::response::Response;
use serde_json::Value;

use super::Shared;
use super::input::{Asked, Input, link};
use super::page::{Problem, Shell, page};
use super::parts::{Choice, Markup, date_text, duration, when};
use super::person::Person;
use crate::control::model::AuditLine;
use crate::control::store::AuditQuery;

#[derive(Template)]
#[template(path = "audit.html")]
struct AuditPage {
    shell: Shell,
    log: AuditTable,
}

/// A page of the log and how it was asked for.
pub struct AuditTable {
    pub path: &'static str,
    pub rows: Vec<AuditRow>,
    pub actions: Vec<Choice>,
    pub target: String,
    pub is_filtered: bool,
    /// The first page, where this is another one.
    pub first: Option<String>,
    pub next: Option<String>,
    pub shows_organization: bool,
}

/// One line.
pub struct AuditRow {
    pub at: Markup,
    pub actor: String,
    pub actor_kind: String,
    pub action: &'static str,
    pub code: String,
    pub target: String,
    pub target_link: String,
    pub detail: String,
    pub address: String,
    pub user_agent: String,
    pub organization: String,
}

/// `GET /audit`.
pub async fn list(State(portal): State<Shared>, person: Person, Asked(query): Asked) -> Result<Response, Problem> {
    let log = table(&portal, &query, "/audit", Some(person.organization.id.clone())).await?;
    Ok(page(&AuditPage {
        shell: person.shell("/audit"),
        log,
    }))
}

/// Reads a page of the log as the address asks for it.
pub async fn table(
    portal: &Shared,
    input: &Input,
    path: &'static str,
    organization: Option<String>,
) -> Result<AuditTable, Problem> {
    let action = ACTIONS
        .iter()
        .map(|(code, _)| *code)
        .find(|code| input.text("action") == Some(code));
    let target = input
        .text("target")
        .map(|target| target.chars().take(64).collect::<String>());
    let before = input.text("before").and_then(|text| text.parse().ok());
    let shows_organization = organization.is_none();
    let query = AuditQuery {
        organization,
        action: action.map(str::to_owned),
        target: target.clone(),
        before,
        limit: PAGE + 1,
        ..AuditQuery::default()
    };
    let mut lines = portal.app.store.audit(&query).await?;
    let more = lines.len() > PAGE as usize;
    lines.truncate(PAGE as usize);
    let (action, target) = (action.unwrap_or_default(), target.unwrap_or_default());
    let last = lines.last().filter(|_| more).map(|line| line.serial.to_string());
    let with = |before: &str| link(path, &[("action", action), ("target", &target), ("before", before)]);
    let now_ms = portal.app.now_ms();
    let named = ACTIONS.iter().map(|(code, text)| Choice::new(*code, *text, action));
    Ok(AuditTable {
        path,
        actions: std::iter::once(Choice::new("", "Any action", action))
            .chain(named)
            .collect(),
        first: before.map(|_| with("")),
        next: last.map(|serial| with(&serial)),
        is_filtered: !action.is_empty() || !target.is_empty(),
        rows: lines.into_iter().map(|line| AuditRow::of(line, now_ms)).collect(),
        target,
        shows_organization,
    })
}

impl AuditRow {
    /// As tables show it.
    pub fn of(line: AuditLine, now_ms: i64) -> Self {
        let known = ACTIONS.iter().find(|(code, _)| *code == line.action);
        let actor = match line.actor_kind.as_str() {
            "operator" => "Operator".to_owned(),
            "system" => "Tollgate".to_owned(),
            "visitor" => "Visitor".to_owned(),
            _ if line.actor_name.is_empty() => line.actor_id,
            _ => line.actor_name,
        };
        Self {
            at: when(line.at_ms, now_ms),
            actor,
            actor_kind: line.actor_kind,
            action: known.map_or("Change", |(_, text)| text),
            code: line.action,
            target_link: match line.target_kind.as_str() {
                "key" => format!("/keys/{}", line.target_id),
                _ => String::new(),
            },
            target: line.target_id,
            detail: describe(&line.detail),
            address: line.address,
            user_agent: line.user_agent,
            organization: line.organization_id.unwrap_or_default(),
        }
    }
}

/// What changed, in words.
fn describe(detail: &Value) -> String {
    let Some(fields) = detail.as_object() else {
        return String::new();
    };
    let part = |(name, value): (&String, &Value)| {
        let label = name
            .strip_suffix("AtMs")
            .or(name.strip_suffix("Seconds"))
            .unwrap_or(name);
        match (value.get("from"), value.get("to")) {
            (Some(from), Some(to)) => format!("{label}: {} → {}", plain(name, from), plain(name, to)),
            _ => format!("{label}: {}", plain(name, value)),
        }
    };
    fields.iter().map(part).collect::<Vec<_>>().join("; ")
}

fn plain(name: &str, value: &Value) -> String {
    match value {
        Value::Null => "never".to_owned(),
        Value::String(text) => text.clone(),
        Value::Bool(yes) => (if *yes { "yes" } else { "no" }).to_owned(),
        Value::Number(number) if name.ends_with("AtMs") => number.as_i64().map(date_text).unwrap_or_default(),
        Value::Number(number) if name.ends_with("Seconds") => number.as_i64().map(duration).unwrap_or_default(),
        Value::Array(items) if items.is_empty() => "none".to_owned(),
        Value::Array(items) => items.iter().map(|item| plain("", item)).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

const ACTIONS: [(&str, &str); 16] = [
    ("key.create", "Created a key"),
    ("key.update", "Changed a key"),
    ("key.rotate", "Rotated a key"),
    ("key.end_grace", "Ended a grace period"),
    ("key.revoke", "Revoked a key"),
    ("token.create", "Created an access token"),
    ("token.delete", "Deleted an access token"),
    ("session.begin", "Signed in"),
    ("session.end", "Ended a session"),
    ("password.change", "Changed the password"),
    ("organization.register", "Registered"),
    ("organization.update", "Changed the organisation"),
    ("organization.create", "Created an organisation"),
    ("invitation.create", "Invited somebody"),
    ("invitation.delete", "Withdrew an invitation"),
    ("gate.forget", "Forgot a gate"),
];

/// Lines on a page.
const PAGE: u32 = 50;

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn changes_are_told_in_words() {
        let detail = json!({"disabled": {"from": false, "to": true}, "name": "x"});
        assert_eq!(describe(&detail), "disabled: no → yes; name: x");
        let detail = json!({"expiresAtMs": {"from": null, "to": 1_795_514_400_000_i64}});
        assert_eq!(describe(&detail), "expires: never → 24 Nov 2026, 10:00 UTC");
        assert_eq!(describe(&json!({"scopes": ["a:b", "c:d"]})), "scopes: a:b, c:d");
        assert_eq!(describe(&json!({"graceSeconds": 86_400})), "grace: 24 hours");
        assert_eq!(describe(&json!([])), "");
    }
}
