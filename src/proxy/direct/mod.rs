//! The direct way of a request to its upstream.
//!
//! Pingora's way is made for all that HTTP can be: two halves that talk over channels, copies of each head, a watcher for
//! each idle connection. Most requests of an API need none of it. Those that are plain ([`HeadFraming::is_plain`]), to a
//! server that is spoken to in plain HTTP/1, go this way instead, from the edge on: the head that it has checked is not
//! read a second time, `request_filter` decides as for any other request, and then there is one write and, as a rule, one
//! read, then one write to the client. The upstream's answer may be what it likes: one that is not [`Plain`] is read by
//! Pingora's client, from its first byte on.
//!
//! But for the spelling of names nobody can tell the two ways apart from outside, unless an upstream answers before it has
//! all of a body: one that goes this way is gathered first. `tests/e2e/two_ways.rs` compares them.
//!
//! [`HeadFraming::is_plain`]: super::strict::HeadFraming::is_plain

mod answer;
mod client;
mod odd;
mod pass;
mod request;
mod session;

pub(super) use request::PlainRequest;

use super::guard::Guard;
use super::telling::reads_on;
use super::{Context, Proxy};
use bytes::{BufMut as _, Bytes, BytesMut};
use client::Client;
use odd::OddAnswer;
use pingora::protocols::{Digest, GetProxyDigest as _, GetSocketDigest as _, Ssl as _};
use pingora::proxy::ProxyHttp as _;
use pingora::{Error, ErrorType};
use session::SessionInMemory;
use std::any::Any;

/// The direct way of the requests of one connection.
pub(super) struct DirectWay {
    proxy: Proxy,
    memory: SessionInMemory,
}

/// What became of a request.
pub(super) enum Served {
    /// It was answered, and its connection can carry another.
    Kept(Box<Guard>),
    /// Its connection is at its end.
    Ended,
    /// It wants Pingora's way: its bytes as far as they have come, and what was decided of it already.
    Undone(Box<Guard>, Bytes, Option<Begun>),
}

/// A request's [`Context`], as Pingora hands it to `on_connection_reuse`.
type Begun = Box<dyn Any + Send + Sync>;

/// What came of passing a request on.
enum Passed {
    Answered,
    /// The upstream wants Pingora's way.
    Undone,
    /// The upstream's answer is not plain.
    Oddly(OddAnswer),
}

impl DirectWay {
    /// That of the requests of the guard's connection.
    pub fn new(proxy: Proxy, guard: &Guard) -> Self {
        let digest = Digest {
            ssl_digest: guard.get_ssl_digest(),
            timing_digest: Vec::new(),
            proxy_digest: guard.get_proxy_digest(),
            socket_digest: guard.get_socket_digest(),
        };
        let memory = SessionInMemory::new(digest);
        DirectWay { proxy, memory }
    }

    /// Serves one request. `keeps`: its connection may carry another, for all that is known before.
    pub async fn serve(&mut self, guard: Box<Guard>, mut request: PlainRequest, keeps: bool) -> Served {
        let mut context = self.proxy.new_ctx();
        self.memory
            .begin(std::mem::replace(&mut request.head, session::nothing()));
        let mut client = Client::new(guard, keeps);
        let passed = self.exchange(&mut client, &request, &mut context).await;
        if let Err(error) = &passed {
            self.tell_failure(&mut client, &request, error, &mut context).await;
        }
        let kept = match passed {
            Ok(Passed::Answered) | Err(_) => {
                let request = self.memory.session().req_header();
                self.proxy.record_answered(request, &context, client.answered);
                drop(context);
                client.end().await
            }
            Ok(Passed::Oddly(answer)) => {
                let request = odd::Request {
                    head: self.memory.session().req_header(),
                    bytes: request.head_bytes(),
                };
                // Rare and large: not in the room of each connection.
                Box::pin(self.proxy.pass_back_oddly(client, request, context, answer)).await
            }
            Ok(Passed::Undone) => {
                self.memory.end();
                return Served::Undone(client.guard, request.message().clone(), Some(Box::new(context)));
            }
        };
        self.memory.end();
        kept.map_or(Served::Ended, Served::Kept)
    }

    async fn exchange(
        &mut self,
        client: &mut Client,
        request: &PlainRequest,
        context: &mut Box<Context>,
    ) -> pingora::Result<Passed> {
        let session = self.memory.session();
        if self.proxy.request_filter(session, context).await? {
            self.send_answer(client, request, context).await?;
            return Ok(Passed::Answered);
        }
        self.proxy.pass_directly(session, client, request, context).await
    }

    /// Sends what was answered in memory.
    async fn send_answer(
        &mut self,
        client: &mut Client,
        request: &PlainRequest,
        context: &Context,
    ) -> pingora::Result<()> {
        let Some((head, body)) = self.memory.answer() else {
            return Error::e_explain(ErrorType::InternalError, "no answer");
        };
        client.keeps &= !request.has_body() || reads_on(head.status, context);
        let mut out = BytesMut::with_capacity(client::ROOM);
        client::write_head(head, client.keeps, &mut out);
        out.put_slice(&body);
        client.send(head.status, &out, body.len()).await
    }

    async fn tell_failure(
        &mut self,
        client: &mut Client,
        request: &PlainRequest,
        error: &Error,
        context: &mut Context,
    ) {
        // As on Pingora's way, which has it from its library.
        client.keeps &= context.upstream_started.is_none();
        client.is_cut = match self.proxy.answer_to_failure(error, client.is_begun, context) {
            Some(answer) => {
                let answered = self.proxy.answer(self.memory.session(), context, &answer).await;
                answered.is_err() || self.send_answer(client, request, context).await.is_err()
            }
            // Not even that this is the end can be said.
            None => true,
        };
    }
}
