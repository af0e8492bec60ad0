//! End to end: the real binary, real sockets, keys from the real control plane.

mod access_log;
mod alone;
mod auth;
mod between;
mod certificates;
mod crashes;
mod effect;
mod fleet;
mod gate;
mod harness;
mod journal;
mod ledger;
mod life;
mod limits;
mod load;
mod metrics;
mod operator;
mod origin;
mod readme;
mod rotation;
mod schemathesis;
mod secrets;
mod tls;
mod upgrade;
mod upstream;
mod upstreams;
