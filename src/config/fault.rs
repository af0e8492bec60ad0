//! Faults of a configuration file: where, which setting, what is wrong and what would be right.

use std::fmt;

use serde::Serialize;

/// Every fault that was found in one file, in the order of the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Faults {
    /// The file's name, as it was given.
    pub file: String,
    pub faults: Vec<Fault>,
}

/// One mistake.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fault {
    /// From 1; 0 where the fault has no place in the text (the file cannot be read).
    pub line: usize,
    /// In characters, from 1.
    pub column: usize,
    /// `routes[3].match.path`; empty for the file as a whole.
    pub path: String,
    /// What is wrong and what would be right.
    pub message: String,
}

impl fmt::Display for Faults {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, fault) in self.faults.iter().enumerate() {
            if index > 0 {
                out.write_str("\n")?;
            }
            out.write_str(&self.file)?;
            if fault.line > 0 {
                write!(out, ":{}:{}", fault.line, fault.column)?;
            }
            if !fault.path.is_empty() {
                write!(out, ": {}", fault.path)?;
            }
            write!(out, ": {}", fault.message)?;
        }
        Ok(())
    }
}

impl std::error::Error for Faults {}

/// A place in the text; both from 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Position {
    pub line: usize,
    pub column: usize,
}

/// The path of a setting, as faults show it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Path(String);

impl Path {
    pub fn root() -> Self {
        Self::default()
    }

    /// A setting below this one. Names that would read as more than one step are quoted.
    pub fn key(&self, name: &str) -> Self {
        let plain = !name.is_empty()
            && name
                .chars()
                .all(|c| c.is_alphanumeric() || matches!(c, '_' | '-' | ':'));
        Self(match (plain, self.0.is_empty()) {
            (true, true) => name.to_owned(),
            (true, false) => format!("{}.{name}", self.0),
            (false, _) => format!("{}[{name:?}]", self.0),
        })
    }

    /// An element of this list, from 0.
    pub fn index(&self, index: usize) -> Self {
        Self(format!("{}[{index}]", self.0))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether `other` is this setting or one below it.
    pub fn covers(&self, other: &Path) -> bool {
        match other.0.strip_prefix(&self.0) {
            Some(rest) => self.0.is_empty() || rest.is_empty() || rest.starts_with(['.', '[']),
            None => false,
        }
    }
}

/// `; did you mean "x"?` where one of the names is near enough to be meant, else nothing.
pub(super) fn did_you_mean<'a>(word: &str, names: impl IntoIterator<Item = &'a str>) -> String {
    match nearest(word, names) {
        Some(name) => format!("; did you mean \"{name}\"?"),
        None => String::new(),
    }
}

/// The name with the fewest edits (insert, delete, replace, swap), if they are at most a third of its length.
pub(super) fn nearest<'a>(word: &str, names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let lower = word.to_lowercase();
    names
        .into_iter()
        .map(|name| (edits(&lower, &name.to_lowercase()), name))
        .filter(|(edits, name)| *edits <= (name.chars().count().max(word.chars().count()) / 3).max(1))
        .min_by_key(|(edits, _)| *edits)
        .map(|(_, name)| name)
}

/// Optimal string alignment distance (Damerau–Levenshtein without a second edit of a swapped pair).
fn edits(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    if a.len().abs_diff(b.len()) > 16 || a.len() > 128 || b.len() > 128 {
        return usize::MAX;
    }
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    for (i, row) in rows.iter_mut().enumerate() {
        row[0] = i;
    }
    for (j, cell) in rows[0].iter_mut().enumerate() {
        *cell = j;
    }
    for i in 1..=a.len() {
        for j in 1..=b.len() {
            let replace = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut least = replace.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                least = least.min(rows[i - 2][j - 2] + 1);
            }
            rows[i][j] = least;
        }
    }
    rows[a.len()][b.len()]
}

/// `a, b or c`.
pub(super) fn one_of(names: &[String]) -> String {
    match names {
        [] => String::new(),
        [one] => one.clone(),
        [most @ .., last] => format!("{} or {last}", most.join(", ")),
    }
}

/// At most `most` names, then `…`.
pub(super) fn listed<'a>(names: impl IntoIterator<Item = &'a str>, most: usize) -> String {
    let names: Vec<&str> = names.into_iter().collect();
    let mut text = names.iter().take(most).copied().collect::<Vec<_>>().join(", ");
    if names.len() > most {
        text.push_str(", …");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_names_are_suggested_and_far_ones_are_not() {
        let names = ["permissions:check", "permissions:audit", "default"];
        assert_eq!(nearest("permission:check", names), Some("permissions:check"));
        assert_eq!(nearest("defualt", names), Some("default"));
        assert_eq!(nearest("Default", names), Some("default"));
        assert_eq!(nearest("storage", names), None);
        assert_eq!(nearest("tier", ["tiers"]), Some("tiers"));
        assert_eq!(nearest("x", ["y"]), Some("y"));
    }

    #[test]
    fn paths_read_back_unambiguously() {
        let path = Path::root().key("routes").index(3).key("match");
        assert_eq!(path.as_str(), "routes[3].match");
        assert_eq!(
            Path::root().key("tiers").key("permissions:check").as_str(),
            "tiers.permissions:check"
        );
        assert_eq!(Path::root().key("tiers").key("a.b").as_str(), "tiers[\"a.b\"]");
        assert!(path.covers(&path.key("path")));
        assert!(!Path::root().key("route").covers(&path));
        assert!(Path::root().covers(&path));
    }
}
