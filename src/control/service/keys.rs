//! Issue, change, rotate, revoke.

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::Service;
use super::check::Check;
use crate::control::model::{ApiKey, AuditNote, Caller, Fault, FieldFault, KeySecret, MOST_LIVING_SECRETS};
use crate::control::secret::{self, Digest, Secret};
use crate::control::settings::Environment;
use crate::control::store::{Claim, KeyQuery, Written};

/// A key to be made. Absent fields and the faults that were found while reading it are told together.
#[derive(Clone, Debug, Default)]
pub struct KeyDraft {
    pub faults: Vec<FieldFault>,
    pub name: Option<String>,
    pub environment: Option<String>,
    pub scopes: Option<Vec<String>>,
    pub expires_at_ms: Option<i64>,
}

/// What is to change on a key; absent: stays as it is.
#[derive(Clone, Debug, Default)]
pub struct KeyPatch {
    pub faults: Vec<FieldFault>,
    pub name: Option<String>,
    pub scopes: Option<Vec<String>>,
    /// The inner none: never.
    pub expires_at_ms: Option<Option<i64>>,
    pub disabled: Option<bool>,
}

/// A rotation; absent: the default grace.
#[derive(Clone, Debug, Default)]
pub struct RotateDraft {
    pub faults: Vec<FieldFault>,
    pub grace_s: Option<i64>,
}

/// A key with a secret that is shown this once.
#[derive(Clone, Debug)]
pub struct Issued {
    pub key: ApiKey,
    /// None where the request was carried out before.
    pub secret: Option<Secret>,
    /// When the secret that was replaced dies.
    pub grace_ends_at_ms: Option<i64>,
}

/// What is kept of an issue for its `Idempotency-Key`. The secret is not.
#[derive(Serialize, Deserialize)]
struct Outcome {
    key: ApiKey,
    grace_ends_at_ms: Option<i64>,
}

impl Service {
    /// Makes a key.
    pub async fn create_key(
        &self,
        caller: &Caller,
        organization: &str,
        draft: KeyDraft,
        idempotency_key: Option<&str>,
    ) -> Result<Issued, Fault> {
        let now_ms = self.now_ms();
        let fingerprint = fingerprint(&json!([
            draft.name,
            draft.environment,
            draft.scopes,
            draft.expires_at_ms
        ]));
        let mut check = Check::new(draft.faults);
        let name = check.required("name", draft.name);
        check.name("name", &name);
        let environment = check.required("environment", draft.environment);
        let environment = self.environment(&mut check, "environment", &environment);
        let scopes = check.required("scopes", draft.scopes);
        let scopes = self.scopes(&mut check, scopes);
        let record = |key: &ApiKey| outcome(key, None);
        let claim = idempotency_key.map(|idempotency_key| Claim {
            operation: "key.create".to_owned(),
            idempotency_key,
            fingerprint,
            record: &record,
        });
        // Before the expiry is judged: that it has passed since is no reason to refuse the replay of what was fine.
        if check.is_clean()
            && let Some(claim) = &claim
            && let Some(recorded) = self.store.outcome(organization, claim, now_ms).await?
        {
            return replay(&recorded);
        }
        check.future("expiresAt", draft.expires_at_ms, now_ms);
        check.finish()?;
        let Some(environment) = environment else {
            return Err(Fault::Internal("an unchecked environment".into()));
        };
        let (key, secret) = new_key(organization, name, environment, scopes, draft.expires_at_ms, now_ms)?;
        let note = note(
            &key,
            "key.create",
            json!({
                "name": key.name, "environment": key.environment, "scopes": key.scopes, "expiresAtMs": key.expires_at_ms,
            }),
        );
        let written = self
            .store
            .create_key(&key, MOST_KEYS, claim.as_ref(), &note, self.stamp(caller))
            .await?;
        self.issued(written, secret, None)
    }

    /// A page of keys.
    pub async fn keys(&self, query: &KeyQuery) -> Result<Vec<ApiKey>, Fault> {
        self.store.keys(query).await
    }

    /// One key, if it belongs to the organisation.
    pub async fn key(&self, organization: Option<&str>, id: &str) -> Result<ApiKey, Fault> {
        self.store.key(organization, id).await?.ok_or(Fault::NotFound)
    }

    /// Renames, re-scopes, disables, enables, sets or clears the expiry.
    pub async fn update_key(
        &self,
        caller: &Caller,
        organization: Option<&str>,
        id: &str,
        patch: KeyPatch,
    ) -> Result<ApiKey, Fault> {
        let now_ms = self.now_ms();
        // Whether there is such a key comes first: somebody else's is not found, whatever was sent.
        self.key(organization, id).await?;
        let mut check = Check::new(patch.faults);
        if let Some(name) = &patch.name {
            check.name("name", name);
        }
        let scopes = patch.scopes.map(|scopes| self.scopes(&mut check, scopes));
        check.future("expiresAt", patch.expires_at_ms.flatten(), now_ms);
        check.finish()?;
        let edit = |key: &mut ApiKey| {
            refuse_revoked(key)?;
            let before = key.clone();
            key.name = patch.name.clone().unwrap_or(before.name.clone());
            key.scopes = scopes.clone().unwrap_or(before.scopes.clone());
            key.expires_at_ms = patch.expires_at_ms.unwrap_or(before.expires_at_ms);
            key.disabled = patch.disabled.unwrap_or(before.disabled);
            Ok(note(key, "key.update", difference(&before, key)))
        };
        let written = self
            .store
            .edit_key(organization, id, &edit, None, self.stamp(caller))
            .await?;
        self.changed(written)
    }

    /// Adds a secret; the one before it lives on for the grace period. Earlier ones keep their dates of death: a second
    /// rotation never lengthens an earlier grace.
    pub async fn rotate_key(
        &self,
        caller: &Caller,
        organization: &str,
        id: &str,
        draft: RotateDraft,
        idempotency_key: Option<&str>,
    ) -> Result<Issued, Fault> {
        let now_ms = self.now_ms();
        let known = self.key(Some(organization), id).await?;
        let most_s = self.settings.max_grace_ms / 1_000;
        let mut check = Check::new(draft.faults);
        if draft.grace_s.is_some_and(|grace| !(0..=most_s).contains(&grace)) {
            check.fault("gracePeriodSeconds", format!("must be from 0 to {most_s}"));
        }
        check.finish()?;
        let grace_ms = draft
            .grace_s
            .map_or(self.settings.default_grace_ms, |seconds| seconds * 1_000);
        let grace_ends_at_ms = now_ms + grace_ms;
        let secret = secret::api_key(&known.prefix)?;
        let fresh = key_secret(&secret, now_ms);
        let record = |key: &ApiKey| outcome(key, Some(grace_ends_at_ms));
        let claim = idempotency_key.map(|idempotency_key| Claim {
            operation: format!("key.rotate {id}"),
            idempotency_key,
            fingerprint: fingerprint(&json!([draft.grace_s])),
            record: &record,
        });
        let edit = |key: &mut ApiKey| {
            refuse_revoked(key)?;
            let old_ones_alive = key.secrets.iter().filter(|s| s.in_grace(now_ms)).count();
            let stays = usize::from(grace_ms > 0);
            if old_ones_alive + stays + 1 > MOST_LIVING_SECRETS {
                return Err(Fault::TooManyLivingSecrets);
            }
            if let Some(current) = key.secrets.first_mut() {
                current.not_after_ms = Some(grace_ends_at_ms);
            }
            key.secrets.insert(0, fresh.clone());
            let detail = json!({"secret": fresh.id(), "graceSeconds": grace_ms / 1_000});
            Ok(note(key, "key.rotate", detail))
        };
        let written = self
            .store
            .edit_key(Some(organization), id, &edit, claim.as_ref(), self.stamp(caller))
            .await?;
        self.issued(written, secret, Some(grace_ends_at_ms))
    }

    /// Ends every old secret now.
    pub async fn end_grace(&self, caller: &Caller, organization: &str, id: &str) -> Result<ApiKey, Fault> {
        let now_ms = self.now_ms();
        let edit = |key: &mut ApiKey| {
            refuse_revoked(key)?;
            let mut ended = Vec::new();
            for secret in key.secrets.iter_mut().filter(|s| s.in_grace(now_ms)) {
                secret.not_after_ms = Some(now_ms);
                ended.push(secret.id());
            }
            Ok(note(key, "key.end_grace", json!({ "secrets": ended })))
        };
        let written = self
            .store
            .edit_key(Some(organization), id, &edit, None, self.stamp(caller))
            .await?;
        self.changed(written)
    }

    /// Revokes for good. Doing it again changes nothing.
    pub async fn revoke_key(&self, caller: &Caller, organization: Option<&str>, id: &str) -> Result<ApiKey, Fault> {
        let now_ms = self.now_ms();
        let edit = |key: &mut ApiKey| {
            key.revoked_at_ms.get_or_insert(now_ms);
            Ok(note(key, "key.revoke", json!({ "name": key.name })))
        };
        let written = self
            .store
            .edit_key(organization, id, &edit, None, self.stamp(caller))
            .await?;
        self.changed(written)
    }

    fn changed(&self, written: Written) -> Result<ApiKey, Fault> {
        match written {
            Written::Done(key) => {
                self.hub.publish(key.revision);
                Ok(*key)
            }
            Written::Replayed(_) => Err(Fault::Internal("a replay where nothing was claimed".into())),
        }
    }

    fn issued(&self, written: Written, secret: Secret, grace_ends_at_ms: Option<i64>) -> Result<Issued, Fault> {
        match written {
            Written::Done(key) => {
                self.hub.publish(key.revision);
                Ok(Issued {
                    key: *key,
                    secret: Some(secret),
                    grace_ends_at_ms,
                })
            }
            Written::Replayed(recorded) => replay(&recorded),
        }
    }

    fn environment(&self, check: &mut Check, field: &str, name: &str) -> Option<&Environment> {
        let found = self.settings.environments.iter().find(|e| e.name == name);
        if found.is_none() {
            let names: Vec<_> = self.settings.environments.iter().map(|e| e.name.as_str()).collect();
            check.fault(field, format!("must be one of {}", names.join(", ")));
        }
        found
    }

    /// Checks scopes against the catalogue, and puts them into its order without repetitions.
    fn scopes(&self, check: &mut Check, mut scopes: Vec<String>) -> Vec<String> {
        let catalogue = &self.settings.scopes;
        let place = |name: &str| catalogue.iter().position(|s| s.name == name);
        for (index, scope) in scopes.iter().enumerate().filter(|(_, scope)| place(scope).is_none()) {
            let shown: String = scope.chars().take(64).collect();
            check.fault(&format!("scopes[{index}]"), format!("`{shown}` is no scope"));
        }
        scopes.sort_by_key(|name| place(name));
        scopes.dedup();
        scopes
    }
}

/// A fresh key and its secret.
pub fn new_key(
    organization: &str,
    name: String,
    environment: &Environment,
    scopes: Vec<String>,
    expires_at_ms: Option<i64>,
    now_ms: i64,
) -> Result<(ApiKey, Secret), Fault> {
    let secret = secret::api_key(&environment.prefix)?;
    let key = ApiKey {
        id: secret::id("key_")?,
        organization_id: organization.to_owned(),
        name,
        environment: environment.name.clone(),
        prefix: environment.prefix.clone(),
        scopes,
        created_at_ms: now_ms,
        expires_at_ms,
        disabled: false,
        revoked_at_ms: None,
        last_used_at_ms: None,
        revision: 0,
        secrets: vec![key_secret(&secret, now_ms)],
    };
    Ok((key, secret))
}

pub(super) fn note(key: &ApiKey, action: &'static str, detail: serde_json::Value) -> AuditNote {
    AuditNote {
        organization_id: Some(key.organization_id.clone()),
        action,
        target_kind: "key",
        target_id: key.id.clone(),
        detail,
    }
}

fn key_secret(secret: &Secret, now_ms: i64) -> KeySecret {
    KeySecret {
        digest: secret.digest(),
        last_four: secret.last_four(),
        created_at_ms: now_ms,
        not_after_ms: None,
        last_used_at_ms: None,
    }
}

fn refuse_revoked(key: &ApiKey) -> Result<(), Fault> {
    if key.revoked_at_ms.is_some() {
        Err(Fault::KeyRevoked)
    } else {
        Ok(())
    }
}

fn difference(before: &ApiKey, after: &ApiKey) -> serde_json::Value {
    let mut changes = serde_json::Map::new();
    let mut compare = |name: &str, from: serde_json::Value, to: serde_json::Value| {
        if from != to {
            changes.insert(name.to_owned(), json!({"from": from, "to": to}));
        }
    };
    compare("name", json!(before.name), json!(after.name));
    compare("scopes", json!(before.scopes), json!(after.scopes));
    compare("expiresAtMs", json!(before.expires_at_ms), json!(after.expires_at_ms));
    compare("disabled", json!(before.disabled), json!(after.disabled));
    changes.into()
}

fn fingerprint(request: &serde_json::Value) -> Digest {
    secret::digest(&request.to_string())
}

fn outcome(key: &ApiKey, grace_ends_at_ms: Option<i64>) -> Result<String, Fault> {
    serde_json::to_string(&Outcome {
        key: key.clone(),
        grace_ends_at_ms,
    })
    .map_err(|e| Fault::Internal(e.to_string()))
}

fn replay(recorded: &str) -> Result<Issued, Fault> {
    let outcome: Outcome = serde_json::from_str(recorded)
        .map_err(|e| Fault::Internal(format!("a recorded outcome cannot be read: {e}")))?;
    Ok(Issued {
        key: outcome.key,
        secret: None,
        grace_ends_at_ms: outcome.grace_ends_at_ms,
    })
}

/// Keys of one organisation that are not revoked.
const MOST_KEYS: u64 = 50_000;
