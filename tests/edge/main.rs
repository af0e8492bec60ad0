//! The strict edge over real sockets: what is refused, what is forwarded, and what becomes of the connection.

mod answers;
mod differential;
mod exchanges;
mod h2raw;
mod harness;
mod hostile;
mod http1;
mod http2;
mod httpwg;
mod slow;
mod table;
mod ways;
