//! Checks of what people send. Each collects its fault instead of stopping, so that all are told at once.

use crate::control::model::{Fault, FieldFault};
use crate::control::time::LAST_MS;

/// Collects faults by field. Begins with those that the caller found while reading: a field that could not even be read
/// is not judged again.
pub struct Check {
    faults: Vec<FieldFault>,
}

impl Check {
    pub fn new(faults: Vec<FieldFault>) -> Self {
        Self { faults }
    }

    /// Adds a fault, unless the field has one.
    pub fn fault(&mut self, field: &str, message: impl Into<String>) {
        if !self.has(field) {
            self.faults.push(FieldFault::new(field, message));
        }
    }

    /// Whether nothing was wrong so far.
    pub fn is_clean(&self) -> bool {
        self.faults.is_empty()
    }

    /// Whether the field has a fault, or a part of it has (`scopes[2]`).
    pub fn has(&self, field: &str) -> bool {
        self.faults
            .iter()
            .any(|f| f.field == field || f.field.strip_prefix(field).is_some_and(|r| r.starts_with('[')))
    }

    /// The value, or its type's empty one after noting that it is missing.
    pub fn required<T: Default>(&mut self, field: &str, value: Option<T>) -> T {
        if value.is_none() {
            self.fault(field, "is required");
        }
        value.unwrap_or_default()
    }

    /// A name for people: 1 to 100 characters, not only spaces, no control characters.
    pub fn name(&mut self, field: &str, name: &str) {
        let length = name.chars().count();
        if !(1..=100).contains(&length) {
            self.fault(field, "must have 1 to 100 characters");
        } else if name.chars().any(char::is_control) {
            self.fault(field, "must not contain control characters");
        } else if name.chars().all(|c| matches!(c, ' ' | '\u{a0}')) {
            self.fault(field, "must not be blank");
        }
    }

    /// An e-mail address, as HTML's `<input type=email>` has it, with a dot in the domain.
    pub fn email(&mut self, field: &str, email: &str) {
        if email.len() > 254 {
            self.fault(field, "must have at most 254 characters");
        } else if !is_email(email) {
            self.fault(field, "must be an e-mail address such as dev@example.com");
        }
    }

    /// A new password: 8 to 1024 characters of any kind (NIST SP 800-63B asks for a length and against rules of composition).
    pub fn password(&mut self, field: &str, password: &str) {
        if !(8..=1024).contains(&password.chars().count()) {
            self.fault(field, "must have 8 to 1024 characters");
        }
    }

    /// A date ahead of now.
    pub fn future(&mut self, field: &str, at_ms: Option<i64>, now_ms: i64) {
        if at_ms.is_some_and(|at| at <= now_ms || at > LAST_MS) {
            self.fault(field, "must lie in the future");
        }
    }

    /// All faults, if there are any.
    pub fn finish(self) -> Result<(), Fault> {
        if self.faults.is_empty() {
            Ok(())
        } else {
            Err(Fault::Validation(self.faults))
        }
    }
}

fn is_email(text: &str) -> bool {
    let Some((local, domain)) = text.rsplit_once('@') else {
        return false;
    };
    let local_is_fine = (1..=64).contains(&local.len())
        && local
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b".!#$%&'*+/=?^_`{|}~-".contains(&b));
    let label_is_fine = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    local_is_fine && domain.contains('.') && domain.split('.').all(label_is_fine)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn email_addresses() {
        for good in ["dev@example.com", "a.b+c@x-y.example.org", "o'hara@example.ie"] {
            assert!(is_email(good), "{good}");
        }
        for bad in [
            "",
            "dev",
            "dev@",
            "@example.com",
            "dev@localhost",
            "a b@example.com",
            "dev@-x.com",
            "dev@x..com",
            "é@x.com",
        ] {
            assert!(!is_email(bad), "{bad}");
        }
    }

    #[test]
    fn a_field_is_told_its_first_fault_only() {
        let mut check = Check::new(vec![FieldFault::new("scopes[1]", "must be a string")]);
        check.fault("scopes", "is required");
        check.name("name", "");
        check.name("name", "a\u{7}");
        let Err(Fault::Validation(faults)) = check.finish() else {
            panic!("there were faults")
        };
        assert_eq!(faults.len(), 2);
    }
}
