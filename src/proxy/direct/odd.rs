//! Answers that are not plain: whatever HTTP allows, read and passed on by Pingora.

use super::super::guard::Guard;
use super::super::recording::Answered;
use super::super::upstream::{Connection, Server};
use super::super::{Context, Proxy};
use super::client::Client;
use bytes::{Bytes, BytesMut};
use futures_util::FutureExt as _;
use http::StatusCode;
use http::header::{CONTENT_LENGTH, TRANSFER_ENCODING};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::protocols::http::HttpTask;
use pingora::protocols::http::v1::client::HttpSession as ClientSession;
use pingora::protocols::l4::stream::Stream;
use pingora::proxy::{ProxyHttp as _, Session};
use pingora::{Error, ErrorType};
use std::sync::Arc;

/// An answer that is not plain.
pub(super) struct OddAnswer {
    pub server: Arc<Server>,
    /// Its first bytes are in the buffer.
    pub connection: Connection,
    /// Of the request that was asked.
    pub body: Bytes,
}

/// The request that was answered.
pub(super) struct Request<'a> {
    pub head: &'a RequestHeader,
    /// Its head, as it came.
    pub bytes: &'a [u8],
}

impl Proxy {
    /// Passes any answer on, from its first byte. Returns the client's connection, if it can carry another request.
    pub(super) async fn pass_back_oddly(
        &self,
        client: Client,
        request: Request<'_>,
        mut context: Box<Context>,
        answer: OddAnswer,
    ) -> Option<Box<Guard>> {
        let mut session = Session::new_h1(client.guard);
        let whole = BytesMut::from_iter(request.bytes.iter().chain(&answer.body));
        if read_again(&mut session, whole).await.is_none() {
            debug_assert!(false, "Pingora cannot read what the edge has read");
            context.decision = "BAD_GATEWAY";
            self.record_answered(request.head, &context, Answered::default());
            return None;
        }
        if !client.keeps {
            session.set_keepalive(None);
        }
        let passed = self.pass_tasks(&mut session, &mut context, answer).await;
        let is_reusable = match &passed {
            Ok(()) => true,
            Err(error) => {
                let failed = self.fail_to_proxy(&mut session, error, &mut context);
                failed.await.can_reuse_downstream
            }
        };
        self.record(&session, &context);
        if !is_reusable {
            return None;
        }
        let (stream, _) = session.downstream_session.finish().await.ok()??.into_parts();
        stream.into_any().downcast().ok()
    }

    async fn pass_tasks(&self, session: &mut Session, context: &mut Context, answer: OddAnswer) -> pingora::Result<()> {
        let OddAnswer {
            server, mut connection, ..
        } = answer;
        connection.stream.rewind(&connection.buffer);
        let is_sound = connection.is_sound;
        let mut upstream = ClientSession::new(connection.stream);
        upstream.read_timeout = Some(server.timeouts().read);
        let mut is_end = false;
        while !is_end {
            let mut task = tokio::select! {
                biased;
                task = upstream.read_response_task() => task.map_err(Error::into_up)?,
                gone = session.downstream_session.read_body_or_idle(true) => return Err(gone_error(gone)),
            };
            let mut tasks = Vec::with_capacity(TASKS_AT_ONCE);
            loop {
                is_end = task.is_end();
                self.make_task_ready(session, &mut task, context)?;
                tasks.push(task);
                if is_end || tasks.len() == TASKS_AT_ONCE {
                    break;
                }
                // What has come already leaves with it; a read that is given up loses nothing.
                match upstream.read_response_task().now_or_never() {
                    Some(Ok(next)) => task = next,
                    Some(Err(error)) => {
                        session.write_response_tasks(tasks).await?;
                        return Err(error.into_up());
                    }
                    None => break,
                }
            }
            session.write_response_tasks(tasks).await?;
        }
        upstream.respect_keepalive();
        if is_sound
            && let Some(stream) = upstream.reuse().await
            && let Ok(stream) = stream.into_any().downcast::<Stream>()
        {
            server.put(Connection::new(stream), self.0.clock.now().elapsed_ns);
        }
        Ok(())
    }

    /// A piece of a response that Pingora's client has read, as it goes to the client.
    fn make_task_ready(&self, session: &Session, task: &mut HttpTask, context: &mut Context) -> pingora::Result<()> {
        let is_end = task.is_end();
        match task {
            HttpTask::Header(head, _) => {
                if !is_end {
                    frame_anew(head)?;
                }
                self.tell_client(session, head, context)
            }
            _ => {
                if is_end {
                    context.upstream_ended = Some(self.0.clock.now());
                }
                Ok(())
            }
        }
    }
}

/// Lets Pingora read the request that was answered. It is all there, so that nothing is waited for.
async fn read_again(session: &mut Session, whole: BytesMut) -> Option<()> {
    session.set_pipelined_prefix(whole);
    // Not with what is left of this task's turn.
    tokio::task::unconstrained(async {
        if !session.read_request().await.ok()? {
            return None;
        }
        while session.read_request_body().await.ok()?.is_some() {}
        Some(())
    })
    .await
}

/// A client that closes, or sends what belongs to no request. (Behind an edge it cannot: that waits there for its turn.)
fn gone_error(gone: pingora::Result<Option<Bytes>>) -> Box<Error> {
    match gone {
        Err(error) => error.into_down(),
        Ok(_) => Error::explain(ErrorType::ConnectionClosed, "the client sent more than its request").into_down(),
    }
}

/// A body that ends with its upstream's connection goes on in chunks, so that the client's connection can stay. As
/// `h1_response_filter` does on Pingora's way.
fn frame_anew(head: &mut ResponseHeader) -> pingora::Result<()> {
    let has_no_body =
        head.status.is_informational() || matches!(head.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    if has_no_body || head.headers.contains_key(TRANSFER_ENCODING) || head.headers.contains_key(CONTENT_LENGTH) {
        return Ok(());
    }
    head.insert_header(TRANSFER_ENCODING, "chunked")
}

/// Pieces of a response that leave together, as in Pingora's own way.
const TASKS_AT_ONCE: usize = 4;
