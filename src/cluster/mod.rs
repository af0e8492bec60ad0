//! Counts that several gates share, through a store, by reservation. See `protocol.rs` first.
//!
//! | file | what it is |
//! |---|---|
//! | [`protocol`] | what is said, and why that keeps the limit |
//! | `ledger` | one window at this gate |
//! | `windows` | all of them, and when each is to be looked at |
//! | `link` | the way to the store: whether it leads anywhere, and since when the store is lost |
//! | `members` | who shares the limits, and what the store knows of them |
//! | [`coordinator`] | this gate's side, whole; no I/O, no clock |
//! | `client` | what runs: batches to and from the store, requests that wait |
//! | [`store`], [`valkey`], [`memory`] | what counts are kept in: the trait, Valkey or Redis, a value |

mod client;
pub mod coordinator;
mod ledger;
mod link;
mod members;
pub mod memory;
pub mod protocol;
pub mod store;
pub mod valkey;
mod windows;

pub use client::{Cluster, Status};
