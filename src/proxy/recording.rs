//! A request that is over: counted, and logged.

use super::access_log::Entry;
use super::steps::host_of;
use super::{Context, PASSED, Proxy, us_between};
use crate::gate::{Access, Permit, Refusal};
use pingora::http::RequestHeader;
use pingora::proxy::Session;

/// What a client was answered.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Answered {
    /// 0: nothing.
    pub status: u16,
    pub body_bytes: usize,
}

impl Proxy {
    /// Counts and logs a request that is over.
    pub(super) fn record(&self, session: &Session, context: &Context) {
        let answer = session.response_written();
        let answered = Answered {
            status: answer.map_or(0, |answer| answer.status.as_u16()),
            body_bytes: session.body_bytes_sent(),
        };
        self.record_answered(session.req_header(), context, answered);
    }

    /// The same, by what was answered.
    pub(super) fn record_answered(&self, request: &RequestHeader, context: &Context, answered: Answered) {
        // The process that decided has logged and counted it.
        if context.passed_on.is_some() && context.decision == PASSED {
            return;
        }
        let status = answered.status;
        let route = context
            .permit
            .as_ref()
            .map(Permit::route)
            .or(context.refusal.as_ref().and_then(|r| r.route.as_ref()));
        let tier = match route.map(|route| &route.access) {
            Some(Access::Keyed { tier, .. }) => Some(&**tier),
            _ => None,
        };
        let now = self.0.clock.now();
        let times = context.times(now);
        self.0.metrics.record(context.decision, tier, status, Some(&times));
        let holder = context
            .permit
            .as_ref()
            .and_then(Permit::holder)
            .or(context.refusal.as_ref().and_then(Refusal::holder));
        if let (Some(counts), Some(holder)) = (&self.0.key_counts, holder) {
            counts.record(holder.key_id(), context.decision);
        }
        let Some(access_log) = &self.0.access_log else { return };
        access_log.log(&Entry {
            unix_ms: context.now.unix_ms,
            client: Some(context.client),
            request_id: context
                .request_id
                .as_ref()
                .and_then(|id| id.to_str().ok())
                .unwrap_or("-"),
            method: request.method.as_str(),
            host: host_of(request),
            path: request.uri.path(),
            status,
            decision: context.decision,
            route: route.map_or("", |route| &route.name),
            tier: tier.map_or("", |tier| &tier.name),
            key_id: holder.map_or("", |holder| holder.key_id()),
            organization: holder.map_or("", |holder| holder.organization()),
            duration_us: us_between(context.now, now),
            upstream_us: times.upstream_us.unwrap_or_default(),
            bytes_sent: answered.body_bytes,
            traceparent: request
                .headers
                .get("traceparent")
                .and_then(|value| value.to_str().ok())
                .unwrap_or_default(),
        });
    }
}
