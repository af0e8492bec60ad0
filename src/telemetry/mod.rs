//! What one sees from outside: logs, metrics, health.

pub mod admin;
pub mod logs;
pub mod metrics;
pub mod process;
