//! What was used: as JSON, or as CSV for spreadsheets and bills.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::caller::Tenant;
use super::error::ApiError;
use super::fields::QueryFields;
use super::value::Date;
use super::{App, Envelope, Reply};
use crate::control::service::usage::{Granularity, Usage, UsageDraft, UsageEntry};
use crate::control::time::rfc3339;

/// Usage by time and group.
#[derive(Serialize, ToSchema)]
pub struct UsageView {
    /// The whole buckets that were asked for.
    from: Date,
    to: Date,
    /// Empty buckets are left out.
    rows: Vec<UsageRowView>,
    totals: TotalsView,
}

/// One bucket of one group.
#[derive(Serialize, ToSchema)]
pub struct UsageRowView {
    start: Date,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    key: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    tier: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    environment: Option<String>,
    #[serde(flatten)]
    totals: TotalsView,
}

/// Counts.
#[derive(Serialize, ToSchema)]
pub struct TotalsView {
    /// Requests that passed.
    permits: u64,
    /// Of those, the ones in billed environments.
    billable: u64,
    /// Requests that were refused.
    refused: u64,
    /// By code.
    refusals: BTreeMap<String, u64>,
}

#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[allow(dead_code, reason = "describes the query; it is read field by field")]
pub struct UsageQueryParameters {
    /// Default: 24 hours before `to`.
    #[param(value_type = Option<Date>, inline)]
    from: Option<String>,
    /// Default: now.
    #[param(value_type = Option<Date>, inline)]
    to: Option<String>,
    /// Default: hour. Days are UTC days. Usage is kept by the minute for 90 days, unless the operator has set another time:
    /// what is older is in the first minute of its hour.
    #[param(inline)]
    granularity: Option<GranularityWord>,
    /// One or more of `key`, `tier`, `environment`, with commas between. Default: all together.
    #[param(
        rename = "groupBy",
        pattern = "^(key|tier|environment)(,(key|tier|environment)){0,2}$"
    )]
    group_by: Option<String>,
    /// Only this key.
    #[param(max_length = 128)]
    key: Option<String>,
    /// Only this tier.
    #[param(max_length = 128)]
    tier: Option<String>,
    /// Only this environment.
    #[param(max_length = 32)]
    environment: Option<String>,
    /// Default: `json`, or what `Accept` says.
    #[param(inline)]
    format: Option<FormatWord>,
}

#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[allow(dead_code, reason = "describes the query")]
enum GranularityWord {
    Minute,
    Hour,
    Day,
}

#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[allow(dead_code, reason = "describes the query")]
enum FormatWord {
    Json,
    Csv,
}

/// What the organisation's keys used.
#[utoipa::path(
    get, path = "/api/v1/usage", tag = "Usage", operation_id = "showUsage", params(UsageQueryParameters),
    responses((status = 200, description = "Usage.", content(
        (Envelope<UsageView> = "application/json"),
        (String = "text/csv"),
    ))),
)]
pub async fn show(
    State(app): State<App>,
    tenant: Tenant,
    headers: HeaderMap,
    QueryFields(mut fields): QueryFields,
) -> Result<Response, ApiError> {
    let granularities = [
        ("minute", Granularity::Minute),
        ("hour", Granularity::Hour),
        ("day", Granularity::Day),
    ];
    let csv = fields
        .word("format", &[("json", false), ("csv", true)])
        .unwrap_or_else(|| prefers_csv(&headers));
    let group_by = fields.text("groupBy");
    let groups: Vec<&str> = group_by
        .as_deref()
        .map(|text| text.split(',').collect())
        .unwrap_or_default();
    if groups.len() > 3
        || groups
            .iter()
            .any(|group| !matches!(*group, "key" | "tier" | "environment"))
    {
        fields.fault::<()>(
            "groupBy",
            "must be one or more of key, tier, environment, with commas between",
        );
    }
    let mut draft = UsageDraft {
        from_ms: fields.date("from"),
        to_ms: fields.date("to"),
        granularity: fields.word("granularity", &granularities),
        by_key: groups.contains(&"key"),
        by_tier: groups.contains(&"tier"),
        by_environment: groups.contains(&"environment"),
        key: fields.short("key", 128),
        tier: fields.short("tier", 128),
        environment: fields.short("environment", 32),
        ..Default::default()
    };
    draft.faults = fields.finish();
    let usage = app.usage(&tenant.organization, draft).await?;
    Ok(if csv {
        reply_csv(&usage)
    } else {
        Reply::ok(view(usage)).into_response()
    })
}

fn view(usage: Usage) -> UsageView {
    let mut totals = TotalsView {
        permits: 0,
        billable: 0,
        refused: 0,
        refusals: BTreeMap::new(),
    };
    for entry in &usage.rows {
        totals.permits += entry.permits;
        totals.billable += entry.billable;
        for (code, count) in &entry.refusals {
            totals.refused += count;
            *totals.refusals.entry(code.clone()).or_default() += count;
        }
    }
    UsageView {
        from: Date(usage.from_ms),
        to: Date(usage.to_ms),
        rows: usage.rows.into_iter().map(row).collect(),
        totals,
    }
}

fn row(entry: UsageEntry) -> UsageRowView {
    UsageRowView {
        start: Date(entry.start_ms),
        key: entry.key,
        tier: entry.tier,
        environment: entry.environment,
        totals: TotalsView {
            permits: entry.permits,
            billable: entry.billable,
            refused: entry.refusals.values().sum(),
            refusals: entry.refusals,
        },
    }
}

/// One line per row. Refusals by code follow each other in one column, `CODE=count` with spaces between: the codes are
/// not a fixed set of columns.
fn reply_csv(usage: &Usage) -> Response {
    let mut text = String::from("start,key,tier,environment,permits,billable,refused,refusals\r\n");
    for entry in &usage.rows {
        let refusals: Vec<_> = entry
            .refusals
            .iter()
            .map(|(code, count)| format!("{code}={count}"))
            .collect();
        let refused: u64 = entry.refusals.values().sum();
        // Writing to a string cannot fail.
        let _ = write!(
            text,
            "{},{},{},{},{},{},{},{}\r\n",
            rfc3339(entry.start_ms),
            cell(entry.key.as_deref()),
            cell(entry.tier.as_deref()),
            cell(entry.environment.as_deref()),
            entry.permits,
            entry.billable,
            refused,
            cell(Some(&refusals.join(" "))),
        );
    }
    let headers = [
        (
            header::CONTENT_TYPE,
            HeaderValue::from_static("text/csv; charset=utf-8; header=present"),
        ),
        (
            header::CONTENT_DISPOSITION,
            HeaderValue::from_static("attachment; filename=\"usage.csv\""),
        ),
    ];
    (headers, text).into_response()
}

/// Quoted where RFC 4180 wants it; a leading sign that a spreadsheet would run as a formula is disarmed.
fn cell(text: Option<&str>) -> String {
    let text = text.unwrap_or_default();
    let armed = text.starts_with(['=', '+', '-', '@', '\t', '\r']);
    let text = if armed { format!("'{text}") } else { text.to_owned() };
    match text.contains([',', '"', '\r', '\n']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text,
    }
}

fn prefers_csv(headers: &HeaderMap) -> bool {
    let accept = headers
        .get(header::ACCEPT)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let first = accept
        .split(',')
        .next()
        .unwrap_or_default()
        .split(';')
        .next()
        .unwrap_or_default();
    first.trim().eq_ignore_ascii_case("text/csv")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_quoted_and_disarmed() {
        assert_eq!(cell(Some("plain")), "plain");
        assert_eq!(cell(Some("a,b")), "\"a,b\"");
        assert_eq!(cell(Some("say \"x\"")), "\"say \"\"x\"\"\"");
        assert_eq!(cell(Some("=1+1")), "'=1+1");
        assert_eq!(cell(None), "");
    }
}
