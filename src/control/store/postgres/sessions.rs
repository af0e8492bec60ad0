//! Passwords, sessions, access tokens.

use async_trait::async_trait;
use sqlx::PgConnection;

use super::retry::{Attempt, Failure, retry};
use super::{PostgresStore, commit, is_nowhere, write_audit};
use crate::control::model::{AccessToken, AuditNote, Fault, Session, User};
use crate::control::secret::Digest;
use crate::control::store::rows::{CredentialsRow, SessionRow, TokenRow};
use crate::control::store::{Credentials, EndSessions, MOST_SESSIONS, NewSession, SessionStore, Stamp};

#[async_trait]
impl SessionStore for PostgresStore {
    async fn credentials_by_email(&self, email: &str) -> Result<Option<Credentials>, Fault> {
        let statement = "SELECT id, organization_id, email, password_hash, created_at_ms FROM users WHERE email = $1";
        self.credentials(statement, email).await
    }

    async fn credentials_by_user(&self, user_id: &str) -> Result<Option<Credentials>, Fault> {
        let statement = "SELECT id, organization_id, email, password_hash, created_at_ms FROM users WHERE id = $1";
        self.credentials(statement, user_id).await
    }

    async fn change_password(
        &self,
        user_id: &str,
        password_hash: &str,
        session: &NewSession,
        stamp: Stamp<'_>,
    ) -> Result<(), Fault> {
        retry(|| async {
            let mut tx = self.begin().await?;
            sqlx::query("UPDATE users SET password_hash = $1 WHERE id = $2")
                .bind(password_hash)
                .bind(user_id)
                .execute(&mut *tx)
                .await?;
            sqlx::query("DELETE FROM sessions WHERE user_id = $1")
                .bind(user_id)
                .execute(&mut *tx)
                .await?;
            insert_session(&mut tx, session).await?;
            let note = user_note(&mut tx, "password.change", user_id).await?;
            write_audit(&mut tx, &note, stamp).await?;
            commit(tx).await
        })
        .await
    }

    async fn begin_session(
        &self,
        session: &NewSession,
        replaced: Option<&Digest>,
        stamp: Stamp<'_>,
    ) -> Result<(), Fault> {
        retry(|| self.try_begin_session(session, replaced, stamp)).await
    }

    async fn session(&self, digest: &Digest, now_ms: i64) -> Result<Option<(Session, User)>, Fault> {
        retry(|| async {
            let row: Option<SessionOfUserRow> = sqlx::query_as(
                "SELECT s.id, s.user_id, s.created_at_ms, s.last_used_at_ms, s.expires_at_ms, s.address, s.user_agent,
                        u.organization_id, u.email, u.created_at_ms AS user_created_at_ms
                 FROM sessions AS s JOIN users AS u ON u.id = s.user_id WHERE s.digest = $1 AND s.expires_at_ms > $2",
            )
            .bind(digest.as_slice())
            .bind(now_ms)
            .fetch_optional(&self.pools.general)
            .await?;
            Ok(row.map(SessionOfUserRow::into_parts))
        })
        .await
    }

    async fn touch_session(&self, id: &str, now_ms: i64) -> Result<(), Fault> {
        retry(|| async {
            sqlx::query("UPDATE sessions SET last_used_at_ms = $1 WHERE id = $2 AND last_used_at_ms < $1")
                .bind(now_ms)
                .bind(id)
                .execute(&self.pools.general)
                .await?;
            Ok(())
        })
        .await
    }

    async fn sessions(&self, user_id: &str, now_ms: i64) -> Result<Vec<Session>, Fault> {
        retry(|| async {
            let rows: Vec<SessionRow> = sqlx::query_as(
                "SELECT id, user_id, created_at_ms, last_used_at_ms, expires_at_ms, address, user_agent FROM sessions
                 WHERE user_id = $1 AND expires_at_ms > $2 ORDER BY last_used_at_ms DESC, id",
            )
            .bind(user_id)
            .bind(now_ms)
            .fetch_all(&self.pools.general)
            .await?;
            Ok(rows.into_iter().map(SessionRow::into_session).collect())
        })
        .await
    }

    async fn end_sessions(&self, user_id: &str, which: EndSessions<'_>, stamp: Stamp<'_>) -> Result<u64, Fault> {
        retry(|| async {
            let mut tx = self.begin().await?;
            let statement = match which {
                EndSessions::One(_) => "DELETE FROM sessions WHERE user_id = $1 AND id = $2",
                EndSessions::AllBut(_) => "DELETE FROM sessions WHERE user_id = $1 AND id <> $2",
            };
            let (EndSessions::One(id) | EndSessions::AllBut(id)) = which;
            let ended = sqlx::query(statement).bind(user_id).bind(id).execute(&mut *tx).await?;
            if ended.rows_affected() > 0 {
                let note = user_note(&mut tx, "session.end", user_id).await?;
                write_audit(&mut tx, &note, stamp).await?;
                commit(tx).await?;
            }
            Ok(ended.rows_affected())
        })
        .await
    }

    async fn create_token(
        &self,
        token: &AccessToken,
        digest: &Digest,
        limit: u64,
        stamp: Stamp<'_>,
    ) -> Result<(), Fault> {
        retry(|| self.try_create_token(token, digest, limit, stamp)).await
    }

    async fn tokens(&self, organization_id: &str) -> Result<Vec<AccessToken>, Fault> {
        retry(|| async {
            let rows: Vec<TokenRow> = sqlx::query_as(
                "SELECT id, organization_id, name, last_four, created_at_ms, expires_at_ms, last_used_at_ms FROM tokens
                 WHERE organization_id = $1 ORDER BY created_at_ms, id",
            )
            .bind(organization_id)
            .fetch_all(&self.pools.general)
            .await?;
            Ok(rows.into_iter().map(TokenRow::into_token).collect())
        })
        .await
    }

    async fn token(&self, digest: &Digest, now_ms: i64) -> Result<Option<AccessToken>, Fault> {
        retry(|| async {
            let row: Option<TokenRow> = sqlx::query_as(
                "SELECT id, organization_id, name, last_four, created_at_ms, expires_at_ms, last_used_at_ms FROM tokens
                 WHERE digest = $1 AND (expires_at_ms IS NULL OR expires_at_ms > $2)",
            )
            .bind(digest.as_slice())
            .bind(now_ms)
            .fetch_optional(&self.pools.general)
            .await?;
            Ok(row.map(TokenRow::into_token))
        })
        .await
    }

    async fn touch_token(&self, id: &str, now_ms: i64) -> Result<(), Fault> {
        retry(|| async {
            sqlx::query("UPDATE tokens SET last_used_at_ms = $1 WHERE id = $2 AND coalesce(last_used_at_ms, 0) < $1")
                .bind(now_ms)
                .bind(id)
                .execute(&self.pools.general)
                .await?;
            Ok(())
        })
        .await
    }

    async fn delete_token(&self, organization_id: &str, id: &str, stamp: Stamp<'_>) -> Result<bool, Fault> {
        retry(|| async {
            let mut tx = self.begin().await?;
            let name: Option<String> =
                sqlx::query_scalar("DELETE FROM tokens WHERE organization_id = $1 AND id = $2 RETURNING name")
                    .bind(organization_id)
                    .bind(id)
                    .fetch_optional(&mut *tx)
                    .await?;
            let Some(name) = name else { return Ok(false) };
            write_audit(&mut tx, &token_note("token.delete", organization_id, id, &name), stamp).await?;
            commit(tx).await?;
            Ok(true)
        })
        .await
    }
}

impl PostgresStore {
    async fn credentials(&self, statement: &'static str, value: &str) -> Result<Option<Credentials>, Fault> {
        // An address that nobody can have must be answered like one that nobody has.
        if is_nowhere(&[Some(value)]) {
            return Ok(None);
        }
        retry(|| async {
            let row: Option<CredentialsRow> = sqlx::query_as(statement)
                .bind(value)
                .fetch_optional(&self.pools.general)
                .await?;
            Ok(row.map(CredentialsRow::into_credentials))
        })
        .await
    }

    async fn try_begin_session(&self, new: &NewSession, replaced: Option<&Digest>, stamp: Stamp<'_>) -> Attempt<()> {
        let mut tx = self.begin().await?;
        let user_id = &new.session.user_id;
        // One after another for one user, or two at once would each count without the other.
        sqlx::query("SELECT 1 FROM users WHERE id = $1 FOR NO KEY UPDATE")
            .bind(user_id)
            .execute(&mut *tx)
            .await?;
        if let Some(digest) = replaced {
            sqlx::query("DELETE FROM sessions WHERE digest = $1")
                .bind(digest.as_slice())
                .execute(&mut *tx)
                .await?;
        }
        insert_session(&mut tx, new).await?;
        // The oldest give way, so that a script that signs in for every call cannot fill the table.
        sqlx::query(
            "DELETE FROM sessions WHERE user_id = $1 AND id NOT IN
                 (SELECT id FROM sessions WHERE user_id = $1 ORDER BY last_used_at_ms DESC, created_at_ms DESC LIMIT $2)",
        )
        .bind(user_id)
        .bind(MOST_SESSIONS)
        .execute(&mut *tx)
        .await?;
        let note = user_note(&mut tx, "session.begin", user_id).await?;
        write_audit(&mut tx, &note, stamp).await?;
        commit(tx).await
    }

    async fn try_create_token(
        &self,
        token: &AccessToken,
        digest: &Digest,
        limit: u64,
        stamp: Stamp<'_>,
    ) -> Attempt<()> {
        let mut tx = self.begin().await?;
        // One after another for one organisation, or two at once would each count without the other.
        sqlx::query("SELECT 1 FROM organizations WHERE id = $1 FOR NO KEY UPDATE")
            .bind(&token.organization_id)
            .execute(&mut *tx)
            .await?;
        let count: i64 = sqlx::query_scalar("SELECT count(*) FROM tokens WHERE organization_id = $1")
            .bind(&token.organization_id)
            .fetch_one(&mut *tx)
            .await?;
        if count as u64 >= limit {
            let what = "access tokens";
            return Err(Failure::Final(Fault::TooMany { what, limit }));
        }
        sqlx::query(
            "INSERT INTO tokens (id, organization_id, name, digest, last_four, created_at_ms, expires_at_ms)
             VALUES ($1, $2, $3, $4, $5, $6, $7)",
        )
        .bind(&token.id)
        .bind(&token.organization_id)
        .bind(&token.name)
        .bind(digest.as_slice())
        .bind(&token.last_four)
        .bind(token.created_at_ms)
        .bind(token.expires_at_ms)
        .execute(&mut *tx)
        .await?;
        let note = token_note("token.create", &token.organization_id, &token.id, &token.name);
        write_audit(&mut tx, &note, stamp).await?;
        commit(tx).await
    }
}

#[derive(sqlx::FromRow)]
struct SessionOfUserRow {
    #[sqlx(flatten)]
    session: SessionRow,
    organization_id: String,
    email: String,
    user_created_at_ms: i64,
}

impl SessionOfUserRow {
    fn into_parts(self) -> (Session, User) {
        let user = User {
            id: self.session.user_id.clone(),
            organization_id: self.organization_id,
            email: self.email,
            created_at_ms: self.user_created_at_ms,
        };
        (self.session.into_session(), user)
    }
}

async fn insert_session(tx: &mut PgConnection, new: &NewSession) -> Attempt<()> {
    sqlx::query(
        "INSERT INTO sessions (id, digest, user_id, created_at_ms, last_used_at_ms, expires_at_ms, address, user_agent)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
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
    .await?;
    Ok(())
}

async fn user_note(tx: &mut PgConnection, action: &'static str, user_id: &str) -> Attempt<AuditNote> {
    let organization: Option<String> = sqlx::query_scalar("SELECT organization_id FROM users WHERE id = $1")
        .bind(user_id)
        .fetch_optional(tx)
        .await?;
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
