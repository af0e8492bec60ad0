//! Tollgate: the front door of an HTTP API.
//!
//! The map of the house. Imports go one way, top to bottom; siblings do not import each other, [`app`] wires them.
//!
//! | module | what it is |
//! |---|---|
//! | [`cli`] | words from a person → calls |
//! | [`app`] | the composition root: configuration → running services |
//! | [`proxy`], [`feed`], [`meter`], [`cluster`], [`control`], [`config`], [`telemetry`] | the parts, each with its own `Settings` |
//! | [`gate`] | the decision: synchronous, no I/O, no allocation, knows no HTTP server |
//! | [`clock`], `courtesy`, `huge_pages`, [`wire`], [`tls`] | time as a value; long work that gives way to requests; memory for tables; what gates and control plane say to each other; certificates from files |
//!
//! Chapters of the manual: [`architecture`] is how it fits together, [`limits`] what a limit promises, [`embedding`] for
//! services that want the gate alone, [`control_plane`] (SQLite or PostgreSQL, replicas, backup), [`running_many_gates`], [`operations`], [`metrics`],
//! [`security`], [`strict_edge`] (what is refused, and why).
#![forbid(unsafe_code)]

pub mod app;
#[doc = include_str!("manual/architecture.md")]
pub mod architecture {}
pub mod cli;
pub mod clock;
pub mod cluster;
pub mod config;
pub mod control;
#[doc = include_str!("manual/control-plane.md")]
pub mod control_plane {}
mod courtesy;
#[doc = include_str!("manual/embedding.md")]
pub mod embedding {}
pub mod feed;
pub mod gate;
mod huge_pages;
#[doc = include_str!("manual/limits.md")]
pub mod limits {}
pub mod meter;
#[doc = include_str!("manual/metrics.md")]
pub mod metrics {}
#[doc = include_str!("manual/operations.md")]
pub mod operations {}
#[doc = include_str!("manual/performance.md")]
pub mod performance {}
pub mod proxy;
#[doc = include_str!("manual/cluster.md")]
pub mod running_many_gates {}
#[doc = include_str!("manual/security.md")]
pub mod security {}
#[doc = include_str!("manual/edge.md")]
pub mod strict_edge {}
pub mod telemetry;
pub mod tls;
pub mod wire;
