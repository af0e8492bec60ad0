//! The strict edge over real sockets: what is refused, what is forwarded, and what becomes of the connection.

mod harness;
mod http1;
