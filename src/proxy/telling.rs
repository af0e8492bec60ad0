//! What upstreams and clients are told.

use super::client_address::{forwarded_fields, remove_claims};
use super::fields::{edit_request, edit_response};
use super::guard::ConnectionInfo;
use super::passing_on::Peer;
use super::response::{self, Answer, X_REQUEST_ID};
use super::{Context, FIELDS_ADDED, Proxy, edge, passing_on, steps};
use crate::gate::Permit;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Version};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::proxy::Session;
use pingora::{Error, ErrorSource, ErrorType};

impl Proxy {
    pub(super) async fn answer(
        &self,
        session: &mut Session,
        context: &mut Context,
        answer: &Answer,
    ) -> pingora::Result<()> {
        context.decision = answer.code;
        let compiled = self.0.compiled.load_full();
        if reads_on(answer.status, context) {
            steps::read_on(session);
        }
        let request_id = context
            .request_id
            .get_or_insert_with(|| self.0.ids.of(&session.req_header().headers))
            .clone();
        let rate = context.refusal.as_ref().and_then(|refusal| refusal.rate());
        steps::answer(session, answer, rate, &compiled.response, &request_id).await
    }

    /// What the client is told about an exchange that failed; `None` where it is gone, or `is_begun` an answer.
    pub(super) fn answer_to_failure(&self, error: &Error, is_begun: bool, context: &mut Context) -> Option<Answer> {
        if context.upstream_started.is_some() {
            let now = self.0.clock.now();
            context.upstream_answered.get_or_insert(now);
            context.upstream_ended.get_or_insert(now);
        }
        let answer = edge::guard_refusal(error)
            .map(|refusal| Answer::from(&refusal))
            .or_else(|| answer_to(error))
            .filter(|_| !is_begun);
        if answer.is_none() {
            context.decision = if *error.esource() == ErrorSource::Upstream {
                "BAD_GATEWAY"
            } else {
                "CLIENT_GONE"
            };
        }
        answer
    }

    /// Counts that no connection came about. Whether to try again.
    pub(super) fn may_try_again_after_no_connection(&self, context: &Context) -> bool {
        if let Some(permit) = &context.permit {
            let compiled = self.0.compiled.load();
            compiled.upstreams.count_connect_failure(permit.upstream());
        }
        context.attempts.again_after_no_connection()
    }

    /// Makes a request ready for its upstream.
    pub(super) fn make_ready(
        &self,
        session: &Session,
        request: &mut RequestHeader,
        context: &mut Context,
    ) -> pingora::Result<()> {
        if context.passed_on.is_some() {
            return passing_on::name_client(session, request);
        }
        if request.version == Version::HTTP_10 {
            request.set_version(Version::HTTP_11);
        }
        edit_request(request, |fields| {
            // Five that say whose request it is, three that say where it comes from.
            fields.reserve(8);
            let permit = permit_of(context)?;
            self.0.compiled.load().names.strip(fields, permit, &self.0.gate);
            remove_claims(fields);
            self.tell_upstream(session, context, |name, value| {
                fields.insert(name, value.clone());
            })
        })
    }

    /// Tells a request's upstream where it comes from, whose it is, and its id. The client's own fields of these
    /// names do not travel, so that each stands there once.
    ///
    /// # Errors
    /// `InternalError` without a permit.
    pub(super) fn tell_upstream(
        &self,
        session: &Session,
        context: &mut Context,
        mut put: impl FnMut(&HeaderName, &HeaderValue),
    ) -> pingora::Result<()> {
        let (sent, compiled) = (&session.req_header().headers, self.0.compiled.load());
        if let Some(Peer { address, is_tls }) = context.peer {
            let (peer, connection) = (address.ip(), ConnectionInfo::of(session.digest()));
            // Nobody in front of us is believed: the connection has its client's address ready.
            let known = connection.filter(|_| !compiled.trusted_proxies.contains(peer));
            let scheme = match known.and_then(ConnectionInfo::client_value) {
                Some(client) => {
                    put(&X_FORWARDED_FOR, client);
                    if is_tls { "https" } else { "http" }
                }
                None => {
                    let (_, chain, scheme) = forwarded_fields(peer, is_tls, sent, &compiled.trusted_proxies);
                    put(&X_FORWARDED_FOR, &chain);
                    scheme
                }
            };
            put(&X_FORWARDED_PROTO, &HeaderValue::from_static(scheme));
        }
        compiled.names.tell(permit_of(context)?, &mut put)?;
        let request_id = context.request_id.get_or_insert_with(|| self.0.ids.of(sent));
        put(&X_REQUEST_ID, request_id);
        Ok(())
    }

    /// Makes a response ready for the client.
    ///
    /// # Errors
    /// `InvalidHTTPHeader` for a change of protocols that was not asked for: Pingora would let it through.
    pub(super) fn tell_client(
        &self,
        session: &Session,
        response: &mut ResponseHeader,
        context: &mut Context,
    ) -> pingora::Result<()> {
        if response.status == StatusCode::SWITCHING_PROTOCOLS && !session.is_upgrade_req() {
            let why = "101 to a request that asked for no upgrade";
            return Err(Error::explain(ErrorType::InvalidHTTPHeader, why).into_up());
        }
        context.upstream_answered = Some(self.0.clock.now());
        if context.passed_on.is_some() {
            return Ok(());
        }
        // Whatever the upstream speaks, this is what we speak (RFC 9110 section 2.5).
        response.set_version(Version::HTTP_11);
        edit_response(response, |fields| {
            fields.reserve(FIELDS_ADDED);
            self.add_fields(fields, context);
            Ok(())
        })
    }

    /// Tells the client its request's id and what is left of its limit.
    pub(super) fn add_fields(&self, fields: &mut HeaderMap, context: &Context) {
        if let Some(request_id) = &context.request_id {
            fields.insert(X_REQUEST_ID, request_id.clone());
        }
        if let Some(rate) = context.permit.as_ref().and_then(Permit::rate) {
            response::add_rate_limit(fields, &self.0.compiled.load().response, rate);
        }
    }
}

/// Whether the rest of a request's body is read after an answer of our own, so that the connection can stay; not where
/// the request could be read in more than one way.
pub(super) fn reads_on(status: StatusCode, context: &Context) -> bool {
    status != StatusCode::BAD_REQUEST || context.refusal.is_some()
}

/// Without a permit nothing travels upstream, whatever phase order a later Pingora has.
pub(super) fn permit_of(context: &Context) -> pingora::Result<&Permit> {
    let permit = context.permit.as_ref();
    permit.ok_or_else(|| Error::explain(ErrorType::InternalError, "no permit"))
}

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// What the client is told when the exchange with the upstream failed; `None` where the client itself is gone.
fn answer_to(error: &Error) -> Option<Answer> {
    use ErrorType::{
        ConnectTimedout, ConnectionClosed, HTTPStatus, InvalidHTTPHeader, ReadError, ReadTimedout,
        TLSHandshakeTimedout, WriteError, WriteTimedout,
    };
    match (error.esource(), error.etype()) {
        (_, HTTPStatus(status)) if *status < 500 => {
            let status = http::StatusCode::from_u16(*status).unwrap_or(http::StatusCode::BAD_REQUEST);
            Some(Answer::new(
                status,
                "AMBIGUOUS_REQUEST",
                "The request is not well-formed HTTP.",
            ))
        }
        (ErrorSource::Downstream, WriteError | ReadError | ConnectionClosed | ReadTimedout | WriteTimedout) => None,
        (ErrorSource::Downstream, InvalidHTTPHeader) | (ErrorSource::Downstream, _) => {
            Some(Answer::ambiguous("The request is not well-formed HTTP."))
        }
        (_, ConnectTimedout | ReadTimedout | WriteTimedout | TLSHandshakeTimedout) => Some(Answer::upstream_timeout()),
        _ => Some(Answer::bad_gateway()),
    }
}
