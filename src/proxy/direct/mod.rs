//! The direct way of a request to its upstream.
//!
//! Pingora's way is made for all that HTTP can be: two halves that talk over channels, copies of each head, a watcher for
//! each idle connection. Most requests of an API need none of it. Those with a short body or none, to a server that is
//! spoken to in plain HTTP/1, go this way instead ([`may_go_directly`]): one write and, as a rule, one read, then one
//! write to the client. Their upstream's answer may be what it likes: one that is not [`Plain`] is read by Pingora's client,
//! from its first byte on.
//!
//! But for the spelling of names, nobody can tell the two ways apart from outside; `tests/e2e/two_ways.rs` compares them.

mod answer;
mod request;

pub(super) use request::may_go_directly;

use super::upstream::{Connection, Server, receive_buffer};
use super::{Context, FIELDS_ADDED, Proxy};
use answer::Plain;
use bytes::{Bytes, BytesMut};
use futures_util::FutureExt as _;
use http::StatusCode;
use http::header::{CONTENT_LENGTH, TRANSFER_ENCODING};
use pingora::http::ResponseHeader;
use pingora::protocols::http::HttpTask;
use pingora::protocols::http::v1::client::HttpSession as ClientSession;
use pingora::protocols::l4::stream::Stream;
use pingora::proxy::Session;
use pingora::{Error, ErrorSource, ErrorType};
use request::read_body;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::Instant;

impl Proxy {
    /// Passes a permitted request on that [`may_go_directly`]. `false`: its upstream wants Pingora's way.
    ///
    /// # Errors
    /// As Pingora's own way would fail.
    pub(super) async fn pass_directly(&self, session: &mut Session, context: &mut Context) -> pingora::Result<bool> {
        let Some(first) = self.next_server(context) else {
            return Ok(false);
        };
        context.upstream_started = Some(self.0.clock.now());
        let body = if session.as_mut().is_body_done() {
            Bytes::new()
        } else {
            read_body(session).await?
        };
        let (server, mut connection) = self.ask_servers(session, context, first, &body).await?;
        let read = connection.buffer.split().freeze();
        match Plain::of(&read, FIELDS_ADDED) {
            Some(plain) => {
                let passed = self.pass_back(session, context, &server, connection, plain, read);
                passed.await?;
            }
            None => {
                connection.stream.rewind(&read);
                self.pass_back_by_pingora(session, context, &server, connection).await?;
            }
        }
        Ok(true)
    }

    /// Sends the request to `server`, and to others where nothing of it can have had an effect. Returns the server that
    /// answers, and the connection with the first bytes of its answer in the buffer.
    async fn ask_servers(
        &self,
        session: &mut Session,
        context: &mut Context,
        mut server: Arc<Server>,
        body: &[u8],
    ) -> pingora::Result<(Arc<Server>, Connection)> {
        let mut pooled = server.take(self.0.clock.now().elapsed_ns);
        loop {
            let is_reused = pooled.is_some();
            let connected = match pooled.take() {
                Some(connection) => Ok(connection),
                None => {
                    let in_flight = self.0.in_flight.load(Ordering::Relaxed);
                    server.connect(receive_buffer(in_flight)).await
                }
            };
            let error = match connected {
                Ok(mut connection) => {
                    self.write_request(session, context, body, &mut connection.buffer)?;
                    match ask(&mut connection, session, &server).await? {
                        Asked::Answered => return Ok((server, connection)),
                        Asked::Silence(error) => {
                            let method = &session.req_header().method;
                            if !context.attempts.again_after_silence(is_reused, method) {
                                return Err(error.into_up());
                            }
                            error
                        }
                    }
                }
                Err(error) if self.may_try_again_after_no_connection(context) => error,
                Err(error) => return Err(error.into_up()),
            };
            // Again on a new connection, which cannot have grown old. There is no such server where a reload has changed
            // how the upstream is spoken to.
            server = self.next_server(context).ok_or_else(|| error.into_up())?;
        }
    }

    /// The server for the next try, if its upstream can be reached this way.
    fn next_server(&self, context: &mut Context) -> Option<Arc<Server>> {
        let name = context.permit.as_ref()?.upstream();
        let compiled = self.0.compiled.load();
        compiled.upstreams.next_plain(name, &mut context.attempts)
    }

    /// Passes a plain response on, of which `read` has come.
    async fn pass_back(
        &self,
        session: &mut Session,
        context: &mut Context,
        server: &Arc<Server>,
        mut connection: Connection,
        plain: Plain,
        read: Bytes,
    ) -> pingora::Result<()> {
        let mut now = self.0.clock.now();
        context.upstream_answered = Some(now);
        let mut parts = plain.parts;
        self.add_fields(&mut parts.headers, context);
        let mut head = ResponseHeader::from(parts);
        if plain.reason.is_some() {
            head.set_reason_phrase(plain.reason.as_deref())?;
        }
        let mut head = Some(Box::new(head));
        let mut piece = read.slice(plain.head_len..);
        drop(read);
        let mut left = plain.length;
        loop {
            let is_surplus = piece.len() as u64 > left;
            if is_surplus {
                piece.truncate(left as usize);
            }
            left -= piece.len() as u64;
            if left == 0 {
                context.upstream_ended = Some(now);
                // Not where more has come than was announced, or the server goes.
                connection.is_sound &= plain.keeps && !is_surplus;
                // Before the client has its answer, which may take a while.
                server.put(connection, now.elapsed_ns);
                return write_to_client(session, head, piece, true).await;
            }
            write_to_client(session, head.take(), piece, false).await?;
            connection.buffer = BytesMut::with_capacity(usize::try_from(left).unwrap_or(usize::MAX).min(MOST_READ));
            if read_some(&mut connection, session, server.timeouts().read).await? == 0 {
                return Err(Error::explain(ErrorType::ConnectionClosed, "in the middle of a response").into_up());
            }
            // Whole: at rest a connection does not hold what a long body needed.
            piece = std::mem::take(&mut connection.buffer).freeze();
            now = self.0.clock.now();
        }
    }

    /// Passes any response on, from its first byte, as Pingora's client reads it.
    async fn pass_back_by_pingora(
        &self,
        session: &mut Session,
        context: &mut Context,
        server: &Arc<Server>,
        connection: Connection,
    ) -> pingora::Result<()> {
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

/// What became of a request that was written.
enum Asked {
    /// The first bytes of an answer are in the buffer.
    Answered,
    /// The connection ended without one.
    Silence(Box<Error>),
}

/// Sends the request that is in the buffer, and waits for the first bytes of an answer.
async fn ask(connection: &mut Connection, session: &mut Session, server: &Server) -> pingora::Result<Asked> {
    let timeouts = server.timeouts();
    let written = tokio::select! {
        biased;
        written = connection.stream.write_all(&connection.buffer) => written,
        // Not begun where all fits into the socket.
        () = async { connection.timer.until(Instant::now() + timeouts.write).await } => {
            return Err(Error::explain(ErrorType::WriteTimedout, "while writing a request").into_up());
        }
    };
    // A server may have said no before it had all, and closed: what it said is still there to be read.
    connection.is_sound = written.is_ok();
    connection.buffer.clear();
    connection.buffer.reserve(ANSWER_ROOM);
    match read_some(connection, session, timeouts.read).await {
        Ok(1..) => Ok(Asked::Answered),
        Ok(0) => Ok(Asked::Silence(match written {
            Ok(()) => Error::explain(ErrorType::ConnectionClosed, "before a response"),
            Err(error) => Error::because(ErrorType::WriteError, "while writing a request", error),
        })),
        Err(error) if *error.etype() == ErrorType::ReadError && *error.esource() == ErrorSource::Upstream => {
            Ok(Asked::Silence(error))
        }
        Err(error) => Err(error),
    }
}

/// Reads into the buffer's free room what the upstream sends next; 0 is its end. Fails when it is silent for longer
/// than `patience`, and when the client goes away meanwhile.
async fn read_some(connection: &mut Connection, session: &mut Session, patience: Duration) -> pingora::Result<usize> {
    let deadline = Instant::now() + patience;
    tokio::select! {
        biased;
        read = connection.stream.read_buf(&mut connection.buffer) => {
            read.map_err(|error| Error::because(ErrorType::ReadError, "while reading a response", error).into_up())
        }
        () = connection.timer.until(deadline) => {
            Err(Error::explain(ErrorType::ReadTimedout, "while reading a response").into_up())
        }
        gone = session.downstream_session.read_body_or_idle(true) => Err(gone_error(gone)),
    }
}

/// A client that closes, or sends what belongs to no request. (Behind an edge it cannot: that waits there for its turn.)
fn gone_error(gone: pingora::Result<Option<Bytes>>) -> Box<Error> {
    match gone {
        Err(error) => error.into_down(),
        Ok(_) => Error::explain(ErrorType::ConnectionClosed, "the client sent more than its request").into_down(),
    }
}

/// Writes a response's head, if it was not yet, and a piece of its body.
async fn write_to_client(
    session: &mut Session,
    head: Option<Box<ResponseHeader>>,
    piece: Bytes,
    is_last: bool,
) -> pingora::Result<()> {
    let client = session.as_mut();
    if let Some(head) = head {
        client.write_response_header(head).await.map_err(Error::into_down)?;
    }
    client
        .write_response_body(piece, is_last)
        .await
        .map_err(Error::into_down)
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

/// For the head of a response and a short body, in bytes.
const ANSWER_ROOM: usize = 4096;
/// Pieces of a response that leave together, as in Pingora's own way.
const TASKS_AT_ONCE: usize = 4;
/// At once of a long body, in bytes.
const MOST_READ: usize = 64 * 1024;
