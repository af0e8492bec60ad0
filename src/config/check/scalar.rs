//! A scalar against the schemas that it may follow.

use serde_json::Value as Schema;
use serde_yaml::Value as Yaml;

use super::shape::{choices, describe, is_type, range};
use crate::config::fault::did_you_mean;
use crate::config::scalar::{describe_form, form};
use crate::config::tree::Scalar;

/// The value that a scalar stands for.
///
/// # Errors
/// What would have been right.
pub fn check_scalar(scalar: &Scalar, alternatives: &[&Schema]) -> Result<Yaml, String> {
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
        match check_against(scalar, &looks, schema) {
            Some(Ok(value)) => return Ok(value),
            Some(Err(message)) => told = Some(message),
            None => {}
        }
    }
    Err(told.unwrap_or_else(|| fits_none(scalar, &looks, alternatives)))
}

/// `None`: the schema is about another type.
fn check_against(scalar: &Scalar, looks: &Looks, schema: &Schema) -> Option<Result<Yaml, String>> {
    // What a variable holds may be a secret, and a message may quote it.
    let unquoted = |message: String| match scalar.written {
        Some(_) => format!("expected {}, found {}", describe(&[schema]), found(scalar, looks)),
        None => message,
    };
    if let Some(choices) = choices(schema) {
        return choices.iter().find_map(|choice| chosen(choice, scalar, looks)).map(Ok);
    }
    match looks {
        Looks::Number(Some(number)) if is_type(schema, "integer") => {
            let number = in_range(*number, schema).map(|()| Yaml::Number((*number).into()));
            return Some(number.map_err(unquoted));
        }
        Looks::Truth(truth) if is_type(schema, "boolean") => return Some(Ok(Yaml::Bool(*truth))),
        _ => {}
    }
    if !is_type(schema, "string") {
        return None;
    }
    let text = || Yaml::String(scalar.text.clone());
    let format = schema.get("format").and_then(Schema::as_str);
    Some(match format.and_then(form) {
        Some(check) => check(&scalar.text).map(|()| text()).map_err(unquoted),
        None if matches!(looks, Looks::Text) || scalar.written.is_some() => Ok(text()),
        None if format.is_some_and(|format| describe_form(format).is_some()) => {
            Err("expected text; put it into quotes".to_owned())
        }
        None => Err(format!(
            "expected text, found {}; put it into quotes: \"{}\"",
            found(scalar, looks),
            scalar.text
        )),
    })
}

fn chosen(choice: &Schema, scalar: &Scalar, looks: &Looks) -> Option<Yaml> {
    match (choice, looks) {
        (Schema::String(choice), _) if *choice == scalar.text => Some(Yaml::String(scalar.text.clone())),
        (Schema::Bool(choice), Looks::Truth(truth)) if choice == truth => Some(Yaml::Bool(*truth)),
        _ => None,
    }
}

fn fits_none(scalar: &Scalar, looks: &Looks, alternatives: &[&Schema]) -> String {
    let words: Vec<&str> = alternatives
        .iter()
        .filter_map(|schema| choices(schema))
        .flatten()
        .filter_map(Schema::as_str)
        .collect();
    if words.len() > 1 && matches!(looks, Looks::Text) && scalar.written.is_none() {
        return format!(
            "unknown value \"{}\"{} (one of: {})",
            scalar.text,
            did_you_mean(&scalar.text, words.iter().copied()),
            words.join(", ")
        );
    }
    let wants_none = |schema: &&Schema| is_type(schema, "integer") || is_type(schema, "boolean");
    let has_quotes = !scalar.plain && scalar.written.is_none();
    let hint = if has_quotes && alternatives.iter().any(wants_none) && !matches!(looks_plain(&scalar.text), Looks::Text)
    {
        "; take the quotes away"
    } else {
        ""
    };
    format!(
        "expected {}, found {}{hint}",
        describe(alternatives),
        found(scalar, looks)
    )
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
    looks_plain(&scalar.text)
}

fn looks_plain(text: &str) -> Looks {
    match text {
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

fn in_range(number: i64, schema: &Schema) -> Result<(), String> {
    let bound = |name: &str| schema.get(name).and_then(Schema::as_i64);
    let (least, most) = (bound("minimum"), bound("maximum"));
    if least.is_none_or(|least| number >= least) && most.is_none_or(|most| number <= most) {
        return Ok(());
    }
    Err(format!("must be {}, found {number}", range(least, most)))
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
