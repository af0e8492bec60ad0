//! Organisations, their first users, invitations.

use async_trait::async_trait;
use sqlx::{PgConnection, Postgres, QueryBuilder};

use super::keys::{insert_key, like, tell_organization, write_line};
use super::retry::{Attempt, Failure, retry};
use super::{Change, PostgresStore, is_nowhere};
use crate::control::model::{AuditNote, Fault, Invitation, Organization, User};
use crate::control::secret::Digest;
use crate::control::store::rows::{InvitationRow, OrganizationRow};
use crate::control::store::{AccountStore, NewAccount, OrganizationQuery, Stamp};

#[async_trait]
impl AccountStore for PostgresStore {
    async fn create_account(&self, account: &NewAccount, stamp: Stamp<'_>) -> Result<u64, Fault> {
        retry(|| self.try_create_account(account, stamp)).await
    }

    async fn organization(&self, id: &str) -> Result<Option<Organization>, Fault> {
        if is_nowhere(&[Some(id)]) {
            return Ok(None);
        }
        retry(|| async {
            let mut connection = self.pools.general.acquire().await?;
            find_organization(&mut connection, id).await
        })
        .await
    }

    async fn organizations(&self, query: &OrganizationQuery) -> Result<Vec<Organization>, Fault> {
        let after = query.after.as_ref().map(|(_, id)| id.as_str());
        if is_nowhere(&[query.search.as_deref(), after]) {
            return Ok(Vec::new());
        }
        retry(|| async {
            let rows: Vec<OrganizationRow> = select(query).build_query_as().fetch_all(&self.pools.general).await?;
            Ok(rows.into_iter().map(OrganizationRow::into_organization).collect())
        })
        .await
    }

    async fn edit_organization(
        &self,
        id: &str,
        name: Option<&str>,
        plan: Option<&str>,
        stamp: Stamp<'_>,
    ) -> Result<Option<(Organization, u64)>, Fault> {
        retry(|| self.try_edit_organization(id, name, plan, stamp)).await
    }

    async fn create_invitation(&self, invitation: &Invitation, digest: &Digest, stamp: Stamp<'_>) -> Result<(), Fault> {
        retry(|| async {
            let mut change = Change::begin(self).await?;
            sqlx::query(
                "INSERT INTO invitations (id, digest, note, created_at_ms, expires_at_ms) VALUES ($1, $2, $3, $4, $5)",
            )
            .bind(&invitation.id)
            .bind(digest.as_slice())
            .bind(&invitation.note)
            .bind(invitation.created_at_ms)
            .bind(invitation.expires_at_ms)
            .execute(&mut *change.tx)
            .await?;
            change
                .audit(&invitation_note("invitation.create", &invitation.id), stamp)
                .await?;
            change.commit().await.map(drop)
        })
        .await
    }

    async fn invitations(&self, after: Option<&(i64, String)>, limit: u32) -> Result<Vec<Invitation>, Fault> {
        let (created_at_ms, id) = after.map_or((i64::MIN, ""), |(at, id)| (*at, id.as_str()));
        if is_nowhere(&[Some(id)]) {
            return Ok(Vec::new());
        }
        retry(|| async {
            let rows: Vec<InvitationRow> = sqlx::query_as(
                "SELECT id, note, created_at_ms, expires_at_ms, used_at_ms, used_by FROM invitations
                 WHERE (created_at_ms, id) > ($1, $2) ORDER BY created_at_ms, id LIMIT $3",
            )
            .bind(created_at_ms)
            .bind(id)
            .bind(i64::from(limit))
            .fetch_all(&self.pools.general)
            .await?;
            Ok(rows.into_iter().map(InvitationRow::into_invitation).collect())
        })
        .await
    }

    async fn delete_invitation(&self, id: &str, stamp: Stamp<'_>) -> Result<bool, Fault> {
        retry(|| async {
            let mut change = Change::begin(self).await?;
            let deleted = sqlx::query("DELETE FROM invitations WHERE id = $1")
                .bind(id)
                .execute(&mut *change.tx)
                .await?;
            if deleted.rows_affected() == 0 {
                return Ok(false);
            }
            change.audit(&invitation_note("invitation.delete", id), stamp).await?;
            change.commit().await?;
            Ok(true)
        })
        .await
    }

    async fn fact(&self, name: &str) -> Result<Option<String>, Fault> {
        retry(|| async {
            Ok(sqlx::query_scalar("SELECT value FROM facts WHERE name = $1")
                .bind(name)
                .fetch_optional(&self.pools.general)
                .await?)
        })
        .await
    }

    async fn set_fact(&self, name: &str, value: &str) -> Result<(), Fault> {
        retry(|| async {
            sqlx::query(
                "INSERT INTO facts (name, value) VALUES ($1, $2) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
            )
            .bind(name)
            .bind(value)
            .execute(&self.pools.general)
            .await?;
            Ok(())
        })
        .await
    }
}

impl PostgresStore {
    async fn try_create_account(&self, account: &NewAccount, stamp: Stamp<'_>) -> Attempt<u64> {
        let mut change = Change::begin(self).await?;
        let organization = &account.organization;
        sqlx::query("INSERT INTO organizations (id, name, plan, created_at_ms) VALUES ($1, $2, $3, $4)")
            .bind(&organization.id)
            .bind(&organization.name)
            .bind(&organization.plan)
            .bind(organization.created_at_ms)
            .execute(&mut *change.tx)
            .await?;
        if let Some(digest) = &account.invitation {
            use_invitation(&mut change.tx, digest, &organization.id, stamp.now_ms).await?;
        }
        if let Some((user, password_hash)) = &account.user {
            insert_user(&mut change.tx, user, password_hash).await?;
        }
        if let Some(key) = &account.key {
            let mut key = key.clone();
            key.revision = change.next_revision();
            insert_key(&mut change.tx, &key).await?;
            write_line(&mut change.tx, &key).await?;
        }
        change.audit(&account.note, stamp).await?;
        change.commit().await
    }

    async fn try_edit_organization(
        &self,
        id: &str,
        name: Option<&str>,
        plan: Option<&str>,
        stamp: Stamp<'_>,
    ) -> Attempt<Option<(Organization, u64)>> {
        let mut change = Change::begin(self).await?;
        let Some(before) = find_organization(&mut change.tx, id).await? else {
            return Ok(None);
        };
        let mut after = before.clone();
        after.name = name.unwrap_or(&before.name).to_owned();
        after.plan = plan.unwrap_or(&before.plan).to_owned();
        if after != before {
            sqlx::query("UPDATE organizations SET name = $1, plan = $2 WHERE id = $3")
                .bind(&after.name)
                .bind(&after.plan)
                .bind(id)
                .execute(&mut *change.tx)
                .await?;
            if after.plan != before.plan {
                tell_organization(&mut change, &after).await?;
            }
            let note = AuditNote {
                organization_id: Some(id.to_owned()),
                action: "organization.update",
                target_kind: "organization",
                target_id: id.to_owned(),
                detail: serde_json::json!({
                    "name": {"from": before.name, "to": after.name},
                    "plan": {"from": before.plan, "to": after.plan},
                }),
            };
            change.audit(&note, stamp).await?;
        }
        let revision = change.commit().await?;
        Ok(Some((after, revision)))
    }
}

async fn find_organization(connection: &mut PgConnection, id: &str) -> Attempt<Option<Organization>> {
    let row: Option<OrganizationRow> =
        sqlx::query_as("SELECT id, name, plan, created_at_ms FROM organizations WHERE id = $1")
            .bind(id)
            .fetch_optional(connection)
            .await?;
    Ok(row.map(OrganizationRow::into_organization))
}

fn select(query: &OrganizationQuery) -> QueryBuilder<Postgres> {
    let mut sql = QueryBuilder::new("SELECT id, name, plan, created_at_ms FROM organizations WHERE true");
    if let Some(search) = &query.search {
        sql.push(" AND (name ILIKE ").push_bind(like(search)).push(" OR id = ");
        sql.push_bind(search.clone()).push(")");
    }
    if let Some((created_at_ms, id)) = &query.after {
        sql.push(" AND (created_at_ms, id) > (")
            .push_bind(*created_at_ms)
            .push(", ");
        sql.push_bind(id.clone()).push(")");
    }
    sql.push(" ORDER BY created_at_ms, id LIMIT ")
        .push_bind(i64::from(query.limit));
    sql
}

async fn insert_user(tx: &mut PgConnection, user: &User, password_hash: &str) -> Attempt<()> {
    let inserted = sqlx::query(
        "INSERT INTO users (id, organization_id, email, password_hash, created_at_ms) VALUES ($1, $2, $3, $4, $5)",
    )
    .bind(&user.id)
    .bind(&user.organization_id)
    .bind(&user.email)
    .bind(password_hash)
    .bind(user.created_at_ms)
    .execute(tx)
    .await;
    match inserted {
        Err(sqlx::Error::Database(error)) if error.constraint() == Some("users_email_is_unique") => {
            Err(Failure::Final(Fault::EmailTaken))
        }
        other => Ok(other.map(drop)?),
    }
}

async fn use_invitation(tx: &mut PgConnection, digest: &Digest, organization: &str, now_ms: i64) -> Attempt<()> {
    let used = sqlx::query(
        "UPDATE invitations SET used_at_ms = $1, used_by = $2
         WHERE digest = $3 AND used_at_ms IS NULL AND expires_at_ms > $1",
    )
    .bind(now_ms)
    .bind(organization)
    .bind(digest.as_slice())
    .execute(tx)
    .await?;
    if used.rows_affected() == 1 {
        Ok(())
    } else {
        Err(Failure::Final(Fault::InvitationInvalid))
    }
}

fn invitation_note(action: &'static str, id: &str) -> AuditNote {
    AuditNote {
        organization_id: None,
        action,
        target_kind: "invitation",
        target_id: id.to_owned(),
        detail: serde_json::json!({}),
    }
}
