//! What needs no server: key lines, fresh secrets, checks of a secret's form, and dates as people write them.

use std::collections::HashSet;
use std::io::{BufRead, Read};
use std::path::Path;
use std::time::Duration;

use serde_json::json;

use super::args::{ImportArgs, LineArgs};
use super::output::{Output, shows_progress};
use super::{Exit, Failure};
use crate::config;
use crate::gate::key::{self, BASE62, CHECKSUM_LEN, FOREIGN_MAX_LEN, FOREIGN_MIN_LEN, RANDOM_LEN, SecretDigest};
use crate::wire::{FeedLine, KeyLine, SecretLine};

/// `keys hash`: one secret from standard input, its key line to standard output.
pub fn hash(args: &LineArgs, output: &Output) -> Result<(), Failure> {
    let secret = read_secret()?;
    output.text(&line(&secret, args)?)
}

/// `keys new`: a fresh secret.
pub fn new_secret(prefix: &str, output: &Output) -> Result<(), Failure> {
    let well_formed = prefix.len() <= 19
        && prefix.ends_with('_')
        && prefix.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    if !well_formed {
        let message = format!("\"{prefix}\" is no prefix: letters, digits and _, at most 19, with _ at the end");
        return Err(Failure::new(Exit::Usage, message));
    }
    let mut secret = prefix.to_owned();
    let mut random = [0_u8; 64];
    while secret.len() < prefix.len() + RANDOM_LEN {
        getrandom::fill(&mut random)
            .map_err(|error| Failure::new(Exit::Failure, format!("the system gives no randomness: {error}")))?;
        // 248 = 4 · 62: larger bytes would make eight of the characters likelier than the others.
        let fair = random
            .iter()
            .filter(|byte| **byte < 248)
            .map(|byte| char::from(BASE62[usize::from(byte % 62)]));
        secret.extend(fair.take(prefix.len() + RANDOM_LEN - secret.len()));
    }
    let checksum = key::checksum(secret.as_bytes());
    secret.extend(checksum.map(char::from));
    if output.is_json() {
        return output.value(&json!({"apiKey": secret}));
    }
    output.text(&secret)
}

/// `keys verify`: the form and the checksum of a secret from standard input. It is never printed.
pub fn verify(config_path: Option<&Path>, output: &Output) -> Result<(), Failure> {
    let secret = read_secret()?;
    let prefixes = match config_path {
        Some(path) => {
            let config = config::load(path, &config::process_env)?;
            config
                .keys
                .environments
                .into_iter()
                .map(|environment| (environment.name, environment.prefix))
                .collect()
        }
        None => Vec::new(),
    };
    match judge(&secret, &prefixes) {
        Ok(verdict) => {
            if output.is_json() {
                return output
                    .value(&json!({"wellFormed": true, "environment": verdict.environment, "prefix": verdict.prefix}));
            }
            let environment = verdict
                .environment
                .map(|name| format!(", environment {name}"))
                .unwrap_or_default();
            output.text(&format!(
                "well formed: prefix {}{environment}, checksum right",
                verdict.prefix
            ))
        }
        Err(why) => Err(Failure {
            exit: Exit::Failure,
            message: format!("not well formed: {why}"),
            json: Some(json!({"wellFormed": false, "reason": why})),
        }),
    }
}

#[derive(Debug)]
struct Verdict {
    prefix: String,
    environment: Option<String>,
}

fn judge(secret: &str, prefixes: &[(String, String)]) -> Result<Verdict, String> {
    let tail = RANDOM_LEN + CHECKSUM_LEN;
    let known = prefixes.iter().find(|(_, prefix)| secret.starts_with(prefix.as_str()));
    if known.is_none() && !prefixes.is_empty() {
        let names: Vec<&str> = prefixes.iter().map(|(_, prefix)| prefix.as_str()).collect();
        return Err(format!("it begins with none of our prefixes ({})", names.join(", ")));
    }
    let length = known.map(|(_, prefix)| prefix.len() + tail);
    if secret.len() <= tail || length.is_some_and(|length| secret.len() != length) {
        let right = length.unwrap_or(tail + 1);
        return Err(format!(
            "it has {} characters, {right}{} are right",
            secret.len(),
            if length.is_some() { "" } else { " or more" }
        ));
    }
    let (payload, checksum) = secret.as_bytes().split_at(secret.len() - CHECKSUM_LEN);
    if !payload[payload.len() - RANDOM_LEN..]
        .iter()
        .chain(checksum)
        .all(u8::is_ascii_alphanumeric)
    {
        return Err(
            "its last 36 characters are not all letters and digits: cut short, or not issued by Tollgate".to_owned(),
        );
    }
    if key::checksum(payload) != checksum {
        return Err("its checksum is wrong: mistyped, cut short, or not issued by Tollgate".to_owned());
    }
    // All bytes up to here are known to be ASCII only in the tail; the prefix may be anything.
    let prefix = String::from_utf8_lossy(&payload[..payload.len() - RANDOM_LEN]).into_owned();
    Ok(Verdict {
        prefix,
        environment: known.map(|(name, _)| name.clone()),
    })
}

/// `keys import`: secrets of another system as key lines.
pub fn import(args: &ImportArgs, output: &Output) -> Result<(), Failure> {
    let text = if args.file.as_os_str() == "-" {
        let mut text = String::new();
        std::io::stdin().lock().read_to_string(&mut text)?;
        text
    } else {
        std::fs::read_to_string(&args.file)
            .map_err(|error| Failure::new(Exit::Failure, format!("cannot read {}: {error}", args.file.display())))?
    };
    let rows = rows(&text)?;
    let progress = (shows_progress() && rows.len() >= 10_000).then(|| indicatif::ProgressBar::new(rows.len() as u64));
    let (mut lines, mut faults) = (String::new(), Vec::new());
    let (mut secrets, mut ids) = (HashSet::new(), HashSet::new());
    for (number, row) in &rows {
        match row.line(&args.line) {
            Ok((digest, id, _)) if !secrets.insert(digest) => {
                faults.push(format!("line {number}: the secret of {id} was there before"))
            }
            Ok((_, id, _)) if !ids.insert(id.clone()) => {
                faults.push(format!("line {number}: the id {id} was there before"))
            }
            Ok((_, _, line)) => {
                lines.push_str(&line);
                lines.push('\n');
            }
            Err(why) => faults.push(format!("line {number}: {why}")),
        }
        if let Some(progress) = &progress {
            progress.inc(1);
        }
    }
    if let Some(progress) = progress {
        progress.finish_and_clear();
    }
    if !faults.is_empty() {
        let more = faults.len().saturating_sub(20);
        faults.truncate(20);
        let more = if more > 0 {
            format!("\n  and {more} more")
        } else {
            String::new()
        };
        return Err(Failure::new(
            Exit::Failure,
            format!("nothing imported:\n  {}{more}", faults.join("\n  ")),
        ));
    }
    output.text(&lines)?;
    output.remark(&format!(
        "{} keys. A gate reads them with feed: {{file: …}}; keys.foreign: accept lets keys of any form in.",
        rows.len()
    ));
    Ok(())
}

/// One row of an import, as far as its columns say.
#[derive(Default)]
struct Row {
    secret: String,
    id: Option<String>,
    organization: Option<String>,
    environment: Option<String>,
    scopes: Option<Vec<String>>,
    plan: Option<String>,
    expires: Option<String>,
}

impl Row {
    fn line(&self, defaults: &LineArgs) -> Result<([u8; 32], String, String), String> {
        let args = LineArgs {
            id: self.id.clone().or_else(|| defaults.id.clone()),
            organization: self
                .organization
                .clone()
                .unwrap_or_else(|| defaults.organization.clone()),
            environment: self.environment.clone().unwrap_or_else(|| defaults.environment.clone()),
            scope: self.scopes.clone().unwrap_or_else(|| defaults.scope.clone()),
            plan: self.plan.clone().unwrap_or_else(|| defaults.plan.clone()),
            expires: self.expires.clone().or_else(|| defaults.expires.clone()),
        };
        let digest = SecretDigest::of(self.secret.as_bytes()).0;
        let line = line(&self.secret, &args).map_err(|failure| failure.message)?;
        Ok((digest, args.id.unwrap_or_else(|| derived_id(&digest)), line))
    }
}

/// The rows with their line numbers.
fn rows(text: &str) -> Result<Vec<(usize, Row)>, Failure> {
    let mut lines = text
        .lines()
        .enumerate()
        .map(|(index, line)| (index + 1, line.trim_end_matches('\r')));
    let mut lines = lines.by_ref().filter(|(_, line)| !line.trim().is_empty()).peekable();
    let separator = lines
        .peek()
        .map(|(_, line)| if line.contains('\t') { '\t' } else { ',' })
        .unwrap_or(',');
    let heading: Option<Vec<String>> = lines
        .next_if(|(_, line)| {
            line.split(separator)
                .any(|name| name.trim().eq_ignore_ascii_case("secret"))
        })
        .map(|(_, line)| {
            line.split(separator)
                .map(|name| name.trim().to_ascii_lowercase())
                .collect()
        });
    let known = [
        "secret",
        "id",
        "organization",
        "environment",
        "scopes",
        "plan",
        "expires",
    ];
    if let Some(unknown) = heading.iter().flatten().find(|name| !known.contains(&name.as_str())) {
        let message = format!("unknown column \"{unknown}\"; the columns are {}", known.join(", "));
        return Err(Failure::new(Exit::Usage, message));
    }
    let row = |line: &str| {
        let Some(heading) = &heading else {
            return Row {
                secret: line.trim().to_owned(),
                ..Row::default()
            };
        };
        let mut row = Row::default();
        for (name, value) in heading.iter().zip(line.split(separator).map(str::trim)) {
            let value = Some(value.to_owned()).filter(|value| !value.is_empty());
            match (name.as_str(), value) {
                ("secret", value) => row.secret = value.unwrap_or_default(),
                ("id", value) => row.id = value,
                ("organization", value) => row.organization = value,
                ("environment", value) => row.environment = value,
                ("scopes", value) => {
                    row.scopes = value.map(|names| names.split_whitespace().map(str::to_owned).collect())
                }
                ("plan", value) => row.plan = value,
                (_, value) => row.expires = value,
            }
        }
        row
    };
    Ok(lines.map(|(number, line)| (number, row(line))).collect())
}

fn line(secret: &str, args: &LineArgs) -> Result<String, Failure> {
    let usage = |message: String| Failure::new(Exit::Usage, message);
    if !(FOREIGN_MIN_LEN..=FOREIGN_MAX_LEN).contains(&secret.len())
        || !secret.bytes().all(|byte| byte.is_ascii_graphic())
    {
        return Err(usage(format!(
            "a secret is {FOREIGN_MIN_LEN} to {FOREIGN_MAX_LEN} visible ASCII characters; this one is not"
        )));
    }
    let digest = SecretDigest::of(secret.as_bytes()).0;
    let key = KeyLine {
        revision: 0,
        id: args.id.clone().unwrap_or_else(|| derived_id(&digest)),
        organization: args.organization.clone(),
        environment: args.environment.clone(),
        scopes: args.scope.clone(),
        plan: args.plan.clone(),
        secrets: vec![SecretLine {
            sha256: hex(&digest),
            not_after: None,
        }],
        expires_at: args.expires.as_deref().map(future).transpose()?,
        disabled: false,
        revoked: false,
    };
    serde_json::to_string(&FeedLine::Key(key)).map_err(|error| Failure::new(Exit::Failure, error))
}

/// An id that stays the same whenever the same secret is hashed, and tells nothing about it.
fn derived_id(digest: &[u8; 32]) -> String {
    format!("key_{}", hex(&SecretDigest::of(digest).0[..8]))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A secret from standard input: its first line. An argument would be seen by everybody on the machine.
fn read_secret() -> Result<String, Failure> {
    let mut text = String::new();
    std::io::stdin().lock().take(4_096).read_line(&mut text)?;
    match text.trim() {
        "" => Err(Failure::new(
            Exit::Usage,
            "no secret on standard input; for example: tollgate keys hash < secret.txt",
        )),
        secret => Ok(secret.to_owned()),
    }
}

/// A date, or a time from now, as RFC 3339 with milliseconds.
///
/// # Errors
/// Usage.
pub fn future(text: &str) -> Result<String, Failure> {
    moment(text, 1)
}

/// A date, or a time ago.
///
/// # Errors
/// Usage.
pub fn past(text: &str) -> Result<String, Failure> {
    moment(text, -1)
}

fn moment(text: &str, direction: i64) -> Result<String, Failure> {
    let wrong = || {
        Failure::new(
            Exit::Usage,
            format!("\"{text}\" is neither a date (2027-01-31T00:00:00Z) nor a time such as 90d"),
        )
    };
    let at = match config::parse_duration(text) {
        Ok(span) => {
            let now = std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .unwrap_or(Duration::ZERO);
            let shift = i64::try_from(span.as_millis()).map_err(|_| wrong())?;
            jiff::Timestamp::from_millisecond(now.as_millis() as i64 + direction * shift).map_err(|_| wrong())?
        }
        Err(_) if text.len() == 10 => format!("{text}T00:00:00Z")
            .parse::<jiff::Timestamp>()
            .map_err(|_| wrong())?,
        Err(_) => text.parse::<jiff::Timestamp>().map_err(|_| wrong())?,
    };
    Ok(format!("{at:.3}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fresh(prefix: &str) -> String {
        let payload = format!("{prefix}{}", "aB3".repeat(10));
        let checksum = key::checksum(payload.as_bytes());
        format!("{payload}{}", String::from_utf8(checksum.to_vec()).unwrap())
    }

    fn prefixes() -> Vec<(String, String)> {
        vec![
            ("live".to_owned(), "pxk_live_".to_owned()),
            ("test".to_owned(), "pxk_test_".to_owned()),
        ]
    }

    #[test]
    fn a_right_key_is_recognised_and_a_wrong_one_is_not() {
        let secret = fresh("pxk_test_");
        assert_eq!(
            judge(&secret, &prefixes()).unwrap().environment.as_deref(),
            Some("test")
        );
        assert_eq!(judge(&secret, &[]).unwrap().prefix, "pxk_test_");
        let mut mistyped = secret.clone().into_bytes();
        mistyped[12] = if mistyped[12] == b'Z' { b'Y' } else { b'Z' };
        assert!(
            judge(&String::from_utf8(mistyped).unwrap(), &prefixes())
                .unwrap_err()
                .contains("checksum")
        );
        assert!(judge(&secret[..40], &prefixes()).unwrap_err().contains("characters"));
        assert!(
            judge(&fresh("sk_"), &prefixes())
                .unwrap_err()
                .contains("none of our prefixes")
        );
        for odd in [
            "",
            "é",
            "pxk_live_",
            &"é".repeat(30),
            &format!("pxk_live_{}", "é".repeat(18)),
        ] {
            assert!(judge(odd, &prefixes()).is_err() && judge(odd, &[]).is_err(), "{odd}");
        }
    }

    #[test]
    fn dates_and_times() {
        assert_eq!(future("2027-01-31T12:00:00Z").unwrap(), "2027-01-31T12:00:00.000Z");
        assert_eq!(future("2027-01-31").unwrap(), "2027-01-31T00:00:00.000Z");
        assert_eq!(future("2027-01-31T12:00:00+02:00").unwrap(), "2027-01-31T10:00:00.000Z");
        assert!(future("1h").unwrap() > past("1h").unwrap());
        assert!(future("tomorrow").is_err());
    }

    #[test]
    fn imports_read_columns_or_bare_secrets() {
        let bare = rows("one-secret-of-theirs\n\nanother-secret-of-theirs\r\n").unwrap();
        assert_eq!(
            bare.iter()
                .map(|(number, row)| (*number, row.secret.as_str()))
                .collect::<Vec<_>>(),
            [(1, "one-secret-of-theirs"), (3, "another-secret-of-theirs")]
        );
        let table = rows("id,secret,scopes\nk1,one-secret-of-theirs,a:b c:d\n").unwrap();
        assert_eq!(table[0].1.id.as_deref(), Some("k1"));
        assert_eq!(table[0].1.scopes, Some(vec!["a:b".to_owned(), "c:d".to_owned()]));
        assert!(rows("secret,colour\nx,blue\n").is_err());
    }
}
