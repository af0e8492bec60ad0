//! The control plane over a real socket, with a moved clock.

mod accounts;
mod durability;
mod feed;
mod harness;
mod keys;
mod ledger;
mod routes;
