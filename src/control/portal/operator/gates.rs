//! The gates, and how far each of them is.

use askama::Template;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Redirect, Response};

use crate::control::model::GateState;
use crate::control::portal::Shared;
use crate::control::portal::input::Asked;
use crate::control::portal::page::{Problem, Shell, page};
use crate::control::portal::parts::{Markup, count, when};
use crate::control::portal::person::Operator;

#[derive(Template)]
#[template(path = "operator_gates.html")]
struct GatesPage {
    shell: Shell,
    gates: Vec<GateRow>,
    revision: String,
    live: usize,
    notice: Option<&'static str>,
}

struct GateRow {
    name: String,
    version: String,
    state: &'static str,
    class: &'static str,
    revision: String,
    lag: String,
    is_behind: bool,
    heard: Markup,
    is_forgettable: bool,
}

pub async fn gates(State(portal): State<Shared>, _: Operator, Asked(query): Asked) -> Response {
    let now_ms = portal.app.now_ms();
    let (gates, newest) = portal.app.gates();
    let row = |gate: GateState| {
        let lag = newest.saturating_sub(gate.revision);
        let (state, class) = match (gate.connected, gate.live) {
            (true, _) => ("Connected", "active"),
            (false, true) => ("Reconnecting", "rotating"),
            (false, false) => ("Silent", "revoked"),
        };
        GateRow {
            name: gate.name,
            version: gate.version.unwrap_or_else(|| "unknown".to_owned()),
            state,
            class,
            revision: count(gate.revision),
            lag: count(lag),
            is_behind: lag > 0,
            heard: when(gate.last_heard_at_ms, now_ms),
            is_forgettable: !gate.connected,
        }
    };
    page(&GatesPage {
        shell: Shell::operator("/operator"),
        live: gates.iter().filter(|gate| gate.live).count(),
        gates: gates.into_iter().map(row).collect(),
        revision: count(newest),
        notice: (query.text("done") == Some("forgotten")).then_some("The gate is forgotten."),
    })
}

pub async fn forget_gate(
    State(portal): State<Shared>,
    Operator(caller): Operator,
    Path(name): Path<String>,
) -> Result<Response, Problem> {
    portal.app.forget_gate(&caller, &name).await?;
    Ok(Redirect::to("/operator?done=forgotten").into_response())
}
