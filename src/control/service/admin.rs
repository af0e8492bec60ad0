//! What the operator may do beyond any organisation.

use super::Service;
use super::check::Check;
use crate::control::model::{Caller, Fault, FieldFault, GateState, Invitation, Organization};
use crate::control::secret::{self, Secret};

/// What is to change on an organisation; absent: stays.
#[derive(Default)]
pub struct OrganizationPatch {
    pub faults: Vec<FieldFault>,
    pub name: Option<String>,
    pub plan: Option<String>,
}

/// An invitation to be made.
#[derive(Default)]
pub struct InvitationDraft {
    pub faults: Vec<FieldFault>,
    pub note: Option<String>,
    pub expires_at_ms: Option<i64>,
    /// The invitation's id, where the caller must be able to tell a repetition; none: a random one.
    pub id: Option<String>,
}

impl Service {
    /// Changes name or plan. A plan's limits reach every key of the organisation through the feed.
    pub async fn update_organization(
        &self,
        caller: &Caller,
        id: &str,
        patch: OrganizationPatch,
    ) -> Result<(Organization, u64), Fault> {
        self.organization(id).await?;
        let mut check = Check::new(patch.faults);
        if let Some(name) = &patch.name {
            check.name("name", name);
        }
        if let Some(plan) = &patch.plan
            && !self.settings.plans.iter().any(|p| p.name == *plan)
        {
            let names: Vec<_> = self.settings.plans.iter().map(|p| p.name.as_str()).collect();
            check.fault("plan", format!("must be one of {}", names.join(", ")));
        }
        check.finish()?;
        let edited = self
            .store
            .edit_organization(id, patch.name.as_deref(), patch.plan.as_deref(), self.stamp(caller))
            .await?;
        let (organization, revision) = edited.ok_or(Fault::NotFound)?;
        self.hub.publish(revision);
        Ok((organization, revision))
    }

    /// Makes an invitation; its secret is shown this once.
    pub async fn create_invitation(
        &self,
        caller: &Caller,
        draft: InvitationDraft,
    ) -> Result<(Invitation, Secret), Fault> {
        let now_ms = self.now_ms();
        let mut check = Check::new(draft.faults);
        let note = draft.note.unwrap_or_default();
        if note.chars().count() > 200 || note.chars().any(char::is_control) {
            check.fault("note", "must have at most 200 characters, and no control characters");
        }
        check.future("expiresAt", draft.expires_at_ms, now_ms);
        check.finish()?;
        let secret = secret::invitation()?;
        let invitation = Invitation {
            id: draft.id.map_or_else(|| secret::id("inv_"), Ok)?,
            note,
            created_at_ms: now_ms,
            expires_at_ms: draft.expires_at_ms.unwrap_or(now_ms + INVITATION_LIFE_MS),
            used_at_ms: None,
            used_by: None,
        };
        self.store
            .create_invitation(&invitation, &secret.digest(), self.stamp(caller))
            .await?;
        Ok((invitation, secret))
    }

    /// Withdraws an invitation.
    pub async fn delete_invitation(&self, caller: &Caller, id: &str) -> Result<(), Fault> {
        match self.store.delete_invitation(id, self.stamp(caller)).await? {
            true => Ok(()),
            false => Err(Fault::NotFound),
        }
    }

    /// Every gate that is known, and the newest revision.
    pub fn gates(&self) -> (Vec<GateState>, u64) {
        (self.hub.states(self.now_ms()), self.hub.revision())
    }

    /// Makes every gate load a full snapshot at a revision beyond all that any gate has. After a database was restored
    /// from a backup its revision is behind the gates', and they refuse what is older than what they have.
    pub async fn resync(&self, caller: &Caller) -> Result<u64, Fault> {
        let revision = self.store.resync(self.hub.highest_claim(), self.stamp(caller)).await?;
        self.hub.publish(revision);
        Ok(revision)
    }

    /// Forgets a gate that was taken out of service. [`Fault::NotFound`] if it is unknown or connected.
    pub async fn forget_gate(&self, caller: &Caller, name: &str) -> Result<(), Fault> {
        if !self
            .hub
            .states(self.now_ms())
            .iter()
            .any(|g| g.name == name && !g.connected)
            || !self.hub.forget(name)
        {
            return Err(Fault::NotFound);
        }
        self.store.forget_gate(name, self.stamp(caller)).await.map(drop)
    }
}

/// An invitation that does not say otherwise is good for two weeks.
const INVITATION_LIFE_MS: i64 = 14 * 24 * 3_600_000;
