//! Around every request: its id, where it came from, the envelope of refusals, the headers of every answer.

use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;

use axum::body::Body;
use axum::extract::{ConnectInfo, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::App;
use super::error::{ApiError, ErrorBody, ErrorEnvelope, FieldError, Refusal};
use crate::control::model::Origin;
use crate::control::portal;
use crate::control::secret;
use crate::control::settings::{Network, Settings};

/// The outermost layer.
pub async fn frame(State(app): State<App>, mut request: Request, next: Next) -> Response {
    let peer = request
        .extensions()
        .get::<ConnectInfo<SocketAddr>>()
        .map(|peer| peer.0.ip());
    let request_id = request_id(request.headers());
    let origin = Origin {
        address: client_address(peer, request.headers(), &app.settings.trusted_proxies),
        user_agent: user_agent(request.headers()),
        request_id: request_id.clone(),
    };
    request.extensions_mut().insert(origin);
    let method = request.method().clone();
    let wants_page = portal::wants_page(request.uri().path(), request.headers());
    // A task of its own: a change that was begun is brought to its end, also if the client goes away in the middle,
    // and a panic ends in an answer.
    let mut response = match tokio::spawn(next.run(request)).await {
        Ok(response) => response,
        Err(_) => ApiError::Panicked.into_response(),
    };
    let refused = response.status().is_client_error() || response.status().is_server_error();
    if refused && response.extensions().get::<portal::Rendered>().is_none() {
        write_refusal(&mut response, &request_id, &method, wants_page);
    }
    let headers = response.headers_mut();
    for (name, value) in HEADERS {
        headers.entry(name).or_insert(HeaderValue::from_static(value));
    }
    if let Ok(value) = HeaderValue::from_str(&request_id) {
        headers.insert(HeaderName::from_static("x-request-id"), value);
    }
    if app
        .settings
        .public_url
        .as_deref()
        .is_some_and(|url| url.starts_with("https://"))
    {
        headers.insert(
            header::STRICT_TRANSPORT_SECURITY,
            HeaderValue::from_static("max-age=31536000"),
        );
    }
    response
}

/// Refuses what a page of another site sends: the browser's own word on where a request comes from (`Sec-Fetch-Site`),
/// or else its `Origin`. Requests that are not from a browser carry neither and pass.
/// See <https://words.filippo.io/csrf/>; no token in forms is needed.
pub fn refuse_cross_site(
    settings: &Settings,
) -> impl Fn(Request, Next) -> Pin<Box<dyn Future<Output = Response> + Send>> + Clone + use<> {
    let own_origin = settings
        .public_url
        .as_deref()
        .map(|url| url.trim_end_matches('/').to_owned());
    move |request: Request, next: Next| {
        let own_origin = own_origin.clone();
        Box::pin(async move {
            match is_cross_site(request.method(), request.headers(), own_origin.as_deref()) {
                true => ApiError::CrossSite.into_response(),
                false => next.run(request).await,
            }
        })
    }
}

pub async fn no_such_route() -> ApiError {
    ApiError::NoSuchRoute
}

pub async fn no_such_method() -> ApiError {
    ApiError::NoSuchMethod
}

fn is_cross_site(method: &Method, headers: &HeaderMap, own_origin: Option<&str>) -> bool {
    if matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS) {
        return false;
    }
    let text = |name: HeaderName| headers.get(name).map(|value| value.to_str().unwrap_or("\u{0}"));
    let origin = text(header::ORIGIN);
    if origin.is_some() && origin == own_origin {
        return false;
    }
    match (text(HeaderName::from_static("sec-fetch-site")), origin) {
        (Some(site), _) => !matches!(site, "same-origin" | "none"),
        (None, None) => false,
        (None, Some(origin)) => {
            let authority = origin.split_once("://").map(|(_, authority)| authority);
            authority.is_none() || authority != text(header::HOST)
        }
    }
}

/// Writes the body of a refusal, which needs the request's id. Also of those that axum makes itself.
fn write_refusal(response: &mut Response, request_id: &str, method: &Method, wants_page: bool) {
    let status = response.status();
    let refusal = response.extensions_mut().remove::<Refusal>().unwrap_or_else(|| {
        let reason = status.canonical_reason().unwrap_or("Refused");
        Refusal::new("REFUSED", format!("{reason}."))
    });
    if status == StatusCode::INTERNAL_SERVER_ERROR {
        log::error!(
            "request {request_id} failed: {}",
            refusal.cause.as_deref().unwrap_or("unknown")
        );
    } else if let Some(cause) = &refusal.cause {
        log::warn!("request {request_id} refused: {cause}");
    }
    if wants_page {
        portal::write_refusal(response, &refusal, request_id);
        return;
    }
    let fields = refusal.fields.map(|fields| {
        fields
            .into_iter()
            .map(|fault| FieldError {
                field: fault.field,
                message: fault.message,
            })
            .collect()
    });
    let error = ErrorBody {
        code: refusal.code.to_owned(),
        message: refusal.message,
        request_id: request_id.to_owned(),
        fields,
    };
    let json = serde_json::to_vec(&ErrorEnvelope { success: false, error }).unwrap_or_default();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(json.len()));
    *response.body_mut() = if *method == Method::HEAD {
        Body::empty()
    } else {
        Body::from(json)
    };
}

/// The client's own id if it is well-formed, else a new one.
fn request_id(headers: &HeaderMap) -> String {
    let sent = headers.get("x-request-id").and_then(|value| value.to_str().ok());
    let well_formed = |id: &&str| {
        (1..=128).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.:".contains(&b))
    };
    match sent.filter(well_formed) {
        Some(id) => id.to_owned(),
        None => secret::id("req_").unwrap_or_else(|_| "req_unknown".to_owned()),
    }
}

/// The nearest address that is not one of our own proxies. `X-Forwarded-For` is read from its end, and only as far as
/// proxies that we trust have written it.
fn client_address(peer: Option<IpAddr>, headers: &HeaderMap, trusted: &[Network]) -> Option<IpAddr> {
    let is_trusted = |address: IpAddr| trusted.iter().any(|network| network.contains(address));
    let peer = peer?;
    if !is_trusted(peer) {
        return Some(peer);
    }
    let lines: Vec<&str> = headers
        .get_all("x-forwarded-for")
        .iter()
        .filter_map(|line| line.to_str().ok())
        .collect();
    let mut nearest = peer;
    for hop in lines.iter().rev().flat_map(|line| line.rsplit(',')) {
        let Ok(address) = hop.trim().parse::<IpAddr>() else {
            break;
        };
        nearest = address;
        if !is_trusted(address) {
            break;
        }
    }
    Some(nearest)
}

fn user_agent(headers: &HeaderMap) -> String {
    let text = headers
        .get(header::USER_AGENT)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    text.chars().filter(|c| !c.is_control()).take(200).collect()
}

/// Answers hold secrets and other people's data: nobody may keep, frame, sniff or embed them. Pages set their own policy.
const HEADERS: [(HeaderName, &str); 7] = [
    (header::CACHE_CONTROL, "no-store"),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::X_FRAME_OPTIONS, "DENY"),
    (header::REFERRER_POLICY, "no-referrer"),
    (
        header::CONTENT_SECURITY_POLICY,
        "default-src 'none'; frame-ancestors 'none'",
    ),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(list: &[(&'static str, &str)]) -> HeaderMap {
        list.iter()
            .map(|(n, v)| (HeaderName::from_static(n), HeaderValue::from_str(v).unwrap()))
            .collect()
    }

    #[test]
    fn forwarded_addresses_count_only_as_far_as_they_are_trusted() {
        let trusted = [Network::LOOPBACK_V4, "10.0.0.0/8".parse().unwrap()];
        let address = |peer: &str, forwarded: &str| {
            let headers = headers(&[("x-forwarded-for", forwarded)]);
            client_address(Some(peer.parse().unwrap()), &headers, &trusted)
                .unwrap()
                .to_string()
        };
        assert_eq!(address("203.0.113.1", "198.51.100.7"), "203.0.113.1");
        assert_eq!(address("127.0.0.1", "198.51.100.7"), "198.51.100.7");
        assert_eq!(address("127.0.0.1", "1.2.3.4, 198.51.100.7, 10.0.0.9"), "198.51.100.7");
        assert_eq!(address("127.0.0.1", "nonsense"), "127.0.0.1");
        assert_eq!(address("127.0.0.1", "nonsense, 10.0.0.9"), "10.0.0.9");
    }

    #[test]
    fn only_other_sites_are_refused() {
        let judge = |list: &[(&'static str, &str)]| {
            is_cross_site(&Method::POST, &headers(list), Some("https://keys.example.com"))
        };
        assert!(!judge(&[]));
        assert!(!judge(&[("sec-fetch-site", "same-origin")]));
        assert!(!judge(&[
            ("origin", "https://keys.example.com"),
            ("sec-fetch-site", "same-site")
        ]));
        assert!(!judge(&[("origin", "http://localhost:81"), ("host", "localhost:81")]));
        assert!(judge(&[("sec-fetch-site", "cross-site")]));
        assert!(judge(&[("sec-fetch-site", "same-site")]));
        assert!(judge(&[
            ("origin", "https://evil.example"),
            ("host", "keys.example.com")
        ]));
        assert!(judge(&[("origin", "null"), ("host", "keys.example.com")]));
        assert!(!is_cross_site(
            &Method::GET,
            &headers(&[("sec-fetch-site", "cross-site")]),
            None
        ));
    }
}
