//! schemathesis against the served OpenAPI document: as a tenant with another tenant's ids in its pool, in a session, as
//! the operator and as a gate.

use crate::fleet::{ADMIN_TOKEN, FEED_TOKEN, Fleet, size};
use std::path::Path;
use std::process::Command;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn schemathesis_finds_no_fault_and_nothing_foreign() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let tools = root.join("target/tools/bin");
    let schemathesis = tools.join("schemathesis");
    assert!(
        schemathesis.exists(),
        "{} is not there: `make install-test` installs it",
        schemathesis.display()
    );
    let fleet = Fleet::new().await;
    let control = fleet.control();
    let examples = size(100, 4).to_string();
    let run = Command::new(tools.join("python"))
        .arg(root.join("tests/schemathesis/run.py"))
        .arg(&control.url)
        .arg("--schemathesis")
        .arg(schemathesis)
        .arg("--admin-token-file")
        .arg(fleet.path().join("admin.token"))
        .arg("--feed-token-file")
        .arg(fleet.path().join("feed.token"))
        .args(["--examples", &examples])
        // Whatever it writes beside the tests, it writes here.
        .current_dir(fleet.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&run.stdout);
    println!("{said}");
    assert!(run.status.success(), "{said}\n{}", String::from_utf8_lossy(&run.stderr));
    assert!(said.contains("all roles passed"));
    let log = fleet.log("control");
    assert!(!log.contains("panicked") && !log.contains("ERROR"), "{log}");
    assert!(!log.contains(ADMIN_TOKEN) && !log.contains(FEED_TOKEN));
}
