//! HTTP: one file per resource. Each reads a request, calls the service, and writes the answer; nothing is decided here.

use std::sync::Arc;

use axum::Router;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::service::Service;
use super::{feed_server, portal};

mod admin;
mod audit;
pub mod caller;
mod catalogue;
mod document;
pub mod error;
mod feed;
pub mod fields;
mod frame;
mod health;
mod key_view;
mod keys;
mod organization;

mod register;
mod render;
mod sessions;
mod tokens;
mod usage;
pub mod value;

/// What handlers share.
pub type App = Arc<Service>;

/// All routes. What is not a page of the portal or a document is in the document, because both are made of the same
/// list; a test sees to it that there is no other way.
pub fn router(app: App) -> Router {
    let (routes, document) = described().split_for_parts();
    let documents = document::Documents::new(document::complete(document, &app.settings));
    routes
        .merge(documents.router())
        .fallback(frame::no_such_route)
        .method_not_allowed_fallback(frame::no_such_method)
        .with_state(Arc::clone(&app))
        .merge(portal::router(Arc::clone(&app)))
        .layer(axum::middleware::from_fn(frame::refuse_cross_site(&app.settings)))
        .layer(axum::middleware::from_fn_with_state(app, frame::frame))
}

fn described() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(register::register))
        .routes(routes!(sessions::login))
        .routes(routes!(sessions::logout))
        .routes(routes!(sessions::show))
        .routes(routes!(sessions::list, sessions::end_others))
        .routes(routes!(sessions::end))
        .routes(routes!(sessions::change_password))
        .routes(routes!(organization::show, organization::update))
        .routes(routes!(keys::list, keys::create))
        .routes(routes!(keys::show, keys::update, keys::revoke))
        .routes(routes!(keys::rotate))
        .routes(routes!(keys::end_grace))
        .routes(routes!(tokens::list, tokens::create))
        .routes(routes!(tokens::delete))
        .routes(routes!(usage::show))
        .routes(routes!(audit::list))
        .routes(routes!(catalogue::plans))
        .routes(routes!(catalogue::scopes))
        .routes(routes!(admin::organizations))
        .routes(routes!(admin::organization, admin::update_organization))
        .routes(routes!(admin::plans))
        .routes(routes!(admin::keys))
        .routes(routes!(admin::key, admin::update_key, admin::revoke_key))
        .routes(routes!(admin::gates))
        .routes(routes!(admin::forget_gate))
        .routes(routes!(admin::resync))
        .routes(routes!(admin::audit))
        .routes(routes!(admin::invitations, admin::create_invitation))
        .routes(routes!(admin::delete_invitation))
        .routes(routes!(feed_server::follow))
        .routes(routes!(feed::acknowledge))
        .routes(routes!(feed::usage))
        .routes(routes!(health::health))
}

/// What every answer that is not a refusal looks like.
#[derive(Serialize, ToSchema)]
pub struct Envelope<T> {
    /// Always true here.
    #[schema(example = true)]
    success: bool,
    data: T,
}

/// An answer in the envelope.
pub struct Reply<T>(pub axum::http::StatusCode, pub T);

impl<T> Reply<T> {
    pub fn ok(data: T) -> Self {
        Self(axum::http::StatusCode::OK, data)
    }

    pub fn created(data: T) -> Self {
        Self(axum::http::StatusCode::CREATED, data)
    }
}

impl<T: Serialize> axum::response::IntoResponse for Reply<T> {
    fn into_response(self) -> axum::response::Response {
        (
            self.0,
            axum::Json(Envelope {
                success: true,
                data: self.1,
            }),
        )
            .into_response()
    }
}
