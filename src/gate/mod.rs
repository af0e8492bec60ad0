//! The gate.
pub mod limit;
pub mod window;
