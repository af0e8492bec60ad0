//! The README's commands do what it says of them.

use crate::alone::Samples;
use crate::harness::{PATIENCE, Process, client};
use crate::origin::{Manner, Origin};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// The lines of the first block of code under a heading.
fn commands_under(heading: &str) -> Vec<String> {
    let readme = std::fs::read_to_string(Path::new(ROOT).join("README.md")).unwrap();
    let section = readme.split(heading).nth(1).unwrap_or_else(|| panic!("no {heading}"));
    let block = section.split("```\n").nth(1).unwrap();
    block.lines().map(str::to_owned).collect()
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

/// As a newcomer does it: in an empty directory, one line after the other. Only the ports differ, since others use them
/// while tests run; and what `make install` would install is the program under test.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_commands_protect_a_service_of_ones_own() {
    let commands = commands_under("## Protect a service of your own");
    let [install, init, keys, run, curl] = commands.as_slice() else {
        panic!("not five commands: {commands:#?}")
    };
    assert_eq!(install, "make install");
    let dry = Command::new("make")
        .args(["--dry-run", "install"])
        .current_dir(ROOT)
        .output()
        .unwrap();
    let dry = String::from_utf8(dry.stdout).unwrap();
    assert!(dry.contains("cargo install") && dry.contains("--path . "), "{dry}");

    let mine = Origin::start("my own service", Manner::Answers).await;
    let dir = tempfile::tempdir().unwrap();
    let (port, admin) = (free_port(), free_port());
    let path = format!(
        "{}:{}",
        Path::new(env!("CARGO_BIN_EXE_tollgate")).parent().unwrap().display(),
        std::env::var("PATH").unwrap()
    );
    let bash = |line: &str| {
        let line = line.replace("127.0.0.1:9000", &mine.address.to_string());
        let line = line.replace("127.0.0.1:8080", &format!("127.0.0.1:{port}"));
        let mut bash = Command::new("bash");
        bash.args(["-e", "-o", "pipefail", "-c"])
            .arg(line)
            .current_dir(dir.path())
            .env("PATH", &path);
        bash.env("LISTEN", format!("127.0.0.1:{port}"))
            .env("ADMIN", format!("127.0.0.1:{admin}"));
        bash.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        bash
    };
    let said = |line: &str| {
        let output = bash(line).output().unwrap();
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success(), "{line}: {text}");
        text
    };
    said(init);
    said(keys);
    // In the foreground, so that it can be ended.
    let foreground = run.strip_suffix(" &").expect("the gate runs beside the last command");
    let _gate = Process::new(
        bash(&format!("exec {foreground}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    let admin = format!("http://127.0.0.1:{admin}");
    let deadline = Instant::now() + PATIENCE;
    while !client()
        .get(format!("{admin}/readyz"))
        .send()
        .await
        .is_ok_and(|ready| ready.status() == 200)
    {
        assert!(Instant::now() < deadline, "the gate does not start");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let curl = curl.clone();
    let answer = tokio::task::block_in_place(|| said(&curl));
    assert!(
        answer.starts_with("HTTP/1.1 200 ") && answer.contains("my own service"),
        "{answer}"
    );
    assert!(
        answer.to_lowercase().contains("ratelimit: \"default\";r=999;"),
        "{answer}"
    );
    assert_eq!(mine.take_seen(), ["GET / HTTP/1.1"]);
    let without = client().get(format!("http://127.0.0.1:{port}/")).send().await.unwrap();
    assert_eq!(without.status(), 401, "as the README says");
    assert!(Samples::read(&client(), &admin).await.get("tollgate_snapshot_keys") == Some(1.0));
    let secret = std::fs::read_to_string(dir.path().join("my.key")).unwrap();
    let line = std::fs::read_to_string(dir.path().join("keys.ndjson")).unwrap();
    assert!(!line.contains(secret.trim()) && secret.len() > 40, "its digest only");
}
