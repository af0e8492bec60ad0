//! The OpenAPI document as a page: plain HTML, no script.

use std::fmt::Write as _;

use serde_json::Value;

/// The page.
pub fn page(document: &Value) -> String {
    let mut html = String::with_capacity(64 * 1024);
    let title = escape(document["info"]["title"].as_str().unwrap_or_default());
    let version = escape(document["info"]["version"].as_str().unwrap_or_default());
    let about = escape(document["info"]["description"].as_str().unwrap_or_default());
    // Writing to a string cannot fail, here and below.
    let _ = write!(
        html,
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title>\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <link rel=\"stylesheet\" href=\"/docs/style.css\"></head><body><header><h1>{title} <small>{version}</small></h1>\
         <p>{about}</p><p><a href=\"/openapi.json\">openapi.json</a></p></header><nav aria-label=\"Sections\"><ul>"
    );
    let tags: Vec<&Value> = document["tags"]
        .as_array()
        .map(|tags| tags.iter().collect())
        .unwrap_or_default();
    for tag in &tags {
        let name = tag["name"].as_str().unwrap_or_default();
        let _ = write!(html, "<li><a href=\"#{}\">{}</a></li>", anchor(name), escape(name));
    }
    html.push_str("</ul></nav><main>");
    for tag in &tags {
        let name = tag["name"].as_str().unwrap_or_default();
        let description = escape(tag["description"].as_str().unwrap_or_default());
        let _ = write!(
            html,
            "<section id=\"{}\"><h2>{}</h2><p>{description}</p>",
            anchor(name),
            escape(name)
        );
        for (path, method, operation) in operations(document) {
            if operation["tags"][0].as_str() == Some(name) {
                push_operation(&mut html, document, path, method, operation);
            }
        }
        html.push_str("</section>");
    }
    html.push_str("</main></body></html>");
    html
}

fn operations(document: &Value) -> Vec<(&str, &str, &Value)> {
    let paths = document["paths"].as_object().into_iter().flatten();
    paths
        .flat_map(|(path, item)| {
            let methods = item.as_object().into_iter().flatten();
            methods.map(move |(method, operation)| (path.as_str(), method.as_str(), operation))
        })
        .collect()
}

fn push_operation(html: &mut String, document: &Value, path: &str, method: &str, operation: &Value) {
    let id = operation["operationId"].as_str().unwrap_or_default();
    let summary = escape(operation["summary"].as_str().unwrap_or_default());
    let _ = write!(
        html,
        "<article id=\"{}\"><h3><span class=\"method {method}\">{}</span> <code>{}</code></h3><p>{summary}</p>",
        anchor(id),
        method.to_uppercase(),
        escape(path),
    );
    if let Some(description) = operation["description"].as_str() {
        let _ = write!(html, "<p>{}</p>", escape(description));
    }
    let _ = write!(html, "<p class=\"who\">Who: {}</p>", escape(&who(operation)));
    let parameters = operation["parameters"].as_array().into_iter().flatten();
    let mut rows = String::new();
    for parameter in parameters {
        let name = parameter["name"].as_str().unwrap_or_default();
        let place = parameter["in"].as_str().unwrap_or_default();
        let description = parameter["description"].as_str().unwrap_or_default();
        push_row(
            &mut rows,
            name,
            &format!("{place}; {}", kind(&parameter["schema"])),
            description,
        );
    }
    push_table(html, "Parameters", &rows);
    let body = &operation["requestBody"]["content"]["application/json"]["schema"];
    push_table(html, "Body", &properties(document, body));
    html.push_str("<h4>Answers</h4><ul class=\"answers\">");
    for (status, response) in operation["responses"].as_object().into_iter().flatten() {
        let description = escape(response["description"].as_str().unwrap_or_default());
        let _ = write!(html, "<li><strong>{}</strong> {description}", escape(status));
        let schema = &response["content"]["application/json"]["schema"];
        let rows = if status.starts_with('2') {
            properties(document, &data(document, schema))
        } else {
            String::new()
        };
        if !rows.is_empty() {
            let _ = write!(html, "<details><summary>data</summary><table>{rows}</table></details>");
        }
        html.push_str("</li>");
    }
    html.push_str("</ul></article>");
}

fn who(operation: &Value) -> String {
    let mut names: Vec<&str> = Vec::new();
    for requirement in operation["security"].as_array().into_iter().flatten() {
        match requirement.as_object().and_then(|r| r.keys().next()) {
            Some(name) => names.push(name),
            None => names.push("anybody"),
        }
    }
    names.join(" or ")
}

fn properties(document: &Value, schema: &Value) -> String {
    let schema = resolve(document, schema);
    let mut rows = String::new();
    for part in schema["allOf"].as_array().into_iter().flatten() {
        rows.push_str(&properties(document, part));
    }
    for part in schema["oneOf"].as_array().into_iter().flatten() {
        rows.push_str(&properties(document, part));
    }
    let required: Vec<&str> = schema["required"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        let wanted = if required.contains(&name.as_str()) {
            ""
        } else {
            "; optional"
        };
        let description = property["description"].as_str().unwrap_or_default();
        push_row(&mut rows, name, &format!("{}{wanted}", kind(property)), description);
    }
    rows
}

fn data(document: &Value, schema: &Value) -> Value {
    resolve(document, schema)["properties"]["data"].clone()
}

fn resolve<'a>(document: &'a Value, schema: &'a Value) -> &'a Value {
    let name = schema["$ref"]
        .as_str()
        .and_then(|r| r.strip_prefix("#/components/schemas/"));
    name.map_or(schema, |name| &document["components"]["schemas"][name])
}

fn kind(schema: &Value) -> String {
    if let Some(reference) = schema["$ref"].as_str() {
        return reference.rsplit('/').next().unwrap_or_default().to_owned();
    }
    if let Some(words) = schema["enum"].as_array() {
        let words: Vec<_> = words.iter().filter_map(Value::as_str).collect();
        return words.join(" | ");
    }
    let alternatives = schema["oneOf"].as_array().or(schema["anyOf"].as_array());
    if let Some(alternatives) = alternatives {
        let kinds: Vec<_> = alternatives.iter().map(kind).collect();
        return kinds.join(" or ");
    }
    let own = match &schema["type"] {
        Value::String(name) => name.clone(),
        Value::Array(names) => names.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" or "),
        _ => "object".to_owned(),
    };
    match schema.get("items") {
        Some(items) => format!("{own} of {}", kind(items)),
        None => own,
    }
}

fn push_table(html: &mut String, title: &str, rows: &str) {
    if !rows.is_empty() {
        let _ = write!(html, "<h4>{title}</h4><table>{rows}</table>");
    }
}

fn push_row(rows: &mut String, name: &str, kind: &str, description: &str) {
    let _ = write!(
        rows,
        "<tr><th scope=\"row\"><code>{}</code></th><td>{}</td><td>{}</td></tr>",
        escape(name),
        escape(kind),
        escape(description)
    );
}

fn anchor(name: &str) -> String {
    name.chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// The page's style.
pub const STYLE: &str = "\
:root{color-scheme:light dark;--line:#8885;--soft:#8881}
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:0 auto;padding:1rem}
h2{margin-top:3rem;border-bottom:1px solid var(--line)}
h3{margin-top:2rem;font-size:1rem;overflow-wrap:anywhere}
h4{margin:1rem 0 .25rem;font-size:.9rem}
nav ul{display:flex;flex-wrap:wrap;gap:.5rem 1rem;list-style:none;padding:0}
code{font-family:ui-monospace,monospace}
.method{display:inline-block;min-width:4rem;padding:0 .5rem;border-radius:.25rem;background:var(--soft);text-align:center}
.who{font-size:.9rem;opacity:.8}
table{border-collapse:collapse;width:100%;font-size:.9rem;display:block;overflow-x:auto}
th,td{text-align:left;vertical-align:top;padding:.25rem .75rem .25rem 0;border-bottom:1px solid var(--line)}
.answers{padding-left:1rem;font-size:.9rem}
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_become_markup() {
        let document = serde_json::json!({
            "info": {"title": "<script>", "version": "\"", "description": "&"},
            "tags": [{"name": "<T>", "description": ""}],
            "paths": {"/<p>": {"get": {"tags": ["<T>"], "operationId": "x", "summary": "<i>", "responses": {}}}},
        });
        let html = page(&document);
        assert!(!html.contains("<script>") && !html.contains("<i>") && !html.contains("<T>") && !html.contains("/<p>"));
        assert!(html.contains("/&lt;p&gt;"));
    }
}
