//! `${VARIABLE}`, `${VARIABLE:-default}` and `${file:/path}` in the scalars of a parsed file.
//!
//! Replacing after parsing means that no value can change the structure of the file. `$${` stands for `${`.

use std::io::Read;
use std::path::Path as FilePath;

use super::fault::{Fault, Path};
use super::tree::{Node, Value};

/// What a file with a secret or a setting may hold at most.
const MAX_FILE_BYTES: u64 = 64 * 1024;

/// Replaces every `${…}` below `node`. Each that cannot be replaced is a fault; its scalar is left alone, and named in `faulty`.
pub(super) fn expand(
    node: &mut Node,
    path: &Path,
    base: &FilePath,
    env: &dyn Fn(&str) -> Option<String>,
    faults: &mut Vec<Fault>,
    faulty: &mut Vec<Path>,
) {
    match &mut node.value {
        Value::List(items) => {
            for (index, item) in items.iter_mut().enumerate() {
                expand(item, &path.index(index), base, env, faults, faulty);
            }
        }
        Value::Mapping(entries) => {
            for entry in entries {
                expand(&mut entry.value, &path.key(&entry.key), base, env, faults, faulty);
            }
        }
        Value::Scalar(scalar) if scalar.text.contains("${") => match expand_text(&scalar.text, base, env) {
            Ok(text) => scalar.written = Some(std::mem::replace(&mut scalar.text, text)),
            Err(message) => {
                faulty.push(path.clone());
                let (line, column) = (node.at.line, node.at.column);
                faults.push(Fault {
                    line,
                    column,
                    path: path.as_str().to_owned(),
                    message,
                });
            }
        },
        Value::Scalar(_) => {}
    }
}

fn expand_text(text: &str, base: &FilePath, env: &dyn Fn(&str) -> Option<String>) -> Result<String, String> {
    let mut expanded = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find("${") {
        if let Some(before) = rest[..start].strip_suffix('$') {
            expanded.push_str(before);
            expanded.push_str("${");
            rest = &rest[start + 2..];
            continue;
        }
        expanded.push_str(&rest[..start]);
        let Some(length) = rest[start..].find('}') else {
            return Err("\"${\" without its \"}\"; write $${ for the characters themselves".to_owned());
        };
        expanded.push_str(&replacement(&rest[start + 2..start + length], base, env)?);
        rest = &rest[start + length + 1..];
    }
    expanded.push_str(rest);
    Ok(expanded)
}

fn replacement(inside: &str, base: &FilePath, env: &dyn Fn(&str) -> Option<String>) -> Result<String, String> {
    if let Some(file) = inside.strip_prefix("file:") {
        return read_trimmed(&base.join(file));
    }
    let (name, default) = match inside.split_once(":-") {
        Some((name, default)) => (name, Some(default)),
        None => (inside, None),
    };
    let well_formed = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    if !well_formed {
        return Err(format!(
            "\"${{{inside}}}\" is not a variable; write ${{NAME}}, ${{NAME:-default}} or ${{file:/path}}"
        ));
    }
    match (env(name), default) {
        (Some(value), None) => Ok(value),
        // As in a shell, an empty variable counts as not set where there is a default.
        (Some(value), Some(_)) if !value.is_empty() => Ok(value),
        (_, Some(default)) => Ok(default.to_owned()),
        (None, None) => Err(format!(
            "the environment variable {name} is not set; set it, or give a default: ${{{name}:-default}}"
        )),
    }
}

/// The content of a file without the white space around it.
///
/// # Errors
/// What is wrong with it; never its content.
pub(super) fn read_trimmed(path: &FilePath) -> Result<String, String> {
    let shown = path.display();
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(|error| format!("cannot read {shown}: {}", plain(&error)))?;
    match file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text) {
        Ok(_) if text.len() as u64 > MAX_FILE_BYTES => Err(format!("{shown} is larger than {MAX_FILE_BYTES} bytes")),
        Ok(_) if text.trim().is_empty() => Err(format!("{shown} is empty")),
        Ok(_) => Ok(text.trim().to_owned()),
        Err(error) if error.kind() == std::io::ErrorKind::InvalidData => Err(format!("{shown} is not text (UTF-8)")),
        Err(error) => Err(format!("cannot read {shown}: {}", plain(&error))),
    }
}

/// An error of the operating system without its number, which says nothing more.
pub(super) fn plain(error: &std::io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or(&text);
    let mut characters = text.chars();
    characters
        .next()
        .map(|first| first.to_lowercase().collect::<String>() + characters.as_str())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(name: &str) -> Option<String> {
        match name {
            "PORT" => Some("8080".to_owned()),
            "EMPTY" => Some(String::new()),
            "BRACES" => Some("${PORT}".to_owned()),
            _ => None,
        }
    }

    fn expanded(text: &str) -> Result<String, String> {
        expand_text(text, FilePath::new("/nowhere"), &env)
    }

    #[test]
    fn variables_defaults_and_escapes() {
        assert_eq!(expanded("127.0.0.1:${PORT}").unwrap(), "127.0.0.1:8080");
        assert_eq!(expanded("${NONE:-a}${PORT}").unwrap(), "a8080");
        assert_eq!(expanded("${NONE:-}").unwrap(), "");
        assert_eq!(expanded("${EMPTY:-full}").unwrap(), "full");
        assert_eq!(expanded("${EMPTY}").unwrap(), "");
        assert_eq!(expanded("$${PORT} $PORT").unwrap(), "${PORT} $PORT");
        assert_eq!(
            expanded("${BRACES}").unwrap(),
            "${PORT}",
            "what a variable holds is not expanded again"
        );
    }

    #[test]
    fn what_cannot_be_replaced_says_why() {
        assert!(expanded("${NONE}").unwrap_err().contains("NONE is not set"));
        assert!(expanded("${PORT").unwrap_err().contains("without its"));
        assert!(expanded("${}").unwrap_err().contains("not a variable"));
        assert!(expanded("${A-B}").unwrap_err().contains("not a variable"));
        assert_eq!(
            expanded("${file:gone}").unwrap_err(),
            "cannot read /nowhere/gone: no such file or directory"
        );
    }

    #[test]
    fn files_are_trimmed_and_bounded() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| std::fs::write(directory.path().join(name), bytes).unwrap();
        write("token", b"\n  secret value \n");
        write("empty", b" \n");
        write("binary", b"\xff\xfe");
        write("large", &vec![b'x'; 70_000]);
        let expanded = |name: &str| expand_text(&format!("${{file:{name}}}"), directory.path(), &env);
        assert_eq!(expanded("token").unwrap(), "secret value");
        for (name, why) in [
            ("empty", "is empty"),
            ("binary", "is not text"),
            ("large", "is larger"),
            (".", "is a directory"),
        ] {
            assert!(
                expanded(name).unwrap_err().contains(why),
                "{name}: {:?}",
                expanded(name)
            );
        }
    }
}
