//! The portal: pages for people, over the same service as the API.
//!
//! | module | what it is |
//! |---|---|
//! | `page` | rendering, the frame around every page, pages of refusals |
//! | `person` | who is signed in |
//! | `input` | forms and queries; forms that work once |
//! | `parts` | the small pieces of HTML that pages share: dates, badges, faults of fields |
//! | `assets` | style sheet, scripts, icon |
//! | the others | one file per screen |
//!
//! Every page works without JavaScript: forms post, and the answer is a page or a redirect to one. A secret is
//! written into the one answer that shows it and nowhere else; a form that makes one carries a token that works
//! once, so that a reload makes no second one.

use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::{get, post};

use super::api::App;
use super::throttle::Throttle;

mod account;
mod assets;
mod audit;
mod chart;
mod create;
mod input;
mod key;
mod keys;
mod operator;
mod overview;
mod page;
mod parts;
mod person;
mod reveal;
mod rotate;
mod settings;
mod tokens;
mod usage;

pub use page::{Rendered, wants_page, write_refusal};

/// What pages share.
pub struct Portal {
    app: App,
    /// Guesses at the operator's token, by address.
    operator_attempts: Throttle,
}

type Shared = Arc<Portal>;

/// All pages and assets.
pub fn router(app: App) -> Router {
    let operator_attempts = Throttle::new(app.settings.login_attempts, 15 * 60_000);
    Router::new()
        .route("/", get(overview::show))
        .route("/register", get(account::register_form).post(account::register))
        .route("/login", get(account::login_form).post(account::login))
        .route("/logout", post(account::logout))
        .route("/keys", get(keys::list))
        .route("/keys/new", get(create::form).post(create::create))
        .route("/keys/{id}", get(key::show))
        .route("/keys/{id}/edit", get(create::edit_form).post(create::edit))
        .route("/keys/{id}/disable", post(key::disable))
        .route("/keys/{id}/enable", post(key::enable))
        .route("/keys/{id}/rotate", get(rotate::form).post(rotate::rotate))
        .route("/keys/{id}/end-grace", post(rotate::end_grace))
        .route("/keys/{id}/revoke", get(key::revoke_form).post(key::revoke))
        .route("/keys/{id}/applied", get(key::applied))
        .route("/usage", get(usage::show))
        .route("/audit", get(audit::list))
        .route("/tokens", get(tokens::list).post(tokens::create))
        .route("/tokens/{id}/delete", post(tokens::delete))
        .route("/settings", get(settings::show))
        .route("/settings/organization", post(settings::rename))
        .route("/settings/password", post(settings::change_password))
        .route("/settings/sessions/end-others", post(settings::end_other_sessions))
        .route("/settings/sessions/{id}/end", post(settings::end_session))
        .merge(operator::router())
        .route("/assets/{name}", get(assets::serve))
        .layer(DefaultBodyLimit::max(MOST_BODY_BYTES))
        .with_state(Arc::new(Portal { app, operator_attempts }))
}

/// The largest honest form is a key with a hundred scopes: under 8 KiB.
const MOST_BODY_BYTES: usize = 64 * 1024;
