//! End to end: the real binary, real sockets, keys from the real control plane.

mod alone;
mod auth;
mod certificates;
mod harness;
mod life;
mod limits;
mod metrics;
mod operator;
mod origin;
mod readme;
mod rotation;
mod secrets;
mod tls;
mod upstream;
mod upstreams;
