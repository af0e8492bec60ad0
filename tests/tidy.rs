//! The house rules that a compiler does not check: which way imports go, and that what is written is in step.

use std::fs;
use std::path::{Path, PathBuf};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Lower rooms know nothing of higher ones; rooms of one floor do not know each other.
const FLOORS: [&[&str]; 5] = [
    &["cli"],
    &["app"],
    &["proxy", "feed", "meter", "cluster", "control", "config", "telemetry"],
    &["gate"],
    &["clock", "tls", "wire"],
];

#[test]
fn imports_go_one_way() {
    let floor = |room: &str| FLOORS.iter().position(|rooms| rooms.contains(&room));
    let mut checked = 0;
    for file in sources("src") {
        let inside = file.strip_prefix(Path::new(ROOT).join("src")).unwrap();
        let first = inside.iter().next().unwrap().to_str().unwrap();
        let room = first.strip_suffix(".rs").unwrap_or(first);
        let Some(own) = floor(room) else { continue };
        for (number, line) in fs::read_to_string(&file).unwrap().lines().enumerate() {
            // What a comment points to is no import.
            let code = line.split("//").next().unwrap_or_default();
            for imported in rooms_named(code) {
                let Some(other) = floor(imported) else { continue };
                checked += 1;
                let fine = imported == room || other > own;
                assert!(
                    fine,
                    "{}:{}: `{room}` imports `{imported}`",
                    inside.display(),
                    number + 1
                );
            }
        }
    }
    assert!(checked > 50, "only {checked} imports were seen");
}

/// The rooms that a line names as `crate::ROOM` or `crate::{ROOM, …}`.
fn rooms_named(line: &str) -> Vec<&str> {
    let mut rooms = vec![];
    for rest in line.split("crate::").skip(1) {
        let names = rest.strip_prefix('{').map_or(rest, |list| list);
        let parts = if rest.starts_with('{') {
            names.split(',').collect()
        } else {
            vec![names]
        };
        for part in parts {
            let name = part
                .trim()
                .split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
                .next()
                .unwrap_or_default();
            rooms.push(name);
        }
    }
    rooms
}

#[test]
fn the_gate_knows_no_server_and_does_no_io() {
    for file in sources("src/gate") {
        let text = fs::read_to_string(&file).unwrap();
        for banned in ["pingora::", "tokio", "std::fs", "std::net::Tcp", "async fn", ".await"] {
            assert!(!text.contains(banned), "{} has {banned}", file.display());
        }
    }
}

#[test]
fn nothing_unfinished_is_left_behind() {
    for file in sources("src") {
        let text = fs::read_to_string(&file).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap();
        let inside = file.strip_prefix(Path::new(ROOT).join("src")).unwrap();
        if file.ends_with("tests.rs") || inside.iter().any(|room| room == "tests") {
            continue;
        }
        for banned in ["todo!(", "unimplemented!(", "dbg!(", ".unwrap()", "TODO", "FIXME"] {
            assert!(!code.contains(banned), "{} has {banned}", file.display());
        }
    }
}

#[test]
fn the_page_of_metrics_is_in_step_with_their_descriptions() {
    let path = Path::new(ROOT).join("src/manual/metrics.md");
    let page = tollgate::app::metrics_reference();
    if std::env::var_os("UPDATE_MANUAL").is_some() {
        fs::write(&path, &page).unwrap();
    }
    assert!(
        fs::read_to_string(&path).unwrap_or_default() == page,
        "src/manual/metrics.md is old: UPDATE_MANUAL=1 cargo test --test tidy writes it anew"
    );
}

#[test]
fn the_readme_names_files_and_commands_that_exist() {
    let readme = fs::read_to_string(Path::new(ROOT).join("README.md")).unwrap();
    let mut named = 0;
    for word in readme.split(|c: char| c.is_whitespace() || "`()[]".contains(c)) {
        let is_path = ["src/", "conf/", "tests/", "benches/", "systemd/", "fuzz/"]
            .iter()
            .any(|dir| word.starts_with(dir));
        if is_path && !word.contains('*') {
            named += 1;
            assert!(
                Path::new(ROOT).join(word.trim_end_matches(['.', ',', ':'])).exists(),
                "README.md names {word}"
            );
        }
    }
    assert!(named > 3, "only {named} paths");
    let makefile = fs::read_to_string(Path::new(ROOT).join("Makefile")).unwrap();
    for command in readme.lines().filter_map(|line| line.trim().strip_prefix("make ")) {
        let target = command.split_whitespace().next().unwrap();
        assert!(
            makefile.contains(&format!("\n{target}:")),
            "README.md names `make {target}`"
        );
    }
}

fn sources(dir: &str) -> Vec<PathBuf> {
    let mut found = vec![];
    let mut dirs = vec![Path::new(ROOT).join(dir)];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    assert!(!found.is_empty(), "{dir}");
    found
}
