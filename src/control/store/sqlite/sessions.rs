//! Passwords, sessions, access tokens.

use async_trait::async_trait;
use sqlx::SqliteConnection;

use super::{SqliteStore, fault, write_audit};
use crate::control::model::{AccessToken, AuditNote, Fault, Session, User};
use crate::control::secret::Digest;
use crate::control::store::rows::{CredentialsRow, SessionRow, TokenRow};
use crate::control::store::{Credentials, EndSessions, MOST_SESSIONS, NewSession, SessionStore, Stamp};

#[async_trait]
impl SessionStore for SqliteStore {
    async fn credentials_by_email(&self, email: &str) -> Result<Option<Credentials>, Fault> {
        let row: Option<CredentialsRow> = sqlx::query_as("SELECT * FROM users WHERE email = ?")
            .bind(email)
            .fetch_optional(&self.readers)
            .await
            .map_err(fault)?;
        Ok(row.map(CredentialsRow::into_credentials))
    }

    async fn credentials_by_user(&self, user_id: &str) -> Result<Option<Credentials>, Fault> {
        let row: Option<CredentialsRow> = sqlx::query_as("SELECT * FROM users WHERE id = ?")
            .bind(user_id)
            .fetch_optional(&self.readers)
            .await
            .map_err(fault)?;
        Ok(row.map(CredentialsRow::into_credentials))
    }

    async fn change_password(
        &self,
        user_id: &str,
        password_hash: &str,
        session: &NewSession,
        stamp: Stamp<'_>,
    ) -> Result<(), Fault> {
        let mut tx = self.begin().await?;
        sqlx::query("UPDATE users SET password_hash = ? WHERE id = ?")
            .bind(password_hash)
            .bind(user_id)
            .execute(&mut *tx)
            .await
            .map_err(fault)?;
        sqlx::query("DELETE FROM sessions WHERE user_id = ?")
            .bind(user_id)
            .execute(&mut *tx)
            .await
            .map_err(fault)?;
        insert_session(&mut tx, session).await?;
        let note = user_note(&mut tx, "password.change", user_id).await?;
        write_audit(&mut tx, &note, stamp).await?;
        tx.commit().await.map_err(fault)
    }

    async fn begin_session(
        &self,
        session: &NewSession,
        replaced: Option<&Digest>,
        stamp: Stamp<'_>,
    ) -> Result<(), Fault> {
        let mut tx = self.begin().await?;
        if let Some(digest) = replaced {
            sqlx::query("DELETE FROM sessions WHERE digest = ?")
                .bind(digest.as_slice())
                .execute(&mut *tx)
                .await
                .map_err(fault)?;
        }
        insert_session(&mut tx, session).await?;
        // The oldest give way, so that a script that signs in for every call cannot fill the table.
        sqlx::query(
            "DELETE FROM sessions WHERE user_id = ?1 AND id NOT IN
                 (SELECT id FROM sessions WHERE user_id = ?1 ORDER BY last_used_at_ms DESC, created_at_ms DESC LIMIT ?2)",
        )
        .bind(&session.session.user_id)
        .bind(MOST_SESSIONS)
        .execute(&mut *tx)
        .await
        .map_err(fault)?;
        let note = user_note(&mut tx, "session.begin", &session.session.user_id).await?;
        write_audit(&mut tx, &note, stamp).await?;
        tx.commit().await.map_err(fault)
    }

    async fn session(&self, digest: &Digest, now_ms: i64) -> Result<Option<(Session, User)>, Fault> {
        let mut tx = self.begin_reading().await?;
        let row: Option<SessionRow> = sqlx::query_as("SELECT * FROM sessions WHERE digest = ? AND expires_at_ms > ?")
            .bind(digest.as_slice())
            .bind(now_ms)
            .fetch_optional(&mut *tx)
            .await
            .map_err(fault)?;
        let Some(session) = row.map(SessionRow::into_session) else {
            return Ok(None);
        };
        let user: CredentialsRow = sqlx::query_as("SELECT * FROM users WHERE id = ?")
            .bind(&session.user_id)
            .fetch_one(&mut *tx)
            .await
            .map_err(fault)?;
        Ok(Some((session, user.into_credentials().user)))
    }

    async fn touch_session(&self, id: &str, now_ms: i64) -> Result<(), Fault> {
        sqlx::query("UPDATE sessions SET last_used_at_ms = ?1 WHERE id = ?2 AND last_used_at_ms < ?1")
            .bind(now_ms)
            .bind(id)
            .execute(&self.writer)
            .await
            .map(drop)
            .map_err(fault)
    }

    async fn sessions(&self, user_id: &str, now_ms: i64) -> Result<Vec<Session>, Fault> {
        let rows: Vec<SessionRow> = sqlx::query_as(
            "SELECT * FROM sessions WHERE user_id = ? AND expires_at_ms > ? ORDER BY last_used_at_ms DESC, id",
        )
        .bind(user_id)
        .bind(now_ms)
        .fetch_all(&self.readers)
        .await
        .map_err(fault)?;
        Ok(rows.into_iter().map(SessionRow::into_session).collect())
    }

    async fn end_sessions(&self, user_id: &str, which: EndSessions<'_>, stamp: Stamp<'_>) -> Result<u64, Fault> {
        let mut tx = self.begin().await?;
        let statement = match which {
            EndSessions::One(_) => "DELETE FROM sessions WHERE user_id = ? AND id = ?",
            EndSessions::AllBut(_) => "DELETE FROM sessions WHERE user_id = ? AND id <> ?",
        };
        let (EndSessions::One(id) | EndSessions::AllBut(id)) = which;
        let ended = sqlx::query(statement)
            .bind(user_id)
            .bind(id)
            .execute(&mut *tx)
            .await
            .map_err(fault)?;
        if ended.rows_affected() > 0 {
            let note = user_note(&mut tx, "session.end", user_id).await?;
            write_audit(&mut tx, &note, stamp).await?;
            tx.commit().await.map_err(fault)?;
        }
        Ok(ended.rows_affected())
    }

    async fn create_token(
        &self,
        token: &AccessToken,
        digest: &Digest,
        limit: u64,
        stamp: Stamp<'_>,
    ) -> Result<(), Fault> {
        let mut tx = self.begin().await?;
        let count: i64 = sqlx::query_scalar("SELECT count(*) FROM tokens WHERE organization_id = ?")
            .bind(&token.organization_id)
            .fetch_one(&mut *tx)
            .await
            .map_err(fault)?;
        if count as u64 >= limit {
            return Err(Fault::TooMany {
                what: "access tokens",
                limit,
            });
        }
        sqlx::query(
            "INSERT INTO tokens (id, organization_id, name, digest, last_four, created_at_ms, expires_at_ms)
             VALUES (?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(&token.id)
        .bind(&token.organization_id)
        .bind(&token.name)
        .bind(digest.as_slice())
        .bind(&token.last_four)
        .bind(token.created_at_ms)
        .bind(token.expires_at_ms)
        .execute(&mut *tx)
        .await
        .map_err(fault)?;
        let note = token_note("token.create", &token.organization_id, &token.id, &token.name);
        write_audit(&mut tx, &note, stamp).await?;
        tx.commit().await.map_err(fault)
    }

    async fn tokens(&self, organization_id: &str) -> Result<Vec<AccessToken>, Fault> {
        let rows: Vec<TokenRow> =
            sqlx::query_as("SELECT * FROM tokens WHERE organization_id = ? ORDER BY created_at_ms, id")
                .bind(organization_id)
                .fetch_all(&self.readers)
                .await
                .map_err(fault)?;
        Ok(rows.into_iter().map(TokenRow::into_token).collect())
    }

    async fn token(&self, digest: &Digest, now_ms: i64) -> Result<Option<AccessToken>, Fault> {
        let row: Option<TokenRow> =
            sqlx::query_as("SELECT * FROM tokens WHERE digest = ? AND (expires_at_ms IS NULL OR expires_at_ms > ?)")
                .bind(digest.as_slice())
                .bind(now_ms)
                .fetch_optional(&self.readers)
                .await
                .map_err(fault)?;
        Ok(row.map(TokenRow::into_token))
    }

    async fn touch_token(&self, id: &str, now_ms: i64) -> Result<(), Fault> {
        sqlx::query("UPDATE tokens SET last_used_at_ms = ?1 WHERE id = ?2 AND coalesce(last_used_at_ms, 0) < ?1")
            .bind(now_ms)
            .bind(id)
            .execute(&self.writer)
            .await
            .map(drop)
            .map_err(fault)
    }

    async fn delete_token(&self, organization_id: &str, id: &str, stamp: Stamp<'_>) -> Result<bool, Fault> {
        let mut tx = self.begin().await?;
        let name: Option<String> =
            sqlx::query_scalar("DELETE FROM tokens WHERE organization_id = ? AND id = ? RETURNING name")
                .bind(organization_id)
                .bind(id)
                .fetch_optional(&mut *tx)
                .await
                .map_err(fault)?;
        let Some(name) = name else { return Ok(false) };
        write_audit(&mut tx, &token_note("token.delete", organization_id, id, &name), stamp).await?;
        tx.commit().await.map_err(fault)?;
        Ok(true)
    }
}

async fn insert_session(tx: &mut SqliteConnection, new: &NewSession) -> Result<(), Fault> {
    sqlx::query(
        "INSERT INTO sessions (id, digest, user_id, created_at_ms, last_used_at_ms, expires_at_ms, address, user_agent)
         VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
    )
    .bind(&new.session.id)
    .bind(new.digest.as_slice())
    .bind(&new.session.user_id)
    .bind(new.session.created_at_ms)
    .bind(new.session.last_used_at_ms)
    .bind(new.session.expires_at_ms)
    .bind(&new.session.address)
    .bind(&new.session.user_agent)
    .execute(tx)
    .await
    .map(drop)
    .map_err(fault)
}

async fn user_note(tx: &mut SqliteConnection, action: &'static str, user_id: &str) -> Result<AuditNote, Fault> {
    let organization: Option<String> = sqlx::query_scalar("SELECT organization_id FROM users WHERE id = ?")
        .bind(user_id)
        .fetch_optional(tx)
        .await
        .map_err(fault)?;
    Ok(AuditNote {
        organization_id: organization,
        action,
        target_kind: "user",
        target_id: user_id.to_owned(),
        detail: serde_json::json!({}),
    })
}

fn token_note(action: &'static str, organization: &str, id: &str, name: &str) -> AuditNote {
    AuditNote {
        organization_id: Some(organization.to_owned()),
        action,
        target_kind: "token",
        target_id: id.to_owned(),
        detail: serde_json::json!({ "name": name }),
    }
}
