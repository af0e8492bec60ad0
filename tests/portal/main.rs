//! The portal: in headless Chromium against the real binary, and as plain HTTP, the way a browser without
//! JavaScript uses it.

mod browser;
mod flow;
mod plain;
mod plane;
mod program;
mod screens;
