//! A key as the feed tells it.

use crate::control::model::{ApiKey, Fault, MOST_LIVING_SECRETS};
use crate::control::secret::hex;
use crate::control::time::rfc3339;
use crate::wire::{FeedLine, KeyLine, SecretLine};

/// The JSON line of a key, without a newline.
///
/// Dead secrets stay in it, so that a gate can tell a revoked secret from an unknown one, but only the newest
/// [`MOST_LIVING_SECRETS`] in all: a key that is rotated for years must not grow for ever. No living one is ever cut
/// off, since a key cannot have more of them and they are the newest.
pub fn render(key: &ApiKey, plan: &str) -> Result<String, Fault> {
    let line = FeedLine::Key(KeyLine {
        revision: key.revision,
        id: key.id.clone(),
        organization: key.organization_id.clone(),
        environment: key.environment.clone(),
        scopes: key.scopes.clone(),
        plan: plan.to_owned(),
        secrets: told(key),
        expires_at: key.expires_at_ms.map(rfc3339),
        disabled: key.disabled,
        revoked: key.revoked_at_ms.is_some(),
    });
    serde_json::to_string(&line).map_err(|e| Fault::Internal(format!("a key's line cannot be written: {e}")))
}

fn told(key: &ApiKey) -> Vec<SecretLine> {
    // A short grace after a long one lets a newer secret die before an older one. Sorting by the date of death first
    // keeps every living secret in front of every dead one, whatever the time is.
    let mut secrets: Vec<_> = key.secrets.iter().enumerate().collect();
    secrets.sort_by_key(|(age, secret)| (std::cmp::Reverse(secret.not_after_ms.unwrap_or(i64::MAX)), *age));
    let mut told: Vec<_> = secrets.into_iter().take(MOST_LIVING_SECRETS).collect();
    told.sort_by_key(|(age, _)| *age);
    told.into_iter()
        .map(|(_, secret)| SecretLine {
            sha256: hex(&secret.digest),
            not_after: secret.not_after_ms.map(rfc3339),
        })
        .collect()
}
