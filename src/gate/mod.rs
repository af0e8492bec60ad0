//! The gate.
pub mod limit;
mod sync;
pub mod window;
