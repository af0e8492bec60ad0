//! Rows as both engines read them, and what becomes of them. (A key's differ: its scopes are JSON here and an array there.)

use super::{Credentials, UsageRow};
use crate::control::model::{AccessToken, AuditLine, Invitation, Organization, Session, User};

#[derive(sqlx::FromRow)]
pub(super) struct OrganizationRow {
    id: String,
    name: String,
    plan: String,
    created_at_ms: i64,
}

impl OrganizationRow {
    pub fn into_organization(self) -> Organization {
        Organization {
            id: self.id,
            name: self.name,
            plan: self.plan,
            created_at_ms: self.created_at_ms,
        }
    }
}

#[derive(sqlx::FromRow)]
pub(super) struct InvitationRow {
    id: String,
    note: String,
    created_at_ms: i64,
    expires_at_ms: i64,
    used_at_ms: Option<i64>,
    used_by: Option<String>,
}

impl InvitationRow {
    pub fn into_invitation(self) -> Invitation {
        Invitation {
            id: self.id,
            note: self.note,
            created_at_ms: self.created_at_ms,
            expires_at_ms: self.expires_at_ms,
            used_at_ms: self.used_at_ms,
            used_by: self.used_by,
        }
    }
}

#[derive(sqlx::FromRow)]
pub(super) struct CredentialsRow {
    id: String,
    organization_id: String,
    email: String,
    password_hash: String,
    created_at_ms: i64,
}

impl CredentialsRow {
    pub fn into_credentials(self) -> Credentials {
        let user = User {
            id: self.id,
            organization_id: self.organization_id,
            email: self.email,
            created_at_ms: self.created_at_ms,
        };
        Credentials {
            user,
            password_hash: self.password_hash,
        }
    }
}

#[derive(sqlx::FromRow)]
pub(super) struct SessionRow {
    id: String,
    pub user_id: String,
    created_at_ms: i64,
    last_used_at_ms: i64,
    expires_at_ms: i64,
    address: String,
    user_agent: String,
}

impl SessionRow {
    pub fn into_session(self) -> Session {
        Session {
            id: self.id,
            user_id: self.user_id,
            created_at_ms: self.created_at_ms,
            last_used_at_ms: self.last_used_at_ms,
            expires_at_ms: self.expires_at_ms,
            address: self.address,
            user_agent: self.user_agent,
        }
    }
}

#[derive(sqlx::FromRow)]
pub(super) struct TokenRow {
    id: String,
    organization_id: String,
    name: String,
    last_four: String,
    created_at_ms: i64,
    expires_at_ms: Option<i64>,
    last_used_at_ms: Option<i64>,
}

impl TokenRow {
    pub fn into_token(self) -> AccessToken {
        AccessToken {
            id: self.id,
            organization_id: self.organization_id,
            name: self.name,
            last_four: self.last_four,
            created_at_ms: self.created_at_ms,
            expires_at_ms: self.expires_at_ms,
            last_used_at_ms: self.last_used_at_ms,
        }
    }
}

#[derive(sqlx::FromRow)]
pub(super) struct AuditRow {
    serial: i64,
    at_ms: i64,
    organization_id: Option<String>,
    actor_kind: String,
    actor_id: String,
    actor_name: String,
    action: String,
    target_kind: String,
    target_id: String,
    detail: String,
    address: String,
    user_agent: String,
    request_id: String,
}

impl AuditRow {
    pub fn into_line(self) -> AuditLine {
        AuditLine {
            serial: self.serial,
            at_ms: self.at_ms,
            organization_id: self.organization_id,
            actor_kind: self.actor_kind,
            actor_id: self.actor_id,
            actor_name: self.actor_name,
            action: self.action,
            target_kind: self.target_kind,
            target_id: self.target_id,
            // The column guarantees JSON.
            detail: serde_json::from_str(&self.detail).unwrap_or_default(),
            address: self.address,
            user_agent: self.user_agent,
            request_id: self.request_id,
        }
    }
}

#[derive(sqlx::FromRow)]
pub(super) struct LedgerRow {
    bucket: i64,
    key: String,
    tier: String,
    environment: String,
    code: String,
    total: i64,
}

impl LedgerRow {
    pub fn into_parts(self) -> (UsageRow, String) {
        let row = UsageRow {
            minute: self.bucket,
            key: self.key,
            tier: self.tier,
            environment: self.environment,
            count: self.total as u64,
        };
        (row, self.code)
    }
}
