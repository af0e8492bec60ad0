//! `tollgate migrate` on PostgreSQL, as a person types it.

use std::path::Path;
use std::process::{Command, Output};

use crate::parts::{Place, create, register};
use crate::postgres::Postgres;

fn migrate(directory: &Path, args: &[&str]) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = Command::new(env!("CARGO_BIN_EXE_tollgate"))
        .arg("migrate")
        .args(args)
        .args(["-c", "control.yaml"])
        .current_dir(directory)
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code(), text(stdout), text(stderr))
}

#[tokio::test]
async fn a_database_is_made_filled_and_looked_at_by_commands() {
    let server = Postgres::start();
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(directory.path().join(name), text).unwrap();
    write("feed.token", "feed-token-of-the-tests\n");
    write("admin.token", "admin-token-of-the-tests\n");
    let url = server.database();
    let config = format!(
        "version: 1\nscopes: [things:read]\ntiers: {{default: {{limit: 10, window: 1h}}}}\ncontrol: {{listen: \"127.0.0.1:0\", \
         database: \"{url}\", feed_token_file: feed.token, admin_token_file: admin.token}}\n"
    );
    write("control.yaml", &config);
    let run = |args: &[&str]| migrate(directory.path(), args);

    let (exit, said, why) = run(&["status"]);
    assert_eq!((exit, why.as_str()), (Some(0), ""), "{said}");
    assert!(said.contains("begin") && said.contains("missing"), "{said}");
    let (exit, said, why) = run(&["up"]);
    assert_eq!((exit, why.as_str()), (Some(0), ""), "{said}");
    assert!(said.contains("applied") && !said.contains("missing"), "{said}");
    let (exit, said, why) = run(&["backup", "copy.db"]);
    assert_eq!((exit, said.as_str()), (Some(1), ""));
    assert!(why.contains("pg_dump --format=custom --file=copy.db"), "{why}");

    let old = Place::open(format!("sqlite://{}", directory.path().join("old.db").display())).await;
    register(&*old.store, "acme").await;
    create(&*old.store, "org_acme", "k001").await.unwrap();
    drop(old);
    let (exit, said, why) = run(&["copy", "--from", "old.db"]);
    assert_eq!(
        (exit, why.as_str()),
        (Some(0), ""),
        "no bar where there is no terminal: {said}"
    );
    assert!(
        said.starts_with("TABLE") && said.ends_with("Copied, read back, and found the same.\n"),
        "{said}"
    );
    assert!(
        said.lines()
            .any(|line| line.starts_with("keys ") && line.contains(" 1 ")),
        "{said}"
    );
    let new = Place::open(url).await;
    assert!(new.store.key(None, "key_k001").await.unwrap().is_some());

    let (exit, said, why) = run(&["copy", "--from", "old.db"]);
    assert_eq!((exit, said.as_str()), (Some(1), ""));
    assert!(why.contains("not empty"), "{why}");
    let (exit, _, why) = run(&["copy", "--from", "other.db"]);
    assert_eq!(exit, Some(1));
    assert!(why.contains("there is no database other.db"), "{why}");
}
