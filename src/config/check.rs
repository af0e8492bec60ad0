//! The tree against the schema: unknown keys, missing keys, wrong types, wrong forms, numbers out of range.
//!
//! The schema is the one that editors get, generated from the shapes in `file`, so the two cannot differ. The walk never
//! stops at a fault: what is wrong is replaced by something of the right shape and named in `faulty`, so that the rest
//! can be resolved and checked too, without telling the same mistake twice.

use std::collections::HashMap;

use serde_json::Value as Schema;
use serde_yaml::Value as Yaml;

use super::fault::{Fault, Path, Position, did_you_mean, listed, nearest, one_of};
use super::scalar::{describe_form, form};
use super::tree::{Entry, Node, Scalar, Value};

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

/// The schemas that a value may follow: references resolved, unions flattened, "nothing" left out.
pub(super) fn alternatives<'a>(root: &'a Schema, schema: &'a Schema) -> Vec<&'a Schema> {
    if let Some(reference) = schema.get("$ref").and_then(Schema::as_str) {
        let target = reference.strip_prefix('#').and_then(|pointer| root.pointer(pointer));
        return target.map(|target| alternatives(root, target)).unwrap_or_default();
    }
    for union in ["anyOf", "oneOf"] {
        if let Some(members) = schema.get(union).and_then(Schema::as_array) {
            return members.iter().flat_map(|member| alternatives(root, member)).collect();
        }
    }
    if schema.get("type").and_then(Schema::as_str) == Some("null") {
        return Vec::new();
    }
    vec![schema]
}

fn is_type(schema: &Schema, name: &str) -> bool {
    match schema.get("type") {
        Some(Schema::String(one)) => one == name,
        Some(Schema::Array(several)) => several.iter().any(|one| one == name),
        _ => false,
    }
}

fn choices(schema: &Schema) -> Option<Vec<&Schema>> {
    match (schema.get("const"), schema.get("enum").and_then(Schema::as_array)) {
        (Some(constant), _) => Some(vec![constant]),
        (None, Some(several)) => Some(several.iter().filter(|choice| !choice.is_null()).collect()),
        (None, None) => None,
    }
}

/// What a plain scalar looks like to YAML 1.2.
enum Looks {
    Nothing,
    Truth(bool),
    Number(Option<i64>),
    Text,
}

fn looks(scalar: &Scalar) -> Looks {
    if !scalar.plain && scalar.written.is_none() {
        return Looks::Text;
    }
    match scalar.text.as_str() {
        "" | "~" | "null" | "Null" | "NULL" => Looks::Nothing,
        "true" | "True" | "TRUE" => Looks::Truth(true),
        "false" | "False" | "FALSE" => Looks::Truth(false),
        text if text.starts_with(|c: char| c.is_ascii_digit() || matches!(c, '-' | '+' | '.'))
            && text.parse::<f64>().is_ok() =>
        {
            Looks::Number(text.parse().ok())
        }
        _ => Looks::Text,
    }
}

fn check_scalar(scalar: &Scalar, alternatives: &[&Schema]) -> Result<Yaml, String> {
    let text = scalar.text.as_str();
    let looks = looks(scalar);
    if matches!(looks, Looks::Nothing) && scalar.written.is_none() {
        let braces = if alternatives.iter().any(|schema| is_type(schema, "object")) {
            " ({} where nothing is to be set)"
        } else {
            ""
        };
        return Err(format!("has no value; give it one{braces}, or remove the key"));
    }
    let mut told = None;
    for schema in alternatives {
        if let Some(choices) = choices(schema) {
            for choice in choices {
                match (choice, &looks) {
                    (Schema::String(choice), _) if choice == text => return Ok(Yaml::String(text.to_owned())),
                    (Schema::Bool(choice), Looks::Truth(truth)) if choice == truth => return Ok(Yaml::Bool(*truth)),
                    _ => {}
                }
            }
            continue;
        }
        if let (true, Looks::Number(Some(number))) = (is_type(schema, "integer"), &looks) {
            match in_range(*number, schema) {
                Ok(()) => return Ok(Yaml::Number((*number).into())),
                Err(_) if scalar.written.is_some() => {
                    told = Some(format!(
                        "expected {}, found {}",
                        describe(&[*schema]),
                        found(scalar, &looks)
                    ));
                }
                Err(message) => told = Some(message),
            }
            continue;
        }
        if let (true, Looks::Truth(truth)) = (is_type(schema, "boolean"), &looks) {
            return Ok(Yaml::Bool(*truth));
        }
        if is_type(schema, "string") {
            let format = schema.get("format").and_then(Schema::as_str);
            match format.and_then(form) {
                Some(check) => match check(text) {
                    Ok(()) => return Ok(Yaml::String(text.to_owned())),
                    // What a variable holds may be a secret, and the form's own message may quote it.
                    Err(_) if scalar.written.is_some() => {
                        told = Some(format!(
                            "expected {}, found {}",
                            describe(&[*schema]),
                            found(scalar, &looks)
                        ));
                    }
                    Err(message) => told = Some(message),
                },
                None if matches!(looks, Looks::Text) || scalar.written.is_some() => {
                    return Ok(Yaml::String(text.to_owned()));
                }
                None if format.is_some_and(|format| describe_form(format).is_some()) => {
                    told = Some("expected text; put it into quotes".to_owned())
                }
                None => {
                    told = Some(format!(
                        "expected text, found {}; put it into quotes: \"{text}\"",
                        found(scalar, &looks)
                    ))
                }
            }
        }
    }
    if let Some(message) = told {
        return Err(message);
    }
    let words: Vec<&str> = alternatives
        .iter()
        .filter_map(|schema| choices(schema))
        .flatten()
        .filter_map(Schema::as_str)
        .collect();
    if words.len() > 1 && matches!(looks, Looks::Text) && scalar.written.is_none() {
        return Err(format!(
            "unknown value \"{text}\"{} ({})",
            did_you_mean(text, words.iter().copied()),
            expected_words(&words)
        ));
    }
    let unquoted = alternatives
        .iter()
        .any(|schema| is_type(schema, "integer") || is_type(schema, "boolean"))
        && !scalar.plain
        && scalar.written.is_none()
        && !matches!(
            self::looks(&Scalar {
                plain: true,
                ..scalar.clone()
            }),
            Looks::Text
        );
    let hint = if unquoted { "; take the quotes away" } else { "" };
    Err(format!(
        "expected {}, found {}{hint}",
        describe(alternatives),
        found(scalar, &looks)
    ))
}

fn expected_words(words: &[&str]) -> String {
    format!("one of: {}", words.join(", "))
}

fn in_range(number: i64, schema: &Schema) -> Result<(), String> {
    let bound = |name: &str| schema.get(name).and_then(Schema::as_i64);
    let (least, most) = (bound("minimum"), bound("maximum"));
    if least.is_none_or(|least| number >= least) && most.is_none_or(|most| number <= most) {
        return Ok(());
    }
    Err(format!("must be {}, found {number}", range(least, most)))
}

fn range(least: Option<i64>, most: Option<i64>) -> String {
    match (least, most) {
        (Some(least), Some(most)) if least == most => format!("{least}"),
        (Some(least), Some(most)) => format!("from {least} to {most}"),
        (Some(least), None) => format!("{least} or more"),
        (None, Some(most)) => format!("at most {most}"),
        (None, None) => "a whole number".to_owned(),
    }
}

fn found(scalar: &Scalar, looks: &Looks) -> String {
    if let Some(written) = &scalar.written {
        return format!("\"{written}\"");
    }
    match looks {
        Looks::Nothing => "nothing".to_owned(),
        Looks::Truth(truth) => truth.to_string(),
        Looks::Number(_) => scalar.text.clone(),
        Looks::Text => {
            let mut text: String = scalar.text.chars().take(60).collect();
            if text.len() < scalar.text.len() {
                text.push('…');
            }
            format!("{text:?}")
        }
    }
}

fn wrong_kind(alternatives: &[&Schema], found: &str) -> String {
    format!("expected {}, found {found}", describe(alternatives))
}

/// `a duration such as 1h`, `a list or a mapping`, ….
pub(super) fn describe(alternatives: &[&Schema]) -> String {
    let mut descriptions: Vec<String> = Vec::new();
    for schema in alternatives {
        let words = match choices(schema) {
            Some(choices) => choices
                .iter()
                .filter_map(|choice| choice.as_str().map(str::to_owned))
                .collect(),
            None => vec![describe_one(schema)],
        };
        for word in words {
            if !descriptions.contains(&word) {
                descriptions.push(word);
            }
        }
    }
    one_of(&descriptions)
}

fn describe_one(schema: &Schema) -> String {
    if let Some(description) = schema.get("format").and_then(Schema::as_str).and_then(describe_form) {
        return description.to_owned();
    }
    if is_type(schema, "integer") {
        let bound = |name: &str| schema.get(name).and_then(Schema::as_i64);
        return match (bound("minimum"), bound("maximum")) {
            (None | Some(0), None) => "a whole number".to_owned(),
            (least, most) if least == most => range(least, most),
            (least, most) => format!("a whole number {}", range(least, most)),
        };
    }
    let words = [
        ("object", "a mapping"),
        ("array", "a list"),
        ("boolean", "true or false"),
        ("string", "text"),
    ];
    words
        .iter()
        .find(|(name, _)| is_type(schema, name))
        .map_or("something else", |(_, words)| words)
        .to_owned()
}

/// Something of the right shape to stand for what was wrong or missing.
fn placeholder(root: &Schema, schema: &Schema) -> Yaml {
    let alternatives = alternatives(root, schema);
    let Some(schema) = alternatives.first() else {
        return Yaml::Null;
    };
    if let Some(choice) = choices(schema).and_then(|choices| choices.first().copied()) {
        return match choice {
            Schema::String(text) => Yaml::String(text.clone()),
            Schema::Bool(truth) => Yaml::Bool(*truth),
            _ => Yaml::Null,
        };
    }
    if is_type(schema, "object") {
        let required = schema
            .get("required")
            .and_then(Schema::as_array)
            .into_iter()
            .flatten()
            .filter_map(Schema::as_str);
        let entries = required.filter_map(|name| {
            let below = schema.get("properties")?.get(name)?;
            Some((Yaml::String(name.to_owned()), placeholder(root, below)))
        });
        return Yaml::Mapping(entries.collect());
    }
    if is_type(schema, "array") {
        let least = schema.get("minItems").and_then(Schema::as_u64).unwrap_or(0);
        let item = schema.get("items").filter(|_| least > 0);
        return Yaml::Sequence(item.map(|item| placeholder(root, item)).into_iter().collect());
    }
    if is_type(schema, "integer") {
        return Yaml::Number(
            schema
                .get("minimum")
                .and_then(Schema::as_i64)
                .unwrap_or(1)
                .max(1)
                .into(),
        );
    }
    if is_type(schema, "boolean") {
        return Yaml::Bool(false);
    }
    let text = match schema.get("format").and_then(Schema::as_str) {
        Some("duration") => "1h",
        Some("listen-address") => "127.0.0.1:0",
        Some("server-address") => "127.0.0.1:1",
        Some("network") => "127.0.0.1/32",
        Some("base-url") => "http://127.0.0.1",
        _ => "placeholder",
    };
    Yaml::String(text.to_owned())
}

fn unknown_key(key: &str, shape: &str, names: &[&str]) -> String {
    if let Some((_, _, hint)) = ELSEWHERE
        .iter()
        .find(|(place, name, _)| *place == shape && *name == key)
    {
        return format!("unknown key \"{key}\"; {hint}");
    }
    let suggestion = did_you_mean(key, names.iter().copied());
    if suggestion.is_empty() {
        format!(
            "unknown key \"{key}\" (keys here: {})",
            listed(names.iter().copied(), 20)
        )
    } else {
        format!("unknown key \"{key}\"{suggestion}")
    }
}

/// Keys that people know from elsewhere, or look for in another place, with what is written instead.
const ELSEWHERE: [(&str, &str, &str); 26] = [
    (
        "",
        "server",
        "the listener is `gate.listen`, the servers behind it are `upstreams`",
    ),
    ("", "listen", "it belongs into the section `gate`, `control` or `admin`"),
    (
        "",
        "rate_limits",
        "limits are `tiers`, by name: {limit: 1000, window: 1h}",
    ),
    (
        "",
        "limits",
        "limits of keys are `tiers`; limits of connections and heads are `gate.limits`",
    ),
    ("", "environments", "it belongs into `keys`: keys.environments"),
    ("", "redis", "counts are shared through `cluster`: {url: \"redis://…\"}"),
    ("", "database", "it belongs into `control`: control.database"),
    ("", "feed", "it belongs into `gate`: gate.feed"),
    (
        "",
        "metrics",
        "metrics are served by the listener `admin`: {listen: \"127.0.0.1:9090\"}",
    ),
    ("gate", "port", "write listen: [{address: \"0.0.0.0:8080\"}]"),
    ("gate", "address", "write listen: [{address: \"0.0.0.0:8080\"}]"),
    (
        "gate",
        "tls",
        "TLS belongs to a listener: listen: [{address: …, tls: {cert: …, key: …}}]",
    ),
    ("gate", "workers", "it is called `threads`"),
    ("gate", "upstreams", "`upstreams` stands beside `gate`, not in it"),
    ("gate", "routes", "`routes` stands beside `gate`, not in it"),
    (
        "gate.listen[]",
        "port",
        "the port is part of `address`: \"0.0.0.0:8080\"",
    ),
    (
        "gate.listen[]",
        "cert",
        "certificates belong into `tls`: {cert: …, key: …}",
    ),
    (
        "keys",
        "prefix",
        "prefixes belong to environments: environments: {live: {prefix: pxk_live_}}",
    ),
    ("routes[]", "path", "it belongs into `match`: match: {path: …}"),
    (
        "routes[]",
        "methods",
        "it belongs into `match`: match: {methods: […], path: …}",
    ),
    ("routes[]", "host", "it belongs into `match`: match: {host: …, path: …}"),
    ("routes[]", "scopes", "a route asks for one scope: scope: NAME"),
    (
        "routes[]",
        "limit",
        "a route's limit is its tier's (`tiers`), or `public: {limit, window}` for one without a key",
    ),
    ("routes[].match", "method", "it is a list: methods: [GET]"),
    ("routes[].match", "prefix", "write path: \"/prefix/**\""),
    (
        "upstreams.*",
        "url",
        "write servers: [\"HOST:PORT\"], with tls: {} for https",
    ),
];
