//! The configuration file: read, checked whole, and resolved to plain data.
//!
//! `tree` (YAML with positions) → `file` (serde shapes, the schema) → `check` (the tree against the schema, every fault)
//! → `resolve` (names, ranges, combinations, every fault) → [`Config`], which needs no further checking.

mod settings;

pub use settings::*;
