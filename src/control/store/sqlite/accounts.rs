//! Organisations, their first users, invitations.

use async_trait::async_trait;
use sqlx::{QueryBuilder, Sqlite, SqliteConnection};

use super::keys::{find_key, insert_key, like, write_line};
use super::{SqliteStore, fault, is_taken, next_revision, write_audit};
use crate::control::model::{AuditNote, Fault, Invitation, Organization, User};
use crate::control::secret::Digest;
use crate::control::store::rows::{InvitationRow, OrganizationRow};
use crate::control::store::{AccountStore, NewAccount, OrganizationQuery, Stamp};

#[async_trait]
impl AccountStore for SqliteStore {
    async fn create_account(&self, account: &NewAccount, stamp: Stamp<'_>) -> Result<u64, Fault> {
        let mut tx = self.begin().await?;
        let organization = &account.organization;
        sqlx::query("INSERT INTO organizations (id, name, plan, created_at_ms) VALUES (?, ?, ?, ?)")
            .bind(&organization.id)
            .bind(&organization.name)
            .bind(&organization.plan)
            .bind(organization.created_at_ms)
            .execute(&mut *tx)
            .await
            .map_err(fault)?;
        if let Some(digest) = &account.invitation {
            use_invitation(&mut tx, digest, &organization.id, stamp.now_ms).await?;
        }
        if let Some((user, password_hash)) = &account.user {
            insert_user(&mut tx, user, password_hash).await?;
        }
        let mut revision: i64 = sqlx::query_scalar("SELECT revision FROM feed_state")
            .fetch_one(&mut *tx)
            .await
            .map_err(fault)?;
        if let Some(key) = &account.key {
            let mut key = key.clone();
            key.revision = next_revision(&mut tx).await?;
            revision = key.revision as i64;
            insert_key(&mut tx, &key).await?;
            write_line(&mut tx, &key).await?;
        }
        write_audit(&mut tx, &account.note, stamp).await?;
        tx.commit().await.map_err(fault)?;
        Ok(revision as u64)
    }

    async fn organization(&self, id: &str) -> Result<Option<Organization>, Fault> {
        let row: Option<OrganizationRow> = sqlx::query_as("SELECT * FROM organizations WHERE id = ?")
            .bind(id)
            .fetch_optional(&self.readers)
            .await
            .map_err(fault)?;
        Ok(row.map(OrganizationRow::into_organization))
    }

    async fn organizations(&self, query: &OrganizationQuery) -> Result<Vec<Organization>, Fault> {
        let mut sql: QueryBuilder<Sqlite> = QueryBuilder::new("SELECT * FROM organizations WHERE 1");
        if let Some(search) = &query.search {
            sql.push(" AND (name LIKE ")
                .push_bind(like(search))
                .push(" ESCAPE '\\' OR id = ");
            sql.push_bind(search.clone()).push(")");
        }
        if let Some((created_at_ms, id)) = &query.after {
            sql.push(" AND (created_at_ms, id) > (")
                .push_bind(*created_at_ms)
                .push(", ");
            sql.push_bind(id.clone()).push(")");
        }
        sql.push(" ORDER BY created_at_ms, id LIMIT ").push_bind(query.limit);
        let rows: Vec<OrganizationRow> = sql.build_query_as().fetch_all(&self.readers).await.map_err(fault)?;
        Ok(rows.into_iter().map(OrganizationRow::into_organization).collect())
    }

    async fn edit_organization(
        &self,
        id: &str,
        name: Option<&str>,
        plan: Option<&str>,
        stamp: Stamp<'_>,
    ) -> Result<Option<(Organization, u64)>, Fault> {
        let mut tx = self.begin().await?;
        let row: Option<OrganizationRow> = sqlx::query_as("SELECT * FROM organizations WHERE id = ?")
            .bind(id)
            .fetch_optional(&mut *tx)
            .await
            .map_err(fault)?;
        let Some(before) = row.map(OrganizationRow::into_organization) else {
            return Ok(None);
        };
        let mut after = before.clone();
        after.name = name.unwrap_or(&before.name).to_owned();
        after.plan = plan.unwrap_or(&before.plan).to_owned();
        let mut revision: i64 = sqlx::query_scalar("SELECT revision FROM feed_state")
            .fetch_one(&mut *tx)
            .await
            .map_err(fault)?;
        if after != before {
            sqlx::query("UPDATE organizations SET name = ?, plan = ? WHERE id = ?")
                .bind(&after.name)
                .bind(&after.plan)
                .bind(id)
                .execute(&mut *tx)
                .await
                .map_err(fault)?;
            if after.plan != before.plan {
                revision = tell_plan(&mut tx, id).await?.unwrap_or(revision as u64) as i64;
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
            write_audit(&mut tx, &note, stamp).await?;
        }
        tx.commit().await.map_err(fault)?;
        Ok(Some((after, revision as u64)))
    }

    async fn create_invitation(&self, invitation: &Invitation, digest: &Digest, stamp: Stamp<'_>) -> Result<(), Fault> {
        let mut tx = self.begin().await?;
        sqlx::query("INSERT INTO invitations (id, digest, note, created_at_ms, expires_at_ms) VALUES (?, ?, ?, ?, ?)")
            .bind(&invitation.id)
            .bind(digest.as_slice())
            .bind(&invitation.note)
            .bind(invitation.created_at_ms)
            .bind(invitation.expires_at_ms)
            .execute(&mut *tx)
            .await
            .map_err(fault)?;
        write_audit(&mut tx, &invitation_note("invitation.create", &invitation.id), stamp).await?;
        tx.commit().await.map_err(fault)
    }

    async fn invitations(&self, after: Option<&(i64, String)>, limit: u32) -> Result<Vec<Invitation>, Fault> {
        let (created_at_ms, id) = after.map_or((i64::MIN, ""), |(at, id)| (*at, id.as_str()));
        let rows: Vec<InvitationRow> = sqlx::query_as(
            "SELECT id, note, created_at_ms, expires_at_ms, used_at_ms, used_by FROM invitations
             WHERE (created_at_ms, id) > (?, ?) ORDER BY created_at_ms, id LIMIT ?",
        )
        .bind(created_at_ms)
        .bind(id)
        .bind(limit)
        .fetch_all(&self.readers)
        .await
        .map_err(fault)?;
        Ok(rows.into_iter().map(InvitationRow::into_invitation).collect())
    }

    async fn delete_invitation(&self, id: &str, stamp: Stamp<'_>) -> Result<bool, Fault> {
        let mut tx = self.begin().await?;
        let deleted = sqlx::query("DELETE FROM invitations WHERE id = ?")
            .bind(id)
            .execute(&mut *tx)
            .await
            .map_err(fault)?;
        if deleted.rows_affected() == 0 {
            return Ok(false);
        }
        write_audit(&mut tx, &invitation_note("invitation.delete", id), stamp).await?;
        tx.commit().await.map_err(fault)?;
        Ok(true)
    }

    async fn fact(&self, name: &str) -> Result<Option<String>, Fault> {
        sqlx::query_scalar("SELECT value FROM facts WHERE name = ?")
            .bind(name)
            .fetch_optional(&self.readers)
            .await
            .map_err(fault)
    }

    async fn set_fact(&self, name: &str, value: &str) -> Result<(), Fault> {
        sqlx::query("INSERT OR REPLACE INTO facts (name, value) VALUES (?, ?)")
            .bind(name)
            .bind(value)
            .execute(&self.writer)
            .await
            .map(drop)
            .map_err(fault)
    }
}

async fn insert_user(tx: &mut SqliteConnection, user: &User, password_hash: &str) -> Result<(), Fault> {
    sqlx::query("INSERT INTO users (id, organization_id, email, password_hash, created_at_ms) VALUES (?, ?, ?, ?, ?)")
        .bind(&user.id)
        .bind(&user.organization_id)
        .bind(&user.email)
        .bind(password_hash)
        .bind(user.created_at_ms)
        .execute(tx)
        .await
        .map(drop)
        .map_err(|e| {
            if is_taken(&e, "users.email") {
                Fault::EmailTaken
            } else {
                fault(e)
            }
        })
}

async fn use_invitation(
    tx: &mut SqliteConnection,
    digest: &Digest,
    organization: &str,
    now_ms: i64,
) -> Result<(), Fault> {
    let used = sqlx::query(
        "UPDATE invitations SET used_at_ms = ?1, used_by = ?2
         WHERE digest = ?3 AND used_at_ms IS NULL AND expires_at_ms > ?1",
    )
    .bind(now_ms)
    .bind(organization)
    .bind(digest.as_slice())
    .execute(tx)
    .await
    .map_err(fault)?;
    if used.rows_affected() == 1 {
        Ok(())
    } else {
        Err(Fault::InvitationInvalid)
    }
}

/// Writes the line of every key of an organisation anew, each at a revision of its own.
async fn tell_plan(tx: &mut SqliteConnection, organization: &str) -> Result<Option<u64>, Fault> {
    let ids: Vec<String> =
        sqlx::query_scalar("SELECT id FROM keys JOIN feed_lines ON key_id = id WHERE organization_id = ?")
            .bind(organization)
            .fetch_all(&mut *tx)
            .await
            .map_err(fault)?;
    let mut newest = None;
    for id in ids {
        let Some(mut key) = find_key(tx, None, &id).await? else {
            continue;
        };
        key.revision = next_revision(tx).await?;
        newest = Some(key.revision);
        sqlx::query("UPDATE keys SET revision = ? WHERE id = ?")
            .bind(key.revision as i64)
            .bind(&id)
            .execute(&mut *tx)
            .await
            .map_err(fault)?;
        write_line(tx, &key).await?;
    }
    Ok(newest)
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
