//! The control plane over a real socket, with a moved clock. What does not depend on the engine is asserted on each.

#[macro_use]
mod harness;
#[allow(dead_code, reason = "each binary uses what it needs")]
#[path = "../support/postgres.rs"]
mod postgres;

mod accounts;
mod durability;
mod feed;
mod keys;
mod ledger;
mod pages;
mod rotation;
mod routes;
