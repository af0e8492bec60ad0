//! The atomics that the window is built on.
//!
//! They have a module of their own so that `tests/loom.rs` can compile the real `window.rs` against loom's.

pub use std::sync::atomic::{AtomicU64, Ordering};
