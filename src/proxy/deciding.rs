//! The decision on a request: what is looked at before the gate is asked, and what follows from its answer.

use super::client_address::client_address;
use super::guard::ConnectionInfo;
use super::passing_on::{Duty, Peer};
use super::response::Answer;
use super::shared::{self, SharedLimits};
use super::{Context, Proxy, edge, steps};
use crate::gate::{Permit, Refusal};
use http::Method;
use pingora::proxy::Session;

impl Proxy {
    /// Asks the gate; `Err` is the answer where the request goes no further.
    pub(super) fn decide(&self, session: &mut Session, context: &mut Context) -> Result<(), Answer> {
        self.before_the_gate(session, context)?;
        // Held for the decision and no longer: a hand-over waits until nobody holds it.
        let duty = self.0.duty.load();
        if let Duty::PassOn(successor) = &**duty {
            context.passed_on = Some(successor.clone());
            return Ok(());
        }
        let decided = steps::check(&self.0.gate, session, context.client, context.now);
        drop(duty);
        self.after_the_gate(session, context, decided)
    }

    /// The same where limits are shared: a request may have to wait for permits.
    pub(super) async fn decide_with_others(
        &self,
        limits: &dyn SharedLimits,
        session: &mut Session,
        context: &mut Context,
    ) -> Result<(), Answer> {
        self.before_the_gate(session, context)?;
        // As above, through a wait of some milliseconds.
        let duty = self.0.duty.load_full();
        if let Duty::PassOn(successor) = &*duty {
            context.passed_on = Some(successor.clone());
            return Ok(());
        }
        let (gate, clock) = (&self.0.gate, &self.0.clock);
        let decided = shared::check(limits, gate, clock, session, context.client, context.now).await;
        drop(duty);
        self.after_the_gate(session, context, decided)
    }

    fn before_the_gate(&self, session: &Session, context: &mut Context) -> Result<(), Answer> {
        context.peer = Peer::of(session);
        if let Some(peer) = context.peer {
            let compiled = self.0.compiled.load();
            context.client = client_address(
                peer.address.ip(),
                &session.req_header().headers,
                &compiled.trusted_proxies,
            )
            .client;
        }
        let method = &session.req_header().method;
        if method == Method::TRACE || method == Method::CONNECT {
            return Err(Answer::method_not_allowed());
        }
        steps::check_parameters(&self.0.gate, session.req_header())
            .map_err(|ambiguity| Answer::from(&edge::EdgeRefusal::from(ambiguity)))
    }

    fn after_the_gate(
        &self,
        session: &mut Session,
        context: &mut Context,
        decided: Result<Permit, Refusal>,
    ) -> Result<(), Answer> {
        let permit = decided.map_err(|refusal| Answer::of(context.refusal.insert(refusal)))?;
        if edge::filter_upgrade(session.req_header_mut(), permit.route().upgrade) {
            self.end_with_its_key(session, &permit);
        }
        context.permit = Some(permit);
        Ok(())
    }

    /// An upgraded connection has no further requests to refuse, so it is watched for as long as it lasts.
    fn end_with_its_key(&self, session: &Session, permit: &Permit) {
        let (proxy, ticket) = (self.clone(), permit.ticket());
        if let Some(connection) = ConnectionInfo::of(session.digest()) {
            connection.keep_while(move || proxy.0.gate.still_permits(&ticket, proxy.0.clock.now()));
        }
    }
}
