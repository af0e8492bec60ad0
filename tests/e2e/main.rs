//! End to end: the real binary, real sockets, keys from the real control plane.

mod alone;
mod auth;
mod between;
mod certificates;
mod crashes;
mod effect;
mod fleet;
mod harness;
mod ledger;
mod life;
mod limits;
mod metrics;
mod operator;
mod origin;
mod readme;
mod rotation;
mod schemathesis;
mod secrets;
mod tls;
mod upstream;
mod upstreams;
