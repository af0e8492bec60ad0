//! What is written to the client, and what is read of it beside its request.

use super::super::guard::Guard;
use super::super::recording::Answered;
use super::super::response::{X_REQUEST_ID, is_rate_limit, rate_limit_fields};
use super::super::{Context, DRAIN_DEADLINE, Proxy};
use super::answer::Plain;
use crate::gate::Permit;
use bytes::{BufMut as _, BytesMut};
use http::StatusCode;
use pingora::http::ResponseHeader;
use pingora::protocols::Shutdown;
use pingora::protocols::http::date::get_cached_date;
use pingora::{Error, ErrorType};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

impl Proxy {
    /// Writes the fields of an upstream's answer, and those that tell the client its request's id and what is left of its
    /// limit.
    pub(super) fn write_fields(&self, plain: &Plain<'_>, context: &Context, out: &mut BytesMut) {
        let compiled = self.0.compiled.load();
        let rate = context.permit.as_ref().and_then(Permit::rate);
        let request_id = context.request_id.as_ref();
        let is_replaced = |name: &[u8]| match name.len() {
            4 => name.eq_ignore_ascii_case(b"date"),
            10 => name.eq_ignore_ascii_case(b"connection"),
            12 if request_id.is_some() => name.eq_ignore_ascii_case(X_REQUEST_ID.as_str().as_bytes()),
            _ => rate.is_some() && is_rate_limit(&compiled.response, name),
        };
        for field in plain.fields {
            if !is_replaced(field.name.as_bytes()) {
                write_field(field.name, field.value, out);
            }
        }
        if let Some(request_id) = request_id {
            write_field(X_REQUEST_ID.as_str(), request_id.as_bytes(), out);
        }
        if let Some(rate) = rate {
            rate_limit_fields(&compiled.response, rate, |name, value| {
                out.put_slice(name.as_str().as_bytes());
                out.put_slice(b": ");
                value.write_to(out);
                out.put_slice(b"\r\n");
            });
        }
    }
}

/// Writes a head of our own.
pub(super) fn write_head(head: &ResponseHeader, keeps: bool, out: &mut BytesMut) {
    write_status(head.status, head.get_reason_phrase().unwrap_or_default(), out);
    head.header_to_h1_wire(out);
    write_end(keeps, out);
}

/// Writes a status line.
pub(super) fn write_status(status: StatusCode, reason: &str, out: &mut BytesMut) {
    out.put_slice(b"HTTP/1.1 ");
    out.put_slice(status.as_str().as_bytes());
    out.put_u8(b' ');
    out.put_slice(reason.as_bytes());
    out.put_slice(b"\r\n");
}

fn write_field(name: &str, value: &[u8], out: &mut BytesMut) {
    out.put_slice(name.as_bytes());
    out.put_slice(b": ");
    out.put_slice(value);
    out.put_slice(b"\r\n");
}

/// Writes the last fields, as Pingora does on its way, and the head's end.
pub(super) fn write_end(keeps: bool, out: &mut BytesMut) {
    write_field("Date", get_cached_date().as_bytes(), out);
    out.put_slice(match keeps {
        true => b"Connection: keep-alive\r\n\r\n",
        false => b"Connection: close\r\n\r\n",
    });
}

/// The client of one request.
pub(super) struct Client {
    pub guard: Box<Guard>,
    pub answered: Answered,
    /// Something of the answer is on its way, whether or not it arrives.
    pub is_begun: bool,
    /// It is told that its connection stays.
    pub keeps: bool,
    /// The connection ends in the middle of the answer, or without one.
    pub is_cut: bool,
}

impl Client {
    pub fn new(guard: Box<Guard>, keeps: bool) -> Self {
        Client {
            guard,
            answered: Answered::default(),
            is_begun: false,
            keeps,
            is_cut: false,
        }
    }

    /// Sends a part of the answer, of which so many bytes are of its body.
    ///
    /// # Errors
    /// `WriteError`: the client is gone, or takes it too slowly.
    pub async fn send(&mut self, status: StatusCode, bytes: &[u8], of_body: usize) -> pingora::Result<()> {
        self.is_begun = true;
        let sent = async {
            self.guard.write_all(bytes).await?;
            self.guard.flush().await
        };
        sent.await
            .map_err(|error| Error::because(ErrorType::WriteError, "while answering the client", error).into_down())?;
        self.answered.status = status.as_u16();
        self.answered.body_bytes += of_body;
        Ok(())
    }

    /// Waits until the client goes away in the middle of an exchange.
    pub async fn gone(&mut self) -> Box<Error> {
        // What it sends next waits in the guard for its turn: only the end is read here.
        match self.guard.read(&mut [0]).await {
            Err(error) => Error::because(ErrorType::ReadError, "while the client waits", error).into_down(),
            Ok(_) => Error::explain(ErrorType::ConnectionClosed, "the client has left").into_down(),
        }
    }

    /// Ends the exchange. Returns the connection, if it can carry another.
    pub async fn end(mut self) -> Option<Box<Guard>> {
        if self.is_cut {
            return None;
        }
        if self.keeps && self.read_to_the_end().await {
            return Some(self.guard);
        }
        Shutdown::shutdown(&mut *self.guard).await;
        None
    }

    /// Reads the rest of a body that nobody wants, so that the connection stays usable. `false`: it does not come in
    /// time, or the client has left.
    async fn read_to_the_end(&mut self) -> bool {
        if self.guard.is_reusable() {
            return true;
        }
        let rest = async {
            let mut rest = BytesMut::with_capacity(ROOM);
            while matches!(self.guard.read_buf(&mut rest).await, Ok(1..)) {
                if self.guard.is_reusable() {
                    return true;
                }
                rest.clear();
            }
            false
        };
        tokio::time::timeout(DRAIN_DEADLINE, rest).await.unwrap_or(false)
    }
}

/// For the lines of a usual head and a short body, in bytes.
pub(super) const ROOM: usize = 1024;
