//! Organisations, access tokens, usage, audit, and the API's own description.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};

use super::args::{AuditArgs, Connection, Granularity, OrgsCommand, TokensCommand, UsageArgs};
use super::client::Client;
use super::keys::{all_applied, pages, segment, wait};
use super::output::{Output, cell};
use super::{Exit, Failure, offline};

pub fn orgs(command: OrgsCommand, output: &Output) -> Result<(), Failure> {
    match command {
        OrgsCommand::List {
            connection,
            search,
            limit,
        } => {
            let query = search.map(|text| ("q", text)).into_iter().collect();
            let items = pages(
                &Client::control(&connection)?,
                "/api/v1/admin/organizations",
                query,
                limit,
            )?;
            list(&items, &["id", "name", "plan", "createdAt"], output)
        }
        OrgsCommand::Show { connection, id } => {
            let path = match id {
                Some(id) => format!("/api/v1/admin/organizations/{}", segment(&id)),
                None => "/api/v1/organization".to_owned(),
            };
            one(
                &Client::control(&connection)?.call(Method::GET, &path, &[], None)?,
                output,
            )
        }
        OrgsCommand::Update {
            connection,
            id,
            plan,
            name,
            applied,
        } => {
            let mut body = json!({});
            for (field, value) in [("plan", plan), ("name", name)] {
                if let Some(value) = value {
                    body[field] = Value::String(value);
                }
            }
            let path = format!("/api/v1/admin/organizations/{}", segment(&id));
            let changed = Client::control(&connection)?.call(Method::PATCH, &path, &wait(applied), Some(&body))?;
            one(&changed, output)?;
            all_applied(&changed)
        }
        OrgsCommand::Plans(connection) => {
            let plans = Client::control(&connection)?.call(Method::GET, "/api/v1/plans", &[], None)?;
            if output.is_json() {
                return output.value(&plans["items"]);
            }
            let mut rows = Vec::new();
            for plan in plans["items"].as_array().into_iter().flatten() {
                for tier in plan["tiers"].as_array().into_iter().flatten() {
                    let cells = [
                        &plan["name"],
                        &plan["maxInFlight"],
                        &tier["name"],
                        &tier["limit"],
                        &tier["windowSeconds"],
                    ];
                    rows.push(cells.map(cell).to_vec());
                }
            }
            output.table(&["plan", "in flight", "tier", "limit", "window (s)"], &rows)
        }
        OrgsCommand::Gates(connection) => {
            let gates = Client::control(&connection)?.call(Method::GET, "/api/v1/admin/gates", &[], None)?;
            let items = gates["items"].as_array().cloned().unwrap_or_default();
            list(
                &items,
                &["name", "revision", "lag", "connected", "live", "lastHeardAt", "version"],
                output,
            )
        }
        OrgsCommand::Invite {
            connection,
            note,
            expires,
        } => {
            let mut body = json!({"note": note});
            if let Some(expires) = expires {
                body["expiresAt"] = Value::String(offline::future(&expires)?);
            }
            let made =
                Client::control(&connection)?.call(Method::POST, "/api/v1/admin/invitations", &[], Some(&body))?;
            shown_once(&made, "invitation", output)
        }
    }
}

pub fn tokens(command: TokensCommand, output: &Output) -> Result<(), Failure> {
    match command {
        TokensCommand::List(connection) => {
            let tokens = Client::control(&connection)?.call(Method::GET, "/api/v1/tokens", &[], None)?;
            let items = tokens["items"].as_array().cloned().unwrap_or_default();
            list(
                &items,
                &["id", "name", "masked", "createdAt", "lastUsedAt", "expiresAt"],
                output,
            )
        }
        TokensCommand::Create {
            connection,
            name,
            expires,
        } => {
            let mut body = json!({"name": name});
            if let Some(expires) = expires {
                body["expiresAt"] = Value::String(offline::future(&expires)?);
            }
            let made = Client::control(&connection)?.call(Method::POST, "/api/v1/tokens", &[], Some(&body))?;
            shown_once(&made, "token", output)
        }
        TokensCommand::Delete { connection, id } => {
            let path = format!("/api/v1/tokens/{}", segment(&id));
            one(
                &Client::control(&connection)?.call(Method::DELETE, &path, &[], None)?,
                output,
            )
        }
    }
}

pub fn usage(args: &UsageArgs, output: &Output) -> Result<(), Failure> {
    let granularity = match args.granularity {
        Granularity::Minute => "minute",
        Granularity::Hour => "hour",
        Granularity::Day => "day",
    };
    let mut query = vec![("granularity", granularity.to_owned())];
    if let Some(from) = &args.from {
        query.push(("from", offline::past(from)?));
    }
    if let Some(to) = &args.to {
        query.push(("to", offline::past(to)?));
    }
    let filters = [
        ("groupBy", &args.by),
        ("key", &args.key),
        ("tier", &args.tier),
        ("environment", &args.environment),
    ];
    query.extend(
        filters
            .into_iter()
            .filter_map(|(name, value)| Some((name, value.clone()?))),
    );
    let client = Client::control(&args.connection)?;
    if args.csv {
        query.push(("format", "csv".to_owned()));
        return output.text(&client.text("/api/v1/usage", &query)?);
    }
    let usage = client.call(Method::GET, "/api/v1/usage", &query, None)?;
    if output.is_json() {
        return output.value(&usage);
    }
    let grouped: Vec<&str> = args
        .by
        .as_deref()
        .unwrap_or("")
        .split(',')
        .filter(|word| !word.is_empty())
        .collect();
    let mut heading = vec!["start"];
    heading.extend(&grouped);
    heading.extend(["permits", "billable", "refused"]);
    let line = |row: &Value, start: String| {
        let mut cells = vec![start];
        cells.extend(grouped.iter().map(|name| cell(&row[*name])));
        // Whether the totals stand in the row or below a name of their own, they are called the same.
        let total = |name: &str| {
            if row[name].is_null() {
                cell(&row["totals"][name])
            } else {
                cell(&row[name])
            }
        };
        cells.extend(["permits", "billable", "refused"].map(total));
        cells
    };
    let mut rows: Vec<Vec<String>> = usage["rows"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|row| line(row, cell(&row["start"])))
        .collect();
    rows.push(line(&usage["totals"], "total".to_owned()));
    output.table(&heading, &rows)
}

pub fn audit(args: &AuditArgs, output: &Output) -> Result<(), Failure> {
    let mut query = Vec::new();
    let filters = [
        ("action", &args.action),
        ("target", &args.target),
        ("actor", &args.actor),
    ];
    query.extend(
        filters
            .into_iter()
            .filter_map(|(name, value)| Some((name, value.clone()?))),
    );
    if let Some(from) = &args.from {
        query.push(("from", offline::past(from)?));
    }
    let path = match &args.operator {
        Some(organization) => {
            query.extend((!organization.is_empty()).then(|| ("organization", organization.clone())));
            "/api/v1/admin/audit"
        }
        None => "/api/v1/audit",
    };
    let items = pages(&Client::control(&args.connection)?, path, query, args.limit)?;
    if output.is_json() {
        return output.value(&Value::Array(items));
    }
    let rows: Vec<Vec<String>> = items
        .iter()
        .map(|line| {
            let actor = [&line["actor"]["name"], &line["actor"]["id"], &line["actor"]["kind"]];
            let actor = actor
                .into_iter()
                .map(cell)
                .find(|text| !text.is_empty() && text != "–")
                .unwrap_or_default();
            vec![
                cell(&line["at"]),
                actor,
                cell(&line["action"]),
                cell(&line["target"]["id"]),
                cell(&line["address"]),
            ]
        })
        .collect();
    output.table(&["at", "who", "action", "target", "from"], &rows)
}

pub fn openapi(connection: &Connection, output: &Output) -> Result<(), Failure> {
    let client = Client::open(&connection.url, Duration::from_secs(30))?;
    output.text(&client.text("/openapi.json", &[])?)
}

fn list(items: &[Value], columns: &[&str], output: &Output) -> Result<(), Failure> {
    if output.is_json() {
        return output.value(&Value::Array(items.to_vec()));
    }
    let rows: Vec<Vec<String>> = items
        .iter()
        .map(|item| columns.iter().map(|name| cell(&item[*name])).collect())
        .collect();
    let heading: Vec<String> = columns.iter().map(|name| spaced(name)).collect();
    output.table(&heading.iter().map(String::as_str).collect::<Vec<_>>(), &rows)
}

/// `lastUsedAt` as `last used`.
fn spaced(name: &str) -> String {
    let mut words = String::new();
    for c in name.strip_suffix("At").unwrap_or(name).chars() {
        if c.is_uppercase() {
            words.push(' ');
        }
        words.extend(c.to_lowercase());
    }
    words
}

fn one(value: &Value, output: &Output) -> Result<(), Failure> {
    if output.is_json() {
        output.value(value)
    } else {
        output.record(value)
    }
}

fn shown_once(made: &Value, field: &str, output: &Output) -> Result<(), Failure> {
    if output.is_json() {
        return output.value(made);
    }
    let Some(secret) = made[field].as_str() else {
        return Err(Failure::new(
            Exit::Failure,
            format!("the control plane's answer holds no {field}"),
        ));
    };
    output.text(secret)?;
    output.remark(&format!(
        "This is the only time that the {field} of {} is shown.",
        cell(&made["id"])
    ));
    Ok(())
}
