//! One bad file per mistake, each with its exact message beside it.
//!
//! `UPDATE_BAD_CONF=1 cargo test --test bad_conf` writes the messages anew, to be read before they are committed.

use std::path::{Path, PathBuf};

use tollgate::config;

/// The only variables that are set while these files are read.
fn env(name: &str) -> Option<String> {
    (name == "WORD").then(|| "wrong".to_owned())
}

fn bad_files() -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir("tests/bad_conf")
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "yaml"))
        .collect();
    files.sort();
    files
}

#[test]
fn every_mistake_has_its_message() {
    let files = bad_files();
    assert!(files.len() >= 60, "{} files", files.len());
    let mut wrong = Vec::new();
    for file in &files {
        let said = match config::load(file, &env) {
            Ok(_) => "no fault was found".to_owned(),
            Err(faults) => faults.to_string(),
        };
        let expected_path = file.with_extension("txt");
        if std::env::var_os("UPDATE_BAD_CONF").is_some() {
            std::fs::write(&expected_path, format!("{said}\n")).unwrap();
        }
        let expected = std::fs::read_to_string(&expected_path).unwrap_or_default();
        if format!("{said}\n") != expected {
            wrong.push(format!("{}\n  expected: {expected}  said:     {said}", file.display()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn one_mistake_is_told_once() {
    for file in bad_files() {
        let faults = config::load(&file, &env).unwrap_err().faults;
        let expected = if file.ends_with("ten_mistakes.yaml") { 10 } else { 1 };
        assert_eq!(faults.len(), expected, "{}: {faults:#?}", file.display());
    }
}

#[test]
fn faults_have_places_that_exist() {
    for file in bad_files() {
        let Ok(text) = std::fs::read_to_string(&file) else {
            continue;
        };
        for fault in config::load(&file, &env).unwrap_err().faults {
            if fault.line == 0 {
                continue;
            }
            // A fault of what is missing at the end may stand just behind the last line.
            let lines = text.lines().count();
            assert!(
                fault.line <= lines + 1 && fault.column >= 1,
                "{}: {fault:?}",
                file.display()
            );
        }
    }
}

#[test]
fn faults_have_a_form_for_programs() {
    let faults = config::load(Path::new("tests/bad_conf/limit_0.yaml"), &env).unwrap_err();
    let json = serde_json::to_value(&faults).unwrap();
    assert_eq!(
        json,
        serde_json::json!({"file": "tests/bad_conf/limit_0.yaml", "faults": [{
            "line": 7, "column": 20, "path": "tiers.default.limit", "message": "must be from 1 to 2147483647, found 0",
        }]})
    );
}

#[test]
fn files_that_cannot_be_read_say_why() {
    let said = |path: &str| config::load(Path::new(path), &env).unwrap_err().to_string();
    assert_eq!(
        said("tests/none.yaml"),
        "tests/none.yaml: cannot be read: no such file or directory"
    );
    assert_eq!(said("tests"), "tests: cannot be read: is a directory");
}

#[test]
fn a_secret_is_not_in_any_message() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("gate.yaml");
    let text = "version: 1\ngate: {listen: [{address: \"${CANARY}\"}], threads: \"${CANARY}\", feed: {url: \"${CANARY}\", token: \"${CANARY}\"}}\nupstreams: {a: {servers: [\"127.0.0.1:1\"]}}\ntiers: {default: {limit: 1, window: 1h}}\n";
    std::fs::write(&file, text).unwrap();
    let said = config::load(&file, &|name| (name == "CANARY").then(|| "canary value".to_owned()))
        .unwrap_err()
        .to_string();
    assert!(said.lines().count() >= 4, "{said}");
    assert!(!said.contains("canary"), "{said}");
}
