//! A permitted request's exchange with its upstream.

use super::super::upstream::{Connection, Server, receive_buffer};
use super::super::{Context, Proxy};
use super::answer::{self, Plain};
use super::client::{self, Client};
use super::odd::OddAnswer;
use super::{Passed, PlainRequest};
use bytes::{BufMut as _, BytesMut};
use http::StatusCode;
use pingora::proxy::Session;
use pingora::{Error, ErrorSource, ErrorType};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::Instant;

/// What must be known of a plain answer, once its head is written to the client.
#[derive(Clone, Copy, Debug)]
struct Framing {
    status: StatusCode,
    /// Of the upstream's head, in bytes.
    head_bytes: usize,
    /// Of the body, in bytes.
    length: u64,
    /// The server keeps the connection.
    keeps: bool,
}

impl Proxy {
    /// Passes a permitted request on, and its answer back.
    ///
    /// # Errors
    /// As Pingora's own way would fail.
    pub(super) async fn pass_directly(
        &self,
        session: &mut Session,
        client: &mut Client,
        request: &PlainRequest,
        context: &mut Context,
    ) -> pingora::Result<Passed> {
        if context.passed_on.is_some() {
            return Ok(Passed::Undone);
        }
        let Some(first) = self.next_server(context) else {
            return Ok(Passed::Undone);
        };
        let started = self.0.clock.now();
        context.upstream_started = Some(started);
        let body = request.body(&mut client.guard).await?;
        // A body may have taken its time.
        let now = if request.has_body() {
            self.0.clock.now()
        } else {
            started
        };
        let pooled = first.take(now.elapsed_ns);
        let asked = self.ask_servers(session, client, context, first, pooled, &body).await?;
        let (server, connection) = asked;
        context.upstream_answered = Some(self.0.clock.now());
        let mut out = BytesMut::with_capacity(client::ROOM);
        match self.write_plain_head(&connection.buffer, context, client.keeps, &mut out) {
            Some(framing) => {
                let passed = self.pass_back(client, context, &server, connection, framing, out);
                passed.await.map(|()| Passed::Answered)
            }
            None => Ok(Passed::Oddly(OddAnswer {
                server,
                connection,
                body,
            })),
        }
    }

    /// The server for the next try, if its upstream can be reached this way.
    fn next_server(&self, context: &mut Context) -> Option<Arc<Server>> {
        let name = context.permit.as_ref()?.upstream();
        let compiled = self.0.compiled.load();
        compiled.upstreams.next_plain(name, &mut context.attempts)
    }

    /// Sends the request to `server`, and to others where nothing of it can have had an effect. Returns the server that
    /// answers, and the connection with the first bytes of its answer in the buffer.
    async fn ask_servers(
        &self,
        session: &mut Session,
        client: &mut Client,
        context: &mut Context,
        mut server: Arc<Server>,
        mut pooled: Option<Connection>,
        body: &[u8],
    ) -> pingora::Result<(Arc<Server>, Connection)> {
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
                    match ask(&mut connection, client, &server).await? {
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

    /// Writes the head of what was read as it goes to the client. `None`, and nothing is written, where it is not plain.
    fn write_plain_head(&self, read: &[u8], context: &Context, keeps: bool, out: &mut BytesMut) -> Option<Framing> {
        let mut room = answer::room();
        let plain = Plain::of(read, &mut room)?;
        client::write_status(plain.status, plain.reason, out);
        self.write_fields(&plain, context, out);
        client::write_end(keeps, out);
        Some(Framing {
            status: plain.status,
            head_bytes: plain.head_bytes,
            length: plain.length,
            keeps: plain.keeps,
        })
    }

    /// Passes a plain answer on, of which some has come with its head; `piece` is that head for the client.
    async fn pass_back(
        &self,
        client: &mut Client,
        context: &mut Context,
        server: &Server,
        mut connection: Connection,
        framing: Framing,
        mut piece: BytesMut,
    ) -> pingora::Result<()> {
        // When the last piece came; not known before the clock is read.
        let mut came = context.upstream_answered;
        let mut left = framing.length;
        let come = &connection.buffer[framing.head_bytes..];
        let mut taken = left.min(come.len() as u64) as usize;
        let mut is_surplus = come.len() > taken;
        piece.put_slice(&come[..taken]);
        loop {
            left -= taken as u64;
            if left == 0 {
                let now = came.unwrap_or_else(|| self.0.clock.now());
                context.upstream_ended = Some(now);
                // Not where more has come than was announced, or the server goes.
                connection.is_sound &= framing.keeps && !is_surplus;
                // Before the client has its answer, which may take a while.
                server.put(connection, now.elapsed_ns);
                return client.send(framing.status, &piece, taken).await;
            }
            client.send(framing.status, &piece, taken).await?;
            connection.buffer = BytesMut::with_capacity(usize::try_from(left).unwrap_or(usize::MAX).min(MOST_READ));
            if read_some(&mut connection, client, server.timeouts().read).await? == 0 {
                return Err(Error::explain(ErrorType::ConnectionClosed, "in the middle of a response").into_up());
            }
            came = None;
            piece = std::mem::take(&mut connection.buffer);
            taken = left.min(piece.len() as u64) as usize;
            is_surplus = piece.len() > taken;
            piece.truncate(taken);
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
async fn ask(connection: &mut Connection, client: &mut Client, server: &Server) -> pingora::Result<Asked> {
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
    match read_some(connection, client, timeouts.read).await {
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
async fn read_some(connection: &mut Connection, client: &mut Client, patience: Duration) -> pingora::Result<usize> {
    let deadline = Instant::now() + patience;
    tokio::select! {
        biased;
        read = connection.stream.read_buf(&mut connection.buffer) => {
            read.map_err(|error| Error::because(ErrorType::ReadError, "while reading a response", error).into_up())
        }
        () = connection.timer.until(deadline) => {
            Err(Error::explain(ErrorType::ReadTimedout, "while reading a response").into_up())
        }
        gone = client.gone() => Err(gone),
    }
}

/// For the head of a response and a short body, in bytes.
const ANSWER_ROOM: usize = 4096;
/// At once of a long body, in bytes.
const MOST_READ: usize = 64 * 1024;
