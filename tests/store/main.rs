//! What a store must do, whatever engine it is on: one suite, run on SQLite and on PostgreSQL, one test after another and
//! all at once; and what only PostgreSQL can
//! show, among it several control planes at once.

#[allow(dead_code, reason = "each binary uses what it needs")]
#[path = "../support/postgres.rs"]
mod postgres;

mod command;
mod contract;
mod copy;
mod engines;
mod isolation;
mod parts;
mod replicas;
