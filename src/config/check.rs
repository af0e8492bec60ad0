//! The tree against the schema: unknown keys, missing keys, wrong types, wrong forms, numbers out of range.
//!
//! The schema is the one that editors get, generated from the shapes in `file`, so the two cannot differ. The walk never
//! stops at a fault: what is wrong is replaced by something of the right shape and named in `faulty`, so that the rest
//! can be resolved and checked too, without telling the same mistake twice.

use std::collections::HashMap;

use serde_json::Value as Schema;
use serde_yaml::Value as Yaml;

use self::scalar::check_scalar;
pub(super) use self::shape::{alternatives, describe};
use self::shape::{is_type, placeholder};
use self::unknown::unknown_key;
use super::fault::{Fault, Path, Position, nearest};
use super::tree::{Entry, Node, Value};

mod scalar;
mod shape;
mod unknown;

/// A file whose shape is right, if need be by repair.
#[derive(Default)]
pub(super) struct Checked {
    pub value: Yaml,
    pub faults: Vec<Fault>,
    /// Settings that hold a repair instead of what was written.
    pub faulty: Vec<Path>,
    pub places: Places,
}

/// Where each setting stands.
#[derive(Default)]
pub(super) struct Places(HashMap<String, Place>);

#[derive(Clone, Copy)]
struct Place {
    key: Option<Position>,
    value: Position,
}

impl Places {
    /// Where a setting's value stands, or that of the nearest setting around it that was written.
    pub fn value(&self, path: &Path) -> Position {
        self.find(path.as_str())
            .map_or(Position { line: 1, column: 1 }, |place| place.value)
    }

    /// Where a setting's key stands.
    pub fn key(&self, path: &Path) -> Position {
        self.find(path.as_str())
            .map_or(Position { line: 1, column: 1 }, |place| {
                place.key.unwrap_or(place.value)
            })
    }

    pub fn was_written(&self, path: &Path) -> bool {
        self.0.contains_key(path.as_str())
    }

    fn find(&self, path: &str) -> Option<Place> {
        let mut end = path.len();
        loop {
            if let Some(place) = self.0.get(&path[..end]) {
                return Some(*place);
            }
            if end == 0 {
                return None;
            }
            end = path[..end].rfind(['.', '[']).unwrap_or(0);
        }
    }
}

/// Walks the tree along the schema.
pub(super) fn check(tree: &Node, schema: &Schema, faults: Vec<Fault>, faulty: Vec<Path>) -> Checked {
    let mut walk = Walk {
        root: schema,
        checked: Checked {
            faults,
            faulty,
            ..Checked::default()
        },
    };
    let value = walk.node(tree, None, schema, &Path::root(), "");
    Checked { value, ..walk.checked }
}

struct Walk<'a> {
    root: &'a Schema,
    checked: Checked,
}

impl<'a> Walk<'a> {
    fn node(&mut self, node: &Node, key: Option<Position>, schema: &'a Schema, path: &Path, shape: &str) -> Yaml {
        self.checked
            .places
            .0
            .insert(path.as_str().to_owned(), Place { key, value: node.at });
        if self.checked.faulty.iter().any(|faulty| faulty.covers(path)) {
            return placeholder(self.root, schema);
        }
        let alternatives = alternatives(self.root, schema);
        match &node.value {
            Value::Mapping(entries) => match alternatives.iter().find(|schema| is_type(schema, "object")) {
                Some(schema) => return self.mapping(node, entries, schema, path, shape),
                None => self.fault(node.at, path, wrong_kind(&alternatives, "a mapping")),
            },
            Value::List(items) => match alternatives.iter().find(|schema| is_type(schema, "array")) {
                Some(schema) => return self.list(node, items, schema, path, shape),
                None => self.fault(node.at, path, wrong_kind(&alternatives, "a list")),
            },
            Value::Scalar(scalar) => match check_scalar(scalar, &alternatives) {
                Ok(value) => return value,
                Err(message) => self.fault(node.at, path, message),
            },
        }
        placeholder(self.root, schema)
    }

    fn mapping(&mut self, node: &Node, entries: &[Entry], schema: &'a Schema, path: &Path, shape: &str) -> Yaml {
        let properties = schema.get("properties").and_then(Schema::as_object);
        let others = schema.get("additionalProperties").filter(|schema| schema.is_object());
        let mut result = serde_yaml::Mapping::new();
        for entry in entries {
            let below = path.key(&entry.key);
            let known = properties.and_then(|properties| properties.get(&entry.key));
            let (value_schema, below_shape) = match (known, others) {
                (Some(known), _) if shape.is_empty() => (known, entry.key.clone()),
                (Some(known), _) => (known, format!("{shape}.{}", entry.key)),
                (None, Some(others)) => (others, format!("{shape}.*")),
                (None, None) => {
                    let names: Vec<&str> = properties
                        .into_iter()
                        .flatten()
                        .map(|(name, _)| name.as_str())
                        .collect();
                    let message = unknown_key(&entry.key, shape, &names);
                    self.checked.places.0.insert(
                        below.as_str().to_owned(),
                        Place {
                            key: Some(entry.key_at),
                            value: entry.value.at,
                        },
                    );
                    self.fault(entry.key_at, &below, message);
                    // Most likely that key was meant, so that it is missing is no second mistake.
                    let meant = nearest(&entry.key, names.iter().copied());
                    self.checked.faulty.extend(
                        meant
                            .map(|name| path.key(name))
                            .filter(|meant| !self.checked.places.was_written(meant)),
                    );
                    continue;
                }
            };
            let value = self.node(&entry.value, Some(entry.key_at), value_schema, &below, &below_shape);
            // Where there is a default it does better than a repair. Where there is none, that the key is there
            // means something, so the repair stands for it.
            let has_default = known.is_some_and(|known| known.get("default").is_some());
            if !has_default || !self.checked.faulty.contains(&below) {
                result.insert(Yaml::String(entry.key.clone()), value);
            }
        }
        for name in schema
            .get("required")
            .and_then(Schema::as_array)
            .into_iter()
            .flatten()
            .filter_map(Schema::as_str)
        {
            if result.contains_key(name) {
                continue;
            }
            let below = path.key(name);
            let Some(value_schema) = properties.and_then(|properties| properties.get(name)) else {
                continue;
            };
            if !self.checked.faulty.contains(&below) {
                let expected = describe(&alternatives(self.root, value_schema));
                self.fault(node.at, &below, format!("missing; expected {expected}"));
            }
            result.insert(Yaml::String(name.to_owned()), placeholder(self.root, value_schema));
        }
        Yaml::Mapping(result)
    }

    fn list(&mut self, node: &Node, items: &[Node], schema: &'a Schema, path: &Path, shape: &str) -> Yaml {
        let least = schema.get("minItems").and_then(Schema::as_u64).unwrap_or(0);
        if (items.len() as u64) < least {
            self.fault(node.at, path, "must not be empty".to_owned());
            return placeholder(self.root, schema);
        }
        let Some(item_schema) = schema.get("items") else {
            return Yaml::Sequence(Vec::new());
        };
        let shape = format!("{shape}[]");
        let values = items
            .iter()
            .enumerate()
            .map(|(index, item)| self.node(item, None, item_schema, &path.index(index), &shape));
        Yaml::Sequence(values.collect())
    }

    fn fault(&mut self, at: Position, path: &Path, message: String) {
        self.checked.faulty.push(path.clone());
        self.checked.faults.push(Fault {
            line: at.line,
            column: at.column,
            path: path.as_str().to_owned(),
            message,
        });
    }
}

fn wrong_kind(alternatives: &[&Schema], found: &str) -> String {
    format!("expected {}, found {found}", describe(alternatives))
}
