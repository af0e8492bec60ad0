//! The small pieces of HTML that pages share.

use std::fmt;

use askama::filters::HtmlSafe;
use jiff::Timestamp;

use crate::control::model::{ApiKey, FieldFault, KeyStatus};
use crate::control::secret::Digest;
use crate::control::time::{LAST_MS, rfc3339};

/// HTML that was made here; templates write it as it is. Whatever came from outside went through [`escape`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Markup(String);

impl fmt::Display for Markup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl HtmlSafe for Markup {}

impl Markup {
    /// Text that stays text.
    pub fn text(text: &str) -> Self {
        Self(escape(text))
    }

    /// A rendered template, which escapes for itself.
    pub fn of(template: &impl askama::Template) -> Self {
        Self(template.render().unwrap_or_default())
    }
}

/// Text as text, also within a quoted attribute.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
    }
    escaped
}

/// How long ago or ahead, with the date for whoever points at it.
pub fn when(at_ms: i64, now_ms: i64) -> Markup {
    time_element(at_ms, &relative(at_ms, now_ms), &date_text(at_ms))
}

/// As [`when`], or `never` where there is no date.
pub fn when_or(at_ms: Option<i64>, now_ms: i64, never: &str) -> Markup {
    match at_ms {
        Some(at_ms) => when(at_ms, now_ms),
        None => Markup(format!("<span class=\"muted\">{}</span>", escape(never))),
    }
}

/// A date and a time.
pub fn date(at_ms: i64) -> Markup {
    time_element(at_ms, &date_text(at_ms), &rfc3339(at_ms))
}

fn time_element(at_ms: i64, text: &str, title: &str) -> Markup {
    let iso = rfc3339(at_ms);
    Markup(format!(
        "<time datetime=\"{iso}\" title=\"{}\">{}</time>",
        escape(title),
        escape(text)
    ))
}

/// `24 Nov 2026, 10:00 UTC`.
pub fn date_text(at_ms: i64) -> String {
    format_time(at_ms, "%-d %b %Y, %H:%M UTC")
}

/// `2026-11-24`, as `<input type=date>` wants it.
pub fn day_text(at_ms: i64) -> String {
    format_time(at_ms, "%Y-%m-%d")
}

/// A date in a form of strftime.
pub fn format_time(at_ms: i64, format: &str) -> String {
    match Timestamp::from_millisecond(at_ms.clamp(0, LAST_MS)) {
        Ok(timestamp) => timestamp.strftime(format).to_string(),
        // Clamped above, so this cannot be reached.
        Err(_) => rfc3339(at_ms),
    }
}

/// `3 minutes ago`, `in 23 hours`.
pub fn relative(at_ms: i64, now_ms: i64) -> String {
    let distance_s = (now_ms - at_ms).abs() / 1_000;
    if distance_s < 5 && at_ms <= now_ms {
        return "just now".to_owned();
    }
    if at_ms <= now_ms {
        return format!("{} ago", duration(distance_s));
    }
    // What lies ahead is rounded to the nearest: a grace of an hour reads as an hour, also a moment after it began.
    let half_a_unit_s = match distance_s {
        ..60 => 0,
        60..3_600 => 30,
        3_600..172_800 => 1_800,
        172_800..5_184_000 => 43_200,
        _ => 1_296_000,
    };
    format!("in {}", duration(distance_s + half_a_unit_s))
}

/// A length of time in its largest unit: `3 minutes`, `23 hours`.
pub fn duration(seconds: i64) -> String {
    let (count, unit) = match seconds {
        ..60 => (seconds, "second"),
        60..3_600 => (seconds / 60, "minute"),
        3_600..172_800 => (seconds / 3_600, "hour"),
        172_800..5_184_000 => (seconds / 86_400, "day"),
        5_184_000..63_072_000 => (seconds / 2_592_000, "month"),
        _ => (seconds / 31_536_000, "year"),
    };
    if count == 1 {
        format!("1 {unit}")
    } else {
        format!("{count} {unit}s")
    }
}

/// `12,345`.
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// How a key stands, as a coloured word.
pub fn status_badge(key: &ApiKey, now_ms: i64) -> Markup {
    let status = key.status(now_ms);
    let (word, about) = match status {
        KeyStatus::Active => ("Active", "Requests with this key pass."),
        KeyStatus::Rotating => ("Rotating", "An old secret is still accepted."),
        KeyStatus::Expiring => ("Expiring", "Expires within seven days."),
        KeyStatus::Expired => ("Expired", "Refused since it expired."),
        KeyStatus::Disabled => ("Disabled", "Refused until it is enabled."),
        KeyStatus::Revoked => ("Revoked", "Refused for good."),
    };
    let class = status_word(status);
    Markup(format!("<span class=\"badge {class}\" title=\"{about}\">{word}</span>"))
}

/// The word for a status in addresses.
pub fn status_word(status: KeyStatus) -> &'static str {
    match status {
        KeyStatus::Active => "active",
        KeyStatus::Rotating => "rotating",
        KeyStatus::Expiring => "expiring",
        KeyStatus::Expired => "expired",
        KeyStatus::Disabled => "disabled",
        KeyStatus::Revoked => "revoked",
    }
}

/// Every status with its word.
pub const STATUSES: [KeyStatus; 6] = [
    KeyStatus::Active,
    KeyStatus::Rotating,
    KeyStatus::Expiring,
    KeyStatus::Expired,
    KeyStatus::Disabled,
    KeyStatus::Revoked,
];

/// What is shown of a secret: how it begins and ends.
pub fn masked(prefix: &str, last_four: &str) -> String {
    format!("{prefix}…{last_four}")
}

/// What is shown of a key's newest secret.
pub fn masked_key(key: &ApiKey) -> String {
    masked(
        &key.prefix,
        key.secrets.first().map(|s| s.last_four.as_str()).unwrap_or_default(),
    )
}

/// The first characters of a digest: enough to tell secrets apart.
pub fn short_digest(digest: &Digest) -> String {
    crate::control::secret::hex(&digest[..4])
}

/// A choice of a form.
pub struct Choice {
    pub value: String,
    pub text: String,
    pub selected: bool,
}

impl Choice {
    pub fn new(value: impl Into<String>, text: impl Into<String>, selected: &str) -> Self {
        let value = value.into();
        Self {
            selected: value == selected,
            text: text.into(),
            value,
        }
    }
}

/// What is wrong with the fields of a form.
#[derive(Default)]
pub struct Faults(pub Vec<FieldFault>);

impl Faults {
    /// A paragraph below the field, which the field's attributes refer to.
    pub fn of(&self, field: &str, label: &str) -> Markup {
        match self.find(field) {
            Some(fault) => Markup(format!(
                "<p class=\"field-fault\" id=\"{field}-fault\">{} {}.</p>",
                escape(label),
                escape(&fault.message)
            )),
            None => Markup::default(),
        }
    }

    /// The attributes of a field that has a fault.
    pub fn attributes(&self, field: &str) -> Markup {
        match self.find(field) {
            Some(_) => Markup(format!(" aria-invalid=\"true\" aria-describedby=\"{field}-fault\"")),
            None => Markup::default(),
        }
    }

    /// An alert above the form.
    pub fn summary(&self) -> Markup {
        if self.0.is_empty() {
            return Markup::default();
        }
        let what = if self.0.len() == 1 {
            "One field needs"
        } else {
            "Some fields need"
        };
        Markup(format!(
            "<div class=\"notice danger\" role=\"alert\">{what} your attention. Nothing was changed.</div>"
        ))
    }

    /// Whether the field has a fault.
    pub fn has(&self, field: &str) -> bool {
        self.find(field).is_some()
    }

    fn find(&self, field: &str) -> Option<&FieldFault> {
        let is_part = |name: &str| name.strip_prefix(field).is_some_and(|rest| rest.starts_with('['));
        self.0
            .iter()
            .find(|fault| fault.field == field || is_part(&fault.field))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_read_as_people_say_them() {
        assert_eq!(relative(1_000, 1_000), "just now");
        assert_eq!(relative(0, 60_000), "1 minute ago");
        assert_eq!(relative(24 * 3_600_000, 0), "in 24 hours");
        assert_eq!(relative(7_199_000, 0), "in 2 hours");
        assert_eq!(relative(0, 7_199_000), "1 hour ago");
        assert_eq!(relative(7 * 86_400_000, 0), "in 7 days");
        assert_eq!(relative(0, 400 * 86_400_000), "13 months ago");
        assert_eq!(date_text(1_795_514_400_000), "24 Nov 2026, 10:00 UTC");
        assert_eq!(day_text(1_795_514_400_000), "2026-11-24");
    }

    #[test]
    fn numbers_are_grouped() {
        assert_eq!(count(0), "0");
        assert_eq!(count(999), "999");
        assert_eq!(count(1_000), "1,000");
        assert_eq!(count(1_234_567), "1,234,567");
    }

    #[test]
    fn faults_quote_nothing_as_html() {
        let faults = Faults(vec![FieldFault::new("scopes[0]", "`<b>` is no scope")]);
        assert!(
            faults
                .of("scopes", "Scope")
                .to_string()
                .contains("`&lt;b&gt;` is no scope")
        );
        assert_eq!(faults.of("name", "Name"), Markup::default());
    }
}
