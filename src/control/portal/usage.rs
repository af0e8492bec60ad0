//! Usage: over time, in groups, refusals by code, and the way to the CSV.

use std::collections::BTreeMap;

use askama::Template;
use axum::extract::State;
use axum::response::Response;

use super::Shared;
use super::chart::{DAY, Filter, Group, RANGES, Series, Totals, series, totals};
use super::input::{Asked, link};
use super::page::{Problem, Shell, page};
use super::parts::Choice;
use super::person::Person;
use crate::control::model::Fault;
use crate::control::service::usage::Granularity;
use crate::control::time::rfc3339;

#[derive(Template)]
#[template(path = "usage.html")]
struct UsagePage {
    shell: Shell,
    /// Link, text, whether it is the present one.
    ranges: Vec<(String, &'static str, bool)>,
    groups: Vec<(String, &'static str, bool)>,
    range: &'static str,
    by: &'static str,
    by_text: &'static str,
    tiers: Vec<Choice>,
    environments: Vec<Choice>,
    key: String,
    key_name: String,
    without_key: String,
    chart: Series,
    rows: Vec<GroupRow>,
    left_out: usize,
    is_cut: bool,
    csv: String,
}

struct GroupRow {
    name: String,
    link: String,
    totals: Totals,
}

/// `GET /usage`.
pub async fn show(State(portal): State<Shared>, person: Person, Asked(query): Asked) -> Result<Response, Problem> {
    let app = &portal.app;
    let organization = &person.organization.id;
    let range = RANGES
        .iter()
        .find(|r| query.text("range") == Some(r.word))
        .unwrap_or(&RANGES[DAY]);
    let (by, by_text, group) = *GROUPS
        .iter()
        .find(|(by, _, _)| query.text("by") == Some(by))
        .unwrap_or(&GROUPS[0]);
    let short = |name: &str| query.text(name).map(|text| text.chars().take(128).collect::<String>());
    let filter = Filter {
        key: short("key"),
        tier: short("tier"),
        environment: short("environment"),
    };
    let key_name = match &filter.key {
        // Somebody else's key is a page that is not found, here too.
        Some(key) => app.key(Some(organization), key).await?.name,
        None => String::new(),
    };
    let now_ms = app.now_ms();
    let chart = series(&portal, organization, range, &filter).await?;
    let (found, is_cut) = totals(&portal, organization, range.start_ms(now_ms), group, &filter).await?;
    let shown = |text: &Option<String>| text.clone().unwrap_or_default();
    let (key, tier, environment) = (shown(&filter.key), shown(&filter.tier), shown(&filter.environment));
    let with = |range: &str, by: &str, key: &str| {
        let fields = [
            ("range", range),
            ("by", by),
            ("key", key),
            ("tier", &tier),
            ("environment", &environment),
        ];
        link("/usage", &fields)
    };
    let left_out = found.len().saturating_sub(MOST_GROUPS);
    let csv = link(
        "/api/v1/usage",
        &[
            ("format", "csv"),
            ("from", &rfc3339(range.start_ms(now_ms))),
            ("to", &rfc3339(now_ms)),
            ("granularity", granularity_word(range.granularity)),
            ("groupBy", "key,tier,environment"),
            ("key", &key),
            ("tier", &tier),
            ("environment", &environment),
        ],
    );
    let all = |text: &str, selected: &str, names: Vec<String>| {
        let named = names.into_iter().map(|name| Choice::new(name.clone(), name, selected));
        std::iter::once(Choice::new("", text, selected)).chain(named).collect()
    };
    Ok(page(&UsagePage {
        shell: person.shell("/usage"),
        ranges: RANGES
            .iter()
            .map(|r| (with(r.word, by, &key), r.text, r.word == range.word))
            .collect(),
        groups: GROUPS
            .iter()
            .map(|(b, text, _)| (with(range.word, b, &key), *text, *b == by))
            .collect(),
        range: range.word,
        by,
        by_text,
        tiers: all(
            "All",
            &tier,
            app.settings.tiers.iter().map(|t| t.name.clone()).collect(),
        ),
        environments: all(
            "All",
            &environment,
            app.settings.environments.iter().map(|e| e.name.clone()).collect(),
        ),
        without_key: with(range.word, by, ""),
        rows: group_rows(&portal, organization, group, found).await?,
        chart,
        key,
        key_name,
        left_out,
        is_cut,
        csv,
    }))
}

async fn group_rows(
    portal: &Shared,
    organization: &str,
    group: Group,
    found: BTreeMap<String, Totals>,
) -> Result<Vec<GroupRow>, Problem> {
    let mut found: Vec<_> = found.into_iter().collect();
    found.sort_by_key(|(_, totals)| std::cmp::Reverse(totals.passed + totals.refused));
    let mut rows = Vec::new();
    for (name, totals) in found.into_iter().take(MOST_GROUPS) {
        let (name, link) = match group {
            Group::Key if !name.is_empty() => match portal.app.key(Some(organization), &name).await {
                Ok(key) => (key.name, format!("/keys/{name}")),
                Err(Fault::NotFound) => (name, String::new()),
                Err(other) => return Err(other.into()),
            },
            _ => (name, String::new()),
        };
        let name = if name.is_empty() { "(none)".to_owned() } else { name };
        rows.push(GroupRow { name, link, totals });
    }
    Ok(rows)
}

fn granularity_word(granularity: Granularity) -> &'static str {
    match granularity {
        Granularity::Minute => "minute",
        Granularity::Hour => "hour",
        Granularity::Day => "day",
    }
}

const GROUPS: [(&str, &str, Group); 3] = [
    ("tier", "Tier", Group::Tier),
    ("key", "Key", Group::Key),
    ("environment", "Environment", Group::Environment),
];
/// Rows of the table; the CSV has all.
const MOST_GROUPS: usize = 50;
