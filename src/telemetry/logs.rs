//! The process's log: one line an event, text or JSON, at a level that can be changed while it runs.

use log::kv::{self, VisitSource};
use log::{LevelFilter, Log, Metadata, Record};
use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Mutex;

/// Settings of the log.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What is logged of our own; libraries are kept one level quieter than that, and never below `warn`.
    pub level: LevelFilter,
    /// One JSON object a line instead of text.
    pub json: bool,
    /// Where lines go; `None`: standard error.
    pub path: Option<PathBuf>,
}

/// Starts logging for the whole process. Called once.
///
/// # Errors
/// Where the file cannot be opened, or a logger is in place already.
pub fn start(settings: &Settings) -> io::Result<()> {
    let file = match &settings.path {
        Some(path) => Some(Mutex::new(OpenOptions::new().create(true).append(true).open(path)?)),
        None => None,
    };
    log::set_boxed_logger(Box::new(Logger {
        json: settings.json,
        file,
    }))
    .map_err(io::Error::other)?;
    log::set_max_level(settings.level);
    Ok(())
}

/// Changes the level from now on.
pub fn set_level(level: LevelFilter) {
    log::set_max_level(level);
}

struct Logger {
    json: bool,
    file: Option<Mutex<File>>,
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // At `trace`, libraries print what they read from the wire, and that holds keys and passwords.
        let ours = metadata.target().starts_with("tollgate");
        ours || metadata.level() <= LevelFilter::Warn
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let line = if self.json { json(record) } else { text(record) };
        // A log that cannot be written has nowhere to say so.
        let _ = match &self.file {
            Some(file) => file
                .lock()
                .unwrap_or_else(|e| e.into_inner())
                .write_all(line.as_bytes()),
            None => io::stderr().lock().write_all(line.as_bytes()),
        };
    }

    fn flush(&self) {}
}

fn json(record: &Record<'_>) -> String {
    let mut line = serde_json::json!({
        "time": format!("{:.3}", jiff::Timestamp::now()),
        "level": record.level().as_str().to_ascii_lowercase(),
        "target": record.target(),
        "message": record.args().to_string(),
    });
    each_pair(record, |key, value| line[key] = value.into());
    format!("{line}\n")
}

fn text(record: &Record<'_>) -> String {
    let mut line = format!("{:.3} {:5} {}", jiff::Timestamp::now(), record.level(), record.args());
    each_pair(record, |key, value| {
        let _ = write!(line, " {key}={value}");
    });
    // One event, one line: what came from outside must not look like an event of its own.
    let mut line = line.replace(['\n', '\r'], " ");
    line.push('\n');
    line
}

fn each_pair(record: &Record<'_>, each: impl FnMut(&str, String)) {
    struct Visitor<F>(F);
    impl<'kvs, F: FnMut(&str, String)> VisitSource<'kvs> for Visitor<F> {
        fn visit_pair(&mut self, key: kv::Key<'kvs>, value: kv::Value<'kvs>) -> Result<(), kv::Error> {
            (self.0)(key.as_str(), value.to_string());
            Ok(())
        }
    }
    // The visitor never fails.
    let _ = record.key_values().visit(&mut Visitor(each));
}
