//! A key file instead of a control plane.

use std::fs;
use std::path::Path;
use std::time::Duration;

use tollgate::feed::{LoadOutcome, Settings, Source};
use tollgate::wire::KeyLine;

use crate::{Running, eventually, key, keys, verdict};

fn settings(file: &Path) -> Settings {
    let mut settings = Settings::new("gate-1", Source::File(file.to_owned()), file.parent().unwrap());
    settings.file_poll = Duration::from_millis(10);
    settings.housekeeping = Duration::from_millis(10);
    settings
}

fn write(file: &Path, keys: &[KeyLine]) {
    let lines: String = keys
        .iter()
        .map(|key| serde_json::to_string(key).unwrap() + "\n")
        .collect();
    // Renamed into place, as version control does.
    let beside = file.with_extension("tmp");
    fs::write(&beside, lines).unwrap();
    fs::rename(beside, file).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn is_read_at_the_start_and_whenever_it_changes() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("keys.ndjson");
    write(&file, &[key(1), key(2)]);
    let running = Running::start(settings(&file));
    assert_eq!(running.gate.revision(), Some(1), "in force before anything runs");
    assert_eq!(verdict(&running.gate, &running.clock, 2), Ok(()));

    write(&file, &[key(1), key(3)]);
    running.revision(2).await;
    assert_eq!(
        keys(&running.gate),
        [("key_1".into(), false), ("key_3".into(), false)].into()
    );
    assert!(running.feed.status().connected);
    assert!(
        !directory.path().join("keys.spool").exists(),
        "the file is its own copy"
    );
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_line_refuses_the_whole_version_and_the_old_one_stays() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("keys.ndjson");
    write(&file, &[key(1)]);
    let running = Running::start(settings(&file));
    let good = serde_json::to_string(&key(2)).unwrap();
    for (text, reason) in [
        (
            format!("# a comment\n\n{good}\n{{\"id\":\"k\"}}\n"),
            "line 4: \"secrets\" is missing",
        ),
        (format!("{good}\nnonsense\n"), "line 2: not JSON (column 2)"),
        (format!("{good}\n{good}\n"), "line 2: key key_2 is on line 1 already"),
        (
            good[..good.len() / 2].to_owned(),
            &*format!("line 1: the line is cut off (column {})", good.len() / 2),
        ),
        (
            format!("{good}\n{}", "x".repeat(70_000)),
            "line 2: it has more than 65536 bytes",
        ),
        (
            format!("{good}\n{}", good.replace("key_2", "key_3")),
            "line 2: key key_3 has a secret that belongs to another key",
        ),
    ] {
        fs::write(&file, text).unwrap();
        let message = format!("its new version is refused, {reason}");
        eventually(reason, || running.feed.status().last_error.as_ref() == Some(&message)).await;
        assert_eq!(keys(&running.gate), [("key_1".into(), false)].into());
        assert!(!running.feed.status().connected);
    }
    assert_eq!(running.gate.revision(), Some(1));
    write(&file, &[key(1), key(2)]);
    running.revision(2).await;
    assert_eq!(running.feed.status().last_error, None);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn may_come_late_and_go_again() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("keys.ndjson");
    let running = Running::start(settings(&file));
    assert_eq!(running.feed.load(), LoadOutcome::Missing);
    assert!(!running.gate.is_ready());
    // What has a default is left out.
    let sha256 = &key(5).secrets[0].sha256;
    let line = format!("{{\"id\":\"key_5\",\"environment\":\"live\",\"secrets\":[{{\"sha256\":\"{sha256}\"}}]}}");
    fs::write(&file, line).unwrap();
    running.revision(1).await;
    assert_eq!(verdict(&running.gate, &running.clock, 5), Ok(()));
    fs::remove_file(&file).unwrap();
    eventually("the loss", || !running.feed.status().connected).await;
    assert_eq!(
        running.feed.status().last_error.as_deref(),
        Some("there is no such file")
    );
    assert_eq!(verdict(&running.gate, &running.clock, 5), Ok(()), "served on");
    write(&file, &[]);
    running.revision(2).await;
    assert_eq!(running.gate.key_count(), 0, "an empty file is meant");
}
