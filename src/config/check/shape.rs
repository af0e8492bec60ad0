//! What a schema says of a value, and how a person is told.

use serde_json::Value as Schema;
use serde_yaml::Value as Yaml;

use crate::config::fault::one_of;
use crate::config::scalar::describe_form;

/// The schemas that a value may follow: references resolved, unions flattened, "nothing" left out.
pub fn alternatives<'a>(root: &'a Schema, schema: &'a Schema) -> Vec<&'a Schema> {
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

pub fn is_type(schema: &Schema, name: &str) -> bool {
    match schema.get("type") {
        Some(Schema::String(one)) => one == name,
        Some(Schema::Array(several)) => several.iter().any(|one| one == name),
        _ => false,
    }
}

pub fn choices(schema: &Schema) -> Option<Vec<&Schema>> {
    match (schema.get("const"), schema.get("enum").and_then(Schema::as_array)) {
        (Some(constant), _) => Some(vec![constant]),
        (None, Some(several)) => Some(several.iter().filter(|choice| !choice.is_null()).collect()),
        (None, None) => None,
    }
}

/// `a duration such as 1h`, `a list or a mapping`, ….
pub fn describe(alternatives: &[&Schema]) -> String {
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

pub fn range(least: Option<i64>, most: Option<i64>) -> String {
    match (least, most) {
        (Some(least), Some(most)) if least == most => format!("{least}"),
        (Some(least), Some(most)) => format!("from {least} to {most}"),
        (Some(least), None) => format!("{least} or more"),
        (None, Some(most)) => format!("at most {most}"),
        (None, None) => "a whole number".to_owned(),
    }
}

/// Something of the right shape to stand for what was wrong or missing.
pub fn placeholder(root: &Schema, schema: &Schema) -> Yaml {
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
