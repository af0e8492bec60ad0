//! The JSON Schema and the reference page, both from the shapes in `file`.

use std::fmt::Write;
use std::sync::OnceLock;

use serde_json::{Map, Value, json};

use super::check::{alternatives, describe};
use super::file::File;
use super::reload::{Applies, applies};

/// The schema as generated, which files are checked against.
pub(super) fn raw() -> &'static Value {
    // Not state: a constant that is computed once, since schemars has no const evaluation.
    static SCHEMA: OnceLock<Value> = OnceLock::new();
    SCHEMA.get_or_init(|| schemars::schema_for!(File).to_value())
}

/// The JSON Schema (draft 2020-12) for editors. Each setting says in `x-applies` whether a reload changes it, and any
/// scalar may also be written with `${…}`.
pub fn json_schema() -> Value {
    let mut schema = raw().clone();
    let root = raw();
    annotate(&mut schema, root, root, "");
    if let Some(definitions) = schema.get_mut("$defs").and_then(Value::as_object_mut) {
        for definition in definitions.values_mut() {
            allow_variables(definition);
        }
    }
    allow_variables(&mut schema);
    schema
}

/// The reference page of every setting, in Markdown.
pub fn reference() -> String {
    let mut page = String::from(
        "# Configuration\n\n\
         Generated from the types that read the file (`tollgate config schema --format markdown`); a test keeps it in step.\n\n\
         One YAML file. Durations are a whole number and a unit (`500ms`, `30s`, `5m`, `24h`, `30d`), sizes are bytes or a number with `KiB`, `MiB` or `GiB`,\n\
         relative paths start at the file's directory. `${NAME}`, `${NAME:-default}` and `${file:/path}` are replaced in any value, after parsing; `$${` stands for `${`.\n\
         `tollgate check` tells every mistake of a file at once.\n\n\
         The last column says what a change needs: **reload** (`tollgate reload`, SIGHUP) applies it without dropping a request or a count; **restart**: it takes effect at the next start, and a reload says so.\n",
    );
    section(&mut page, raw(), raw(), "", "The file", &mut Vec::new());
    page
}

fn section(page: &mut String, root: &Value, schema: &Value, shape: &str, title: &str, open: &mut Vec<String>) {
    let Some(properties) = schema.get("properties").and_then(Value::as_object) else {
        return;
    };
    let required: Vec<&str> = schema
        .get("required")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let _ = write!(page, "\n## {title}\n\n");
    if let Some(text) = schema
        .get("description")
        .and_then(Value::as_str)
        .filter(|_| !shape.is_empty())
    {
        let _ = write!(page, "{}\n\n", text.replace('\n', " "));
    }
    page.push_str("| setting | what | value | default | applies |\n|---|---|---|---|---|\n");
    let mut below = Vec::new();
    for (name, property) in properties {
        let shape = join(shape, name);
        let choices = alternatives(root, property);
        let default = match property
            .get("default")
            .or_else(|| choices.first().and_then(|one| one.get("default")))
        {
            _ if required.contains(&name.as_str()) => "required".to_owned(),
            Some(Value::Object(_)) | Some(Value::Null) | None => "–".to_owned(),
            Some(Value::Array(items)) if items.is_empty() => "–".to_owned(),
            Some(Value::String(text)) => format!("`{text}`"),
            Some(value) => format!("`{value}`"),
        };
        let text = property
            .get("description")
            .and_then(Value::as_str)
            .unwrap_or("")
            .replace('\n', " ");
        let value = describe(&choices).replace('|', "\\|");
        let when = match applies(&shape) {
            Applies::Reload => "reload",
            Applies::Restart => "restart",
        };
        let _ = writeln!(
            page,
            "| `{name}` | {} | {value} | {default} | {when} |",
            text.replace('|', "\\|")
        );
        for (shape, schema) in inner(root, property, &shape) {
            below.push((shape, schema));
        }
    }
    for (shape, schema) in below {
        if !open.contains(&shape) {
            open.push(shape.clone());
            let title = format!("`{shape}`");
            section(page, root, schema, &shape, &title, open);
        }
    }
}

/// The mappings directly below a setting, through lists, names and unions.
fn inner<'a>(root: &'a Value, schema: &'a Value, shape: &str) -> Vec<(String, &'a Value)> {
    let mut found = Vec::new();
    for choice in alternatives(root, schema) {
        if choice.get("properties").is_some() {
            found.push((shape.to_owned(), choice));
        } else if let Some(items) = choice.get("items") {
            found.extend(inner(root, items, &format!("{shape}[]")));
        } else if let Some(named) = choice.get("additionalProperties").filter(|named| named.is_object()) {
            found.extend(inner(root, named, &format!("{shape}.*")));
        }
    }
    found
}

fn join(shape: &str, name: &str) -> String {
    if shape.is_empty() {
        name.to_owned()
    } else {
        format!("{shape}.{name}")
    }
}

/// Puts `x-applies` beside every top setting and every setting of a section.
fn annotate(target: &mut Value, root: &Value, schema: &Value, shape: &str) {
    let Some(properties) = schema.get("properties").and_then(Value::as_object) else {
        return;
    };
    for (name, property) in properties {
        let shape = join(shape, name);
        let when = match applies(&shape) {
            Applies::Reload => "reload",
            Applies::Restart => "restart",
        };
        if let Some(Value::Object(written)) = target.get_mut("properties").and_then(|all| all.get_mut(name)) {
            written.insert("x-applies".to_owned(), json!(when));
        }
        let reference = alternatives_reference(property);
        if let Some(reference) = reference {
            let definition = root.pointer(reference.trim_start_matches('#')).cloned();
            if let (Some(definition), Some(pointer)) = (definition, reference.strip_prefix("#/$defs/")) {
                let mut annotated = definition.clone();
                annotate(&mut annotated, root, &definition, &shape);
                if let Some(place) = target.get_mut("$defs").and_then(|all| all.get_mut(pointer)) {
                    *place = annotated;
                }
            }
        }
    }
}

fn alternatives_reference(schema: &Value) -> Option<&str> {
    if let Some(reference) = schema.get("$ref").and_then(Value::as_str) {
        return Some(reference);
    }
    schema.get("anyOf")?.as_array()?.iter().find_map(alternatives_reference)
}

/// Numbers, truth values and words may be written as `${…}` too.
fn allow_variables(schema: &mut Value) {
    let Some(object) = schema.as_object_mut() else { return };
    for (name, below) in object.iter_mut() {
        match below {
            Value::Object(_) if name == "properties" => {
                for property in below.as_object_mut().into_iter().flat_map(Map::values_mut) {
                    allow_variables(property);
                    wrap_scalar(property);
                }
            }
            Value::Object(_) if name == "items" || name == "additionalProperties" => {
                allow_variables(below);
                wrap_scalar(below);
            }
            Value::Array(members) if name == "anyOf" || name == "oneOf" => members.iter_mut().for_each(allow_variables),
            _ => {}
        }
    }
}

fn wrap_scalar(schema: &mut Value) {
    let variable = json!({"type": "string", "pattern": "\\$\\{"});
    let Some(object) = schema.as_object_mut() else { return };
    let scalar = object.get("type").is_some_and(|kind| {
        let names: Vec<&str> = match kind {
            Value::String(one) => vec![one],
            Value::Array(several) => several.iter().filter_map(Value::as_str).collect(),
            _ => Vec::new(),
        };
        names.iter().any(|name| matches!(*name, "integer" | "boolean"))
    });
    if scalar || object.contains_key("enum") || object.contains_key("const") {
        let mut outer = Map::new();
        for keep in ["description", "default", "x-applies"] {
            if let Some(value) = object.remove(keep) {
                outer.insert(keep.to_owned(), value);
            }
        }
        let inner = Value::Object(std::mem::take(object));
        outer.insert("anyOf".to_owned(), json!([inner, variable]));
        *object = outer;
    } else if let Some(Value::Array(members)) = object.get_mut("anyOf") {
        members.push(variable);
    }
}
