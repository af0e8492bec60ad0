//! A gate in a process of its own, which follows the control plane.

use super::TOKEN;
use super::program::{BINARY, Program, free_address};
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

/// Starts a gate that follows the control plane at `plane`, with the spool that lies in `home/gate`.
pub fn start(home: &Path, plane: &str, origin: SocketAddr) -> Program {
    let address = free_address();
    fs::write(home.join("feed.token"), TOKEN).expect("a directory of ours");
    let configuration = configured(home, plane, origin, address);
    Program::start(Command::new(BINARY), home, &configuration, address)
}

fn configured(home: &Path, plane: &str, origin: SocketAddr, address: SocketAddr) -> String {
    let home = home.display();
    format!(
        r#"version: 1
gate:
  name: gate-1
  threads: 2
  listen: [{{address: "{address}"}}]
  state_dir: {home}/gate
  feed: {{url: "{plane}", token_file: {home}/feed.token}}
keys: {{environments: {{live: {{prefix: pxk_live_, billed: true}}, test: {{prefix: pxk_test_, billed: false}}}}}}
scopes: ["permissions:check", "storage:read"]
tiers: {{default: {{limit: 1000000000, window: 1h}}}}
plans: {{starter: {{}}}}
upstreams: {{origin: {{servers: ["{origin}"]}}}}
routes:
  - {{name: things, match: {{path: "/v1/**"}}, scope: "storage:read", upstream: origin}}
admin: {{listen: "127.0.0.1:0"}}
log: {{level: info, access: off}}
"#
    )
}
