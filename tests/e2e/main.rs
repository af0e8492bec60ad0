//! End to end: the real binary, real sockets, keys from the real control plane.

mod auth;
mod harness;
mod life;
mod limits;
mod rotation;
mod secrets;
mod upstream;
