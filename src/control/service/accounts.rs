//! Registration, and the organisation itself.

use serde_json::json;

use super::Service;
use super::check::Check;
use super::keys::new_key;
use crate::control::model::{AuditNote, Caller, Fault, FieldFault, Organization, User};
use crate::control::secret::{self, Secret};
use crate::control::settings::{Environment, Registration};
use crate::control::store::NewAccount;
use crate::control::throttle::address_name;

/// An account to be made.
#[derive(Default)]
pub struct RegisterDraft {
    pub faults: Vec<FieldFault>,
    pub name: Option<String>,
    pub email: Option<String>,
    pub password: Option<String>,
    pub invitation: Option<String>,
}

/// What a registration answers.
#[derive(Debug)]
pub struct Registered {
    pub organization_id: String,
    pub secret: Secret,
    pub revision: u64,
}

/// A fresh key for `tollgate dev`.
#[derive(Debug)]
pub struct DevKey {
    pub organization_id: String,
    pub key_id: String,
    pub secret: Secret,
}

impl Service {
    /// Makes an organisation with its first user and a sandbox key that may do everything there.
    pub async fn register(&self, caller: &Caller, draft: RegisterDraft) -> Result<Registered, Fault> {
        if self.settings.registration == Registration::Off {
            return Err(Fault::RegistrationClosed);
        }
        let now_ms = self.now_ms();
        let mut check = Check::new(draft.faults);
        let name = check.required("name", draft.name);
        check.name("name", &name);
        let email = check.required("email", draft.email);
        check.email("email", &email);
        let password = check.required("password", draft.password);
        check.password("password", &password);
        if self.settings.registration == Registration::Invite && draft.invitation.is_none() {
            check.fault("invitation", "is required");
        }
        check.finish()?;
        self.registrations
            .attempt(&address_name(caller.origin.address), now_ms)?;
        let email = email.to_ascii_lowercase();
        // Told before the expensive part. The insertion decides again, for two that come at once.
        if self.store.credentials_by_email(&email).await?.is_some() {
            return Err(Fault::EmailTaken);
        }
        let password_hash = self.passwords.hash(password).await?;
        let organization = self.new_organization(name, now_ms)?;
        let environment = self.sandbox()?;
        let (key, secret) = new_key(
            &organization.id,
            "Default key".to_owned(),
            environment,
            self.every_scope(),
            None,
            now_ms,
        )?;
        let user = User {
            id: secret::id("usr_")?,
            organization_id: organization.id.clone(),
            email: email.clone(),
            created_at_ms: now_ms,
        };
        let note = AuditNote {
            organization_id: Some(organization.id.clone()),
            action: "organization.register",
            target_kind: "organization",
            target_id: organization.id.clone(),
            detail: json!({"name": organization.name, "email": email, "user": user.id, "key": key.id}),
        };
        let invitation = match self.settings.registration {
            Registration::Invite => draft.invitation.as_deref().map(secret::digest),
            Registration::Open | Registration::Off => None,
        };
        let account = NewAccount {
            organization,
            user: Some((user.clone(), password_hash)),
            key: Some(key),
            invitation,
            note,
        };
        let revision = self.store.create_account(&account, self.stamp(caller)).await?;
        self.hub.publish(revision);
        Ok(Registered {
            organization_id: user.organization_id,
            secret,
            revision,
        })
    }

    /// The organisation that somebody acts for.
    pub async fn organization(&self, id: &str) -> Result<Organization, Fault> {
        self.store.organization(id).await?.ok_or(Fault::NotFound)
    }

    /// Renames an organisation.
    pub async fn rename_organization(
        &self,
        caller: &Caller,
        id: &str,
        name: Option<String>,
        faults: Vec<FieldFault>,
    ) -> Result<Organization, Fault> {
        let mut check = Check::new(faults);
        if let Some(name) = &name {
            check.name("name", name);
        }
        check.finish()?;
        let edited = self
            .store
            .edit_organization(id, name.as_deref(), None, self.stamp(caller))
            .await?;
        edited.map(|(organization, _)| organization).ok_or(Fault::NotFound)
    }

    /// A fresh live key of the demo organisation, which is made the first time.
    pub async fn dev_key(&self, caller: &Caller) -> Result<DevKey, Fault> {
        let now_ms = self.now_ms();
        let organization_id = match self.store.fact(DEV_ORGANIZATION).await? {
            Some(id) => id,
            None => {
                let organization = self.new_organization("Demo".to_owned(), now_ms)?;
                let id = organization.id.clone();
                let note = AuditNote {
                    organization_id: Some(id.clone()),
                    action: "organization.register",
                    target_kind: "organization",
                    target_id: id.clone(),
                    detail: json!({"name": organization.name}),
                };
                let account = NewAccount {
                    organization,
                    user: None,
                    key: None,
                    invitation: None,
                    note,
                };
                self.store.create_account(&account, self.stamp(caller)).await?;
                self.store.set_fact(DEV_ORGANIZATION, &id).await?;
                id
            }
        };
        let environments = &self.settings.environments;
        let live = environments
            .iter()
            .find(|e| e.name == "live")
            .or(environments.iter().find(|e| e.billed));
        let live = live
            .or(environments.first())
            .ok_or_else(|| Fault::Internal("no environment is set up".into()))?;
        let draft = super::keys::KeyDraft {
            name: Some("tollgate dev".to_owned()),
            environment: Some(live.name.clone()),
            scopes: Some(self.every_scope()),
            ..Default::default()
        };
        let issued = self.create_key(caller, &organization_id, draft, None).await?;
        let secret = issued
            .secret
            .ok_or_else(|| Fault::Internal("a new key without a secret".into()))?;
        Ok(DevKey {
            organization_id,
            key_id: issued.key.id,
            secret,
        })
    }

    fn new_organization(&self, name: String, now_ms: i64) -> Result<Organization, Fault> {
        Ok(Organization {
            id: secret::id("org_")?,
            name,
            plan: self.settings.default_plan.clone(),
            created_at_ms: now_ms,
        })
    }

    /// Where a new account begins: `dev`, or the first environment that costs nothing.
    fn sandbox(&self) -> Result<&Environment, Fault> {
        let environments = &self.settings.environments;
        let dev = environments
            .iter()
            .find(|e| e.name == "dev")
            .or(environments.iter().find(|e| !e.billed));
        dev.or(environments.first())
            .ok_or_else(|| Fault::Internal("no environment is set up".into()))
    }

    fn every_scope(&self) -> Vec<String> {
        self.settings.scopes.iter().map(|s| s.name.clone()).collect()
    }
}

/// The fact that names the organisation of `tollgate dev`.
const DEV_ORGANIZATION: &str = "dev_organization";
