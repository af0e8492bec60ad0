//! `tollgate keys …` over the control API.

use reqwest::Method;
use serde_json::{Value, json};

use super::args::{Applied, KeyTarget, KeysCommand};
use super::client::Client;
use super::offline;
use super::output::{Output, cell};
use super::{Exit, Failure};

pub fn keys(command: KeysCommand, output: &Output) -> Result<(), Failure> {
    match command {
        KeysCommand::Create {
            connection,
            name,
            environment,
            scope,
            expires,
            idempotency_key,
            applied,
        } => {
            let mut body = json!({"name": name, "environment": environment, "scopes": scope});
            if let Some(expires) = expires {
                body["expiresAt"] = Value::String(offline::future(&expires)?);
            }
            let client = Client::control(&connection)?;
            let key = idempotency_key.as_deref();
            let issued = client.call_with(Method::POST, "/api/v1/keys", &wait(applied), Some(&body), key)?;
            secret(&issued, output)?;
            all_applied(&issued)
        }
        KeysCommand::List {
            connection,
            environment,
            status,
            scope,
            search,
            limit,
            operator,
        } => {
            let mut query = Vec::new();
            let filters = [
                ("environment", environment),
                ("status", status),
                ("scope", scope),
                ("q", search),
            ];
            query.extend(filters.into_iter().filter_map(|(name, value)| Some((name, value?))));
            let path = match &operator {
                Some(organization) => {
                    query.extend((!organization.is_empty()).then(|| ("organization", organization.clone())));
                    "/api/v1/admin/keys"
                }
                None => "/api/v1/keys",
            };
            let items = pages(&Client::control(&connection)?, path, query, limit)?;
            list(&items, output)
        }
        KeysCommand::Show { target } => {
            let key = on(&target)?.call(Method::GET, &path(&target), &[], None)?;
            one(&key, output)
        }
        KeysCommand::Rotate {
            connection,
            id,
            grace,
            idempotency_key,
            applied,
        } => {
            let body = match grace {
                Some(grace) => json!({"gracePeriodSeconds": grace.as_secs()}),
                None => json!({}),
            };
            let client = Client::control(&connection)?;
            let path = format!("/api/v1/keys/{}/rotate", segment(&id));
            let issued = client.call_with(
                Method::POST,
                &path,
                &wait(applied),
                Some(&body),
                idempotency_key.as_deref(),
            )?;
            secret(&issued, output)?;
            if let Some(end) = issued["graceEndsAt"].as_str() {
                output.remark(&format!("The old secret stays valid until {end}."));
            }
            all_applied(&issued)
        }
        KeysCommand::EndGrace {
            connection,
            id,
            applied,
        } => {
            let path = format!("/api/v1/keys/{}/end-grace", segment(&id));
            let key = Client::control(&connection)?.call(Method::POST, &path, &wait(applied), None)?;
            one(&key, output)?;
            all_applied(&key)
        }
        KeysCommand::Disable { target, applied } => patch(&target, applied, &json!({"disabled": true}), output),
        KeysCommand::Enable { target, applied } => patch(&target, applied, &json!({"disabled": false}), output),
        KeysCommand::Revoke { target, applied } => {
            let key = on(&target)?.call(Method::DELETE, &path(&target), &wait(applied), None)?;
            one(&key, output)?;
            all_applied(&key)
        }
        KeysCommand::Import(args) => offline::import(&args, output),
        KeysCommand::Verify { config } => offline::verify(config.as_deref(), output),
        KeysCommand::Hash(args) => offline::hash(&args, output),
        KeysCommand::New { prefix } => offline::new_secret(&prefix, output),
    }
}

fn on(target: &KeyTarget) -> Result<Client, Failure> {
    Client::control(&target.connection)
}

fn path(target: &KeyTarget) -> String {
    let operator = if target.operator { "admin/" } else { "" };
    format!("/api/v1/{operator}keys/{}", segment(&target.id))
}

/// An id as one segment of a path: what is no letter, digit or `_` is encoded, so that no id can reach another route.
pub fn segment(id: &str) -> String {
    let mut encoded = String::with_capacity(id.len());
    for byte in id.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-' => encoded.push(char::from(byte)),
            other => encoded.push_str(&format!("%{other:02X}")),
        }
    }
    encoded
}

fn patch(target: &KeyTarget, applied: Applied, body: &Value, output: &Output) -> Result<(), Failure> {
    let key = on(target)?.call(Method::PATCH, &path(target), &wait(applied), Some(body))?;
    one(&key, output)?;
    all_applied(&key)
}

pub fn wait(applied: Applied) -> Vec<(&'static str, String)> {
    match applied.wait {
        Some(wait) => vec![
            ("wait", "all".to_owned()),
            ("wait_seconds", wait.as_secs().max(1).to_string()),
        ],
        None => Vec::new(),
    }
}

/// The failure of gates that have not applied a change that was waited for.
pub fn all_applied(changed: &Value) -> Result<(), Failure> {
    let pending = &changed["applied"]["pending"];
    match pending.as_array() {
        Some(gates) if !gates.is_empty() => Err(Failure::new(
            Exit::Failure,
            format!("changed, but not yet applied by: {}", cell(pending)),
        )),
        _ => Ok(()),
    }
}

/// A secret alone on standard output, so that it can go into a file or a variable.
fn secret(issued: &Value, output: &Output) -> Result<(), Failure> {
    if output.is_json() {
        return output.value(issued);
    }
    let id = cell(&issued["id"]);
    match issued["apiKey"].as_str() {
        Some(secret) => {
            output.text(secret)?;
            output.remark(&format!("This is the only time that the secret of {id} is shown."));
        }
        None => output.remark(&format!(
            "{id} was made by an earlier request with this idempotency key; its secret is not shown again."
        )),
    }
    Ok(())
}

/// Follows the pages of a list, to `limit` items.
pub fn pages(
    client: &Client,
    path: &str,
    query: Vec<(&'static str, String)>,
    limit: usize,
) -> Result<Vec<Value>, Failure> {
    let mut items: Vec<Value> = Vec::new();
    let mut cursor: Option<String> = None;
    while items.len() < limit {
        let mut query = query.clone();
        query.push(("limit", (limit - items.len()).min(100).to_string()));
        query.extend(cursor.map(|cursor| ("cursor", cursor)));
        let mut page = client.call(Method::GET, path, &query, None)?;
        let found = page["items"].as_array_mut().map(std::mem::take).unwrap_or_default();
        let empty = found.is_empty();
        items.extend(found);
        cursor = page["nextCursor"].as_str().map(str::to_owned);
        if cursor.is_none() || empty {
            break;
        }
    }
    Ok(items)
}

fn list(items: &[Value], output: &Output) -> Result<(), Failure> {
    if output.is_json() {
        return output.value(&Value::Array(items.to_vec()));
    }
    let columns = [
        "id",
        "name",
        "environment",
        "status",
        "masked",
        "lastUsedAt",
        "expiresAt",
    ];
    let rows: Vec<Vec<String>> = items
        .iter()
        .map(|key| columns.iter().map(|name| cell(&key[*name])).collect())
        .collect();
    output.table(
        &["id", "name", "environment", "status", "secret", "last used", "expires"],
        &rows,
    )
}

fn one(key: &Value, output: &Output) -> Result<(), Failure> {
    if output.is_json() {
        output.value(key)
    } else {
        output.record(key)
    }
}
