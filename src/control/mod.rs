//! The control plane: issues, rotates and revokes keys, tells the gates, keeps the ledger.
//!
//! | module | what it is |
//! |---|---|
//! | `model` | what it speaks of; knows neither HTTP nor SQL |
//! | `service` | the rules |
//! | `store` | one trait per subject, and its implementations |
//! | `api` | HTTP: one file per resource, one file that turns faults into answers |
//! | `portal` | pages for people |
//! | `serve` | connections, their number and their deadlines |
//! | `feed_server`, `hub` | what gates follow, and who they are |
//!
//! It never imports the gate: the two meet in [`crate::wire`] only.

mod api;
mod feed_server;
mod hub;
pub mod model;
mod password;
mod plane;
mod portal;
mod secret;
mod serve;
mod service;
mod settings;
pub mod store;
mod throttle;
mod time;

pub use plane::{ControlError, ControlPlane, DevKey, backup, copy, migrate, migration_states};
pub use settings::{Environment, Network, Plan, Registration, Retention, Scope, Settings, Tier};
pub use store::MigrationState;
pub use store::copy::{Copied, Progress};
