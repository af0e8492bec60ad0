//! YAML with positions: a tree of scalars, lists and mappings that knows where each part stands.
//!
//! `serde_yaml` is the judge of what is YAML, and its messages are the ones shown; the tree is then built from the
//! events of `yaml-rust2`, which carry positions. Nothing here recurses over the text, so no file can exhaust the stack.

use std::collections::HashMap;

use yaml_rust2::Event;
use yaml_rust2::parser::Parser;
use yaml_rust2::scanner::{Marker, TScalarStyle};

use super::fault::{Fault, Path, Position};

/// Nesting that no real configuration reaches; bounds what walking the tree costs.
const MAX_DEPTH: usize = 32;

/// Nodes of a file, aliases counted each time they are used: bounds what a file that multiplies aliases costs.
const MAX_NODES: usize = 200_000;

#[derive(Clone, Debug)]
pub(super) struct Node {
    pub at: Position,
    pub value: Value,
}

#[derive(Clone, Debug)]
pub(super) enum Value {
    Scalar(Scalar),
    List(Vec<Node>),
    Mapping(Vec<Entry>),
}

#[derive(Clone, Debug)]
pub(super) struct Scalar {
    pub text: String,
    /// Neither quoted nor a block: may stand for a number, a truth value or nothing.
    pub plain: bool,
    /// As it was written, where `${…}` was replaced in it: faults show this, since the value may be a secret.
    pub written: Option<String>,
}

#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub key: String,
    pub key_at: Position,
    pub value: Node,
}

/// Reads one YAML document.
///
/// # Errors
/// The first fault of syntax, or every repeated key.
pub(super) fn parse(text: &str) -> Result<Node, Vec<Fault>> {
    match serde_yaml::from_str::<serde::de::IgnoredAny>(text) {
        Err(error) if text.trim().is_empty() => return Err(vec![fault_at(position_of(&error), EMPTY)]),
        // The walk below knows where the second one begins.
        Err(error) if error.to_string().contains("more than one document") => {}
        Err(error) => return Err(vec![syntax(&error)]),
        Ok(_) => {}
    }
    let mut builder = Builder::default();
    let mut parser = Parser::new_from_str(text);
    loop {
        match parser.next_token() {
            Ok((Event::StreamEnd, _)) => break,
            Ok((event, mark)) => builder.event(event, mark).map_err(|fault| vec![fault])?,
            Err(error) => {
                return Err(vec![fault_at(
                    position(*error.marker()),
                    &format!("not YAML: {}", error.info()),
                )]);
            }
        }
    }
    match builder.root {
        Some(node) if builder.faults.is_empty() => Ok(node),
        Some(_) => Err(builder.faults),
        None => Err(vec![fault_at(Position { line: 1, column: 1 }, EMPTY)]),
    }
}

const EMPTY: &str = "the file is empty; `tollgate config init` prints one to begin with";

fn position_of(error: &serde_yaml::Error) -> Position {
    error.location().map_or(Position { line: 1, column: 1 }, |at| Position {
        line: at.line(),
        column: at.column(),
    })
}

fn syntax(error: &serde_yaml::Error) -> Fault {
    let message = error.to_string();
    let what = message.split(" at line ").next().unwrap_or(&message);
    // The context says where the broken construct began, which is often the line to mend.
    let context = message.find(", while ").map_or("", |start| &message[start..]);
    fault_at(position_of(error), &format!("not YAML: {what}{context}"))
}

fn fault_at(at: Position, message: &str) -> Fault {
    Fault {
        line: at.line,
        column: at.column,
        path: String::new(),
        message: message.to_owned(),
    }
}

/// `yaml-rust2` counts lines from 1 and columns from 0.
fn position(mark: Marker) -> Position {
    Position {
        line: mark.line(),
        column: mark.col() + 1,
    }
}

#[derive(Default)]
struct Builder {
    open: Vec<Open>,
    anchors: HashMap<usize, (Node, usize)>,
    root: Option<Node>,
    nodes: usize,
    faults: Vec<Fault>,
}

/// A list or mapping whose end has not come yet.
struct Open {
    at: Position,
    anchor: usize,
    /// Nodes before it, so that an anchor knows how many it stands for.
    nodes_before: usize,
    path: Path,
    kind: OpenKind,
}

enum OpenKind {
    List(Vec<Node>),
    Mapping {
        entries: Vec<Entry>,
        key: Option<(String, Position)>,
    },
}

impl Builder {
    fn event(&mut self, event: Event, mark: Marker) -> Result<(), Fault> {
        let at = position(mark);
        match event {
            Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentEnd => Ok(()),
            Event::DocumentStart if self.root.is_some() => Err(fault_at(
                at,
                "holds more than one YAML document (`---`); only one is read",
            )),
            Event::DocumentStart => Ok(()),
            Event::Scalar(text, style, anchor, tag) => {
                self.no_tag(tag.is_some(), at)?;
                let plain = matches!(style, TScalarStyle::Plain);
                let node = Node {
                    at,
                    value: Value::Scalar(Scalar {
                        text,
                        plain,
                        written: None,
                    }),
                };
                self.count(1, at)?;
                self.close(node, anchor, 1)
            }
            Event::Alias(anchor) => {
                let Some((node, nodes)) = self.anchors.get(&anchor).cloned() else {
                    return Err(fault_at(
                        at,
                        "an alias (`*name`) without its anchor (`&name`) before it",
                    ));
                };
                self.count(nodes, at)?;
                self.close(Node { at, value: node.value }, 0, nodes)
            }
            Event::SequenceStart(anchor, tag) => {
                self.no_tag(tag.is_some(), at)?;
                self.begin(at, anchor, OpenKind::List(Vec::new()))
            }
            Event::MappingStart(anchor, tag) => {
                self.no_tag(tag.is_some(), at)?;
                self.begin(
                    at,
                    anchor,
                    OpenKind::Mapping {
                        entries: Vec::new(),
                        key: None,
                    },
                )
            }
            Event::SequenceEnd | Event::MappingEnd => {
                let Some(open) = self.open.pop() else { return Ok(()) };
                let value = match open.kind {
                    OpenKind::List(items) => Value::List(items),
                    OpenKind::Mapping { entries, .. } => Value::Mapping(entries),
                };
                let nodes = self.nodes - open.nodes_before;
                // A block mapping is announced behind its first key; it begins where that key does.
                let first = match &value {
                    Value::Mapping(entries) => entries.first().map(|entry| entry.key_at),
                    _ => None,
                };
                let at = first.map_or(open.at, |first| first.min(open.at));
                self.close(Node { at, value }, open.anchor, nodes)
            }
        }
    }

    fn no_tag(&self, tagged: bool, at: Position) -> Result<(), Fault> {
        if tagged {
            Err(fault_at(at, "YAML tags (`!name`) are not used here"))
        } else {
            Ok(())
        }
    }

    fn count(&mut self, nodes: usize, at: Position) -> Result<(), Fault> {
        self.nodes += nodes;
        if self.nodes > MAX_NODES {
            Err(fault_at(at, "the file is too large"))
        } else {
            Ok(())
        }
    }

    fn begin(&mut self, at: Position, anchor: usize, kind: OpenKind) -> Result<(), Fault> {
        if self.open.len() >= MAX_DEPTH {
            return Err(fault_at(at, "nested too deeply"));
        }
        self.count(1, at)?;
        let path = self.next_path();
        self.open.push(Open {
            at,
            anchor,
            nodes_before: self.nodes - 1,
            path,
            kind,
        });
        Ok(())
    }

    fn next_path(&self) -> Path {
        match self.open.last() {
            None => Path::root(),
            Some(open) => match &open.kind {
                OpenKind::List(items) => open.path.index(items.len()),
                OpenKind::Mapping { key, .. } => key.as_ref().map_or(open.path.clone(), |(key, _)| open.path.key(key)),
            },
        }
    }

    /// Hands a finished node to what is open around it.
    fn close(&mut self, node: Node, anchor: usize, nodes: usize) -> Result<(), Fault> {
        if anchor > 0 {
            self.anchors.insert(anchor, (node.clone(), nodes));
        }
        let Some(open) = self.open.last_mut() else {
            self.root = Some(node);
            return Ok(());
        };
        match &mut open.kind {
            OpenKind::List(items) => items.push(node),
            OpenKind::Mapping { entries, key } => match key.take() {
                Some((key, key_at)) => entries.push(Entry {
                    key,
                    key_at,
                    value: node,
                }),
                None => {
                    let at = node.at;
                    let Value::Scalar(scalar) = node.value else {
                        return Err(fault_at(at, "a key must be a word"));
                    };
                    if let Some(first) = entries.iter().find(|entry| entry.key == scalar.text) {
                        self.faults.push(Fault {
                            line: at.line,
                            column: at.column,
                            path: open.path.key(&scalar.text).as_str().to_owned(),
                            message: format!("given twice; first on line {}", first.key_at.line),
                        });
                    }
                    *key = Some((scalar.text, at));
                }
            },
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(node: &Node) -> &[Entry] {
        match &node.value {
            Value::Mapping(entries) => entries,
            other => panic!("expected a mapping, found {other:?}"),
        }
    }

    #[test]
    fn positions_are_those_an_editor_shows() {
        let tree = parse("a: 1\nb:\n  - {c: x, dé: yes}\n  - z\n").unwrap();
        let entries = mapping(&tree);
        assert_eq!(entries[0].key_at, Position { line: 1, column: 1 });
        assert_eq!(entries[0].value.at, Position { line: 1, column: 4 });
        let Value::List(items) = &entries[1].value.value else {
            panic!()
        };
        assert_eq!(items[0].at, Position { line: 3, column: 5 });
        assert_eq!(mapping(&items[0])[1].key_at, Position { line: 3, column: 12 });
        assert_eq!(mapping(&items[0])[1].value.at, Position { line: 3, column: 16 });
        assert_eq!(items[1].at, Position { line: 4, column: 5 });
    }

    #[test]
    fn syntax_errors_have_a_place() {
        let faults = parse("a: 1\nb: [1, 2\nc: 3\n").unwrap_err();
        assert_eq!(faults.len(), 1);
        assert!(faults[0].line >= 2, "{faults:?}");
        assert!(faults[0].message.starts_with("not YAML: "), "{faults:?}");
    }

    #[test]
    fn every_repeated_key_is_told() {
        let faults = parse("a: 1\na: 2\nb: {c: 1, c: 2}\n").unwrap_err();
        assert_eq!(faults.len(), 2);
        assert_eq!((faults[0].line, faults[0].path.as_str()), (2, "a"));
        assert_eq!((faults[1].line, faults[1].path.as_str()), (3, "b.c"));
    }

    #[test]
    fn aliases_stand_for_their_anchor_and_cannot_explode() {
        let tree = parse("a: &x {k: 1}\nb: *x\n").unwrap();
        assert_eq!(mapping(&mapping(&tree)[1].value)[0].key, "k");
        let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..12 {
            let alias = format!("*a{}", level - 1);
            bomb.push_str(&format!("a{level}: &a{level} [{}]\n", vec![alias; 10].join(", ")));
        }
        assert!(parse(&bomb).is_err());
    }

    #[test]
    fn deep_nesting_is_a_fault_not_a_crash() {
        assert!(parse(&"[".repeat(100_000)).is_err());
        assert!(parse(&format!("{}1{}", "[".repeat(60), "]".repeat(60))).is_err());
    }
}
