//! What is printed, and where: results and secrets on standard output, everything else on standard error.

use std::io::{self, IsTerminal, Write};

use serde_json::Value;

use super::Failure;

/// The two streams of this process.
pub struct Output {
    json: bool,
}

impl Output {
    pub fn new(json: bool) -> Self {
        Self { json }
    }

    /// Whether the person asked for JSON.
    pub fn is_json(&self) -> bool {
        self.json
    }

    /// Asks for JSON on behalf of a command with a format of its own.
    pub fn set_json(&mut self) {
        self.json = true;
    }

    /// Text as it is, to standard output.
    pub fn text(&self, text: &str) -> Result<(), Failure> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(text.as_bytes())?;
        if !text.ends_with('\n') {
            stdout.write_all(b"\n")?;
        }
        Ok(stdout.flush()?)
    }

    /// JSON to standard output.
    pub fn value(&self, value: &Value) -> Result<(), Failure> {
        let text = serde_json::to_string_pretty(value).map_err(|error| Failure::new(super::Exit::Failure, error))?;
        self.text(&text)
    }

    /// A remark for a person, to standard error; nothing with `--json`.
    pub fn remark(&self, text: &str) {
        if !self.json {
            // Ignored: a closed standard error is no reason to fail what has been done.
            let _ = writeln!(io::stderr(), "{text}");
        }
    }

    /// Why the command did not end well.
    pub fn failure(&self, failure: &Failure) {
        let mut stderr = io::stderr().lock();
        let _ = match (&failure.json, self.json) {
            (Some(value), true) => writeln!(stderr, "{value}"),
            (None, true) => writeln!(
                stderr,
                "{}",
                serde_json::json!({"success": false, "error": {"message": failure.message}})
            ),
            (_, false) if failure.exit == super::Exit::InvalidConfiguration => writeln!(stderr, "{}", failure.message),
            (_, false) => writeln!(stderr, "tollgate: {}", failure.message),
        };
    }

    /// A table with a heading, columns as wide as needed.
    pub fn table(&self, heading: &[&str], rows: &[Vec<String>]) -> Result<(), Failure> {
        let mut widths: Vec<usize> = heading.iter().map(|cell| cell.chars().count()).collect();
        for row in rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let mut text = String::new();
        let heading: Vec<String> = heading.iter().map(|cell| cell.to_uppercase()).collect();
        for row in std::iter::once(&heading).chain(rows) {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                let padding = width - cell.chars().count().min(*width);
                line.push_str(cell);
                line.push_str(&" ".repeat(padding + 2));
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        self.text(&text)
    }

    /// A record, one field a line; nested ones with their path.
    pub fn record(&self, value: &Value) -> Result<(), Failure> {
        let mut lines = Vec::new();
        flatten("", value, &mut lines);
        let width = lines.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        let mut text = String::new();
        for (name, value) in lines {
            text.push_str(&format!("{name:width$}  {value}\n"));
        }
        self.text(&text)
    }
}

/// Whether a progress bar would be seen, and would spoil nothing.
pub fn shows_progress() -> bool {
    io::stderr().is_terminal()
}

/// One value for a cell: `–` for nothing, names with commas for a list. Control characters are left out, so that
/// what others have written cannot steer the terminal.
pub fn cell(value: &Value) -> String {
    match value {
        Value::Null => "–".to_owned(),
        Value::String(text) => text.chars().filter(|c| !c.is_control()).collect(),
        Value::Array(items) if items.is_empty() => "–".to_owned(),
        Value::Array(items) => items.iter().map(cell).collect::<Vec<_>>().join(", "),
        Value::Object(fields) if fields.is_empty() => "–".to_owned(),
        other => other.to_string(),
    }
}

fn flatten(path: &str, value: &Value, lines: &mut Vec<(String, String)>) {
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (name, value) in fields {
                let path = if path.is_empty() {
                    name.clone()
                } else {
                    format!("{path}.{name}")
                };
                flatten(&path, value, lines);
            }
        }
        Value::Array(items) if items.iter().any(|item| item.is_object() || item.is_array()) => {
            for (index, item) in items.iter().enumerate() {
                flatten(&format!("{path}[{index}]"), item, lines);
            }
        }
        other => lines.push((path.to_owned(), cell(other))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_others_wrote_cannot_steer_the_terminal() {
        assert_eq!(cell(&json!("a\u{1b}[31mb\n")), "a[31mb");
    }

    #[test]
    fn records_are_flat() {
        let mut lines = Vec::new();
        flatten(
            "",
            &json!({"a": {"b": 1, "c": ["x", "y"]}, "d": [{"e": null}]}),
            &mut lines,
        );
        let expected = [("a.b", "1"), ("a.c", "x, y"), ("d[0].e", "–")];
        assert_eq!(lines, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
    }
}
