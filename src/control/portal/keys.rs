//! The list of keys: search, filters, order, pages. All of its state is in the address.

use askama::Template;
use axum::extract::State;
use axum::response::Response;

use super::Shared;
use super::input::{Asked, Input, link};
use super::page::{Problem, Shell, page};
use super::parts::{Choice, Markup, STATUSES, masked_key, status_badge, status_word, when, when_or};
use super::person::Person;
use crate::control::api::value::{cursor, read_cursor};
use crate::control::model::ApiKey;
use crate::control::store::{KeyQuery, KeySort, SortValue};

#[derive(Template)]
#[template(path = "keys.html")]
struct KeysPage {
    shell: Shell,
    list: KeyTable,
}

/// A page of keys and how it was asked for.
pub struct KeyTable {
    pub rows: Vec<KeyRow>,
    pub path: &'static str,
    pub search: String,
    pub environments: Vec<Choice>,
    pub statuses: Vec<Choice>,
    pub scopes: Vec<Choice>,
    pub sort: String,
    pub columns: Vec<Column>,
    pub previous: Option<String>,
    pub next: Option<String>,
    pub is_filtered: bool,
    /// For the operator: whose keys they are.
    pub organization: String,
}

/// One key.
pub struct KeyRow {
    pub id: String,
    pub name: String,
    pub masked: String,
    pub environment: String,
    pub scopes: String,
    pub all_scopes: String,
    pub badge: Markup,
    pub last_used: Markup,
    pub created: Markup,
    pub expires: Markup,
}

/// The head of a column, perhaps one to sort by.
pub struct Column {
    pub text: &'static str,
    pub link: Option<String>,
    /// `ascending`, `descending` or empty, as `aria-sort` wants it.
    pub order: &'static str,
}

/// `GET /keys`.
pub async fn list(State(portal): State<Shared>, person: Person, Asked(query): Asked) -> Result<Response, Problem> {
    let list = table(&portal, &query, "/keys", Some(person.organization.id.clone())).await?;
    Ok(page(&KeysPage {
        shell: person.shell("/keys"),
        list,
    }))
}

/// Reads a page of keys as the address asks for it. What the address says wrongly is left out.
pub async fn table(
    portal: &Shared,
    input: &Input,
    path: &'static str,
    organization: Option<String>,
) -> Result<KeyTable, Problem> {
    let app = &portal.app;
    let now_ms = app.now_ms();
    let known = |name: &str, list: Vec<&str>| input.text(name).filter(|v| list.contains(v)).map(str::to_owned);
    let environment = known(
        "environment",
        app.settings.environments.iter().map(|e| e.name.as_str()).collect(),
    );
    let scope = known("scope", app.settings.scopes.iter().map(|s| s.name.as_str()).collect());
    let status = STATUSES
        .into_iter()
        .find(|status| input.text("status") == Some(status_word(*status)));
    let search = input.text("q").map(|q| q.chars().take(100).collect::<String>());
    let sort_word = SORTS
        .iter()
        .find(|(word, _, _)| input.text("sort") == Some(word))
        .unwrap_or(&SORTS[0]);
    let (word, sort, descending) = *sort_word;
    let mark = |name: &str| input.text(name).and_then(|text| read_mark(text, sort));
    let (after, before) = (mark("after"), mark("before"));
    let backwards = after.is_none() && before.is_some();
    let mut keys = app
        .keys(&KeyQuery {
            organization,
            environment: environment.clone(),
            scope: scope.clone(),
            status,
            search: search.clone(),
            sort,
            // The page before is the page after in the other order.
            descending: descending != backwards,
            after: after.clone().or(before),
            limit: PAGE + 1,
            now_ms,
        })
        .await?;
    let more = keys.len() > PAGE as usize;
    keys.truncate(PAGE as usize);
    if backwards {
        keys.reverse();
    }
    let (has_previous, has_next) = if backwards {
        (more, true)
    } else {
        (after.is_some(), more)
    };
    let status = status.map(status_word).unwrap_or_default();
    let shown = |text: &Option<String>| text.clone().unwrap_or_default();
    let (q, environment, scope) = (shown(&search), shown(&environment), shown(&scope));
    let owner = input.shown("organization");
    let fields = [
        ("q", q.as_str()),
        ("environment", environment.as_str()),
        ("status", status),
        ("scope", scope.as_str()),
        ("organization", owner.as_str()),
    ];
    let with = |more: &[(&str, &str)]| link(path, &[fields.as_slice(), more].concat());
    let page_link = |name: &str, key: Option<&ApiKey>, there_is: bool| {
        let key = key.filter(|_| there_is)?;
        Some(with(&[("sort", word), (name, &write_mark(key, sort))]))
    };
    let column = |text: &'static str, sorts: Option<(&str, &str)>| match sorts {
        None => Column {
            text,
            link: None,
            order: "",
        },
        Some((up, down)) => Column {
            text,
            // Clicked again, a column turns round; dates begin with the newest.
            link: Some(with(&[("sort", if word == down { up } else { down })])),
            order: match word {
                _ if word == up => "ascending",
                _ if word == down => "descending",
                _ => "",
            },
        },
    };
    Ok(KeyTable {
        previous: page_link("before", keys.first(), has_previous),
        next: page_link("after", keys.last(), has_next),
        rows: keys.iter().map(|key| KeyRow::of(key, now_ms)).collect(),
        path,
        environments: choices(
            "Any",
            &environment,
            app.settings.environments.iter().map(|e| e.name.clone()),
        ),
        scopes: choices("Any", &scope, app.settings.scopes.iter().map(|s| s.name.clone())),
        statuses: choices("Any", status, STATUSES.map(|s| status_word(s).to_owned())),
        sort: word.to_owned(),
        columns: vec![
            column("Name", Some(("-name", "name"))),
            column("Status", None),
            column("Environment", None),
            column("Scopes", None),
            column("Last used", Some(("used", "-used"))),
            column("Expires", Some(("-expires", "expires"))),
            column("Created", Some(("created", "-created"))),
        ],
        is_filtered: [&q, &environment, &scope].iter().any(|f| !f.is_empty()) || !status.is_empty(),
        search: q,
        organization: owner,
    })
}

impl KeyRow {
    fn of(key: &ApiKey, now_ms: i64) -> Self {
        Self {
            id: key.id.clone(),
            name: key.name.clone(),
            masked: masked_key(key),
            environment: key.environment.clone(),
            scopes: match key.scopes.as_slice() {
                [] => "none".to_owned(),
                [one] => one.clone(),
                [first, rest @ ..] => format!("{first} +{}", rest.len()),
            },
            all_scopes: key.scopes.join(", "),
            badge: status_badge(key, now_ms),
            last_used: when_or(key.last_used_at_ms, now_ms, "never"),
            created: when(key.created_at_ms, now_ms),
            expires: when_or(key.expires_at_ms, now_ms, "never"),
        }
    }
}

fn choices(any: &str, selected: &str, names: impl IntoIterator<Item = String>) -> Vec<Choice> {
    let named = names.into_iter().map(|name| Choice::new(name.clone(), name, selected));
    std::iter::once(Choice::new("", any, selected)).chain(named).collect()
}

fn write_mark(key: &ApiKey, sort: KeySort) -> String {
    let value = match sort {
        KeySort::Name => key.name.clone(),
        KeySort::CreatedAt => key.created_at_ms.to_string(),
        // As the store orders those that have no such date.
        KeySort::LastUsedAt => key.last_used_at_ms.unwrap_or(0).to_string(),
        KeySort::ExpiresAt => key.expires_at_ms.unwrap_or(i64::MAX).to_string(),
    };
    cursor(&value, &key.id)
}

fn read_mark(text: &str, sort: KeySort) -> Option<(SortValue, String)> {
    let (value, id) = read_cursor(text)?;
    let value = match sort {
        KeySort::Name => SortValue::Text(value),
        KeySort::CreatedAt | KeySort::LastUsedAt | KeySort::ExpiresAt => SortValue::Number(value.parse().ok()?),
    };
    Some((value, id))
}

const SORTS: [(&str, KeySort, bool); 8] = [
    ("-created", KeySort::CreatedAt, true),
    ("created", KeySort::CreatedAt, false),
    ("name", KeySort::Name, false),
    ("-name", KeySort::Name, true),
    ("used", KeySort::LastUsedAt, false),
    ("-used", KeySort::LastUsedAt, true),
    ("expires", KeySort::ExpiresAt, false),
    ("-expires", KeySort::ExpiresAt, true),
];

/// Keys on a page.
const PAGE: u32 = 25;
