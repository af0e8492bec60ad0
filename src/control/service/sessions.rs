//! Signing in and out, and passwords.

use std::sync::Arc;

use super::Service;
use super::check::Check;
use crate::control::model::{Actor, Caller, Fault, FieldFault, Member, Session, User};
use crate::control::secret::{self, Digest, Secret, digest};
use crate::control::store::{EndSessions, NewSession};
use crate::control::throttle::address_name;

/// A sign-in.
#[derive(Default)]
pub struct LoginDraft {
    pub faults: Vec<FieldFault>,
    pub email: Option<String>,
    pub password: Option<String>,
    /// The session that the browser brought along; it ends, so that nobody can plant one beforehand.
    pub brought: Option<String>,
}

/// A new password.
#[derive(Default)]
pub struct PasswordDraft {
    pub faults: Vec<FieldFault>,
    pub current: Option<String>,
    pub new: Option<String>,
}

/// A session that has begun.
#[derive(Debug)]
pub struct SignedIn {
    pub user: User,
    pub session: Session,
    pub secret: Secret,
}

impl Service {
    /// Signs in. An unknown e-mail and a wrong password take the same time and answer the same.
    pub async fn login(&self, caller: &Caller, draft: LoginDraft) -> Result<SignedIn, Fault> {
        let now_ms = self.now_ms();
        let mut check = Check::new(draft.faults);
        let email = check.required("email", draft.email).to_ascii_lowercase();
        let password = check.required("password", draft.password);
        if email.len() > 254 {
            check.fault("email", "must have at most 254 characters");
        }
        if password.chars().count() > 1024 {
            check.fault("password", "must have at most 1024 characters");
        }
        check.finish()?;
        let address = address_name(caller.origin.address);
        // Counted before the work, so that parallel attempts cannot slip through; taken back if it goes well.
        self.logins_by_address.attempt(&address, now_ms)?;
        if let Err(fault) = self.logins_by_account.attempt(&email, now_ms) {
            self.logins_by_address.refund(&address, now_ms);
            return Err(fault);
        }
        let known = self.store.credentials_by_email(&email).await?;
        let stored = known.as_ref().map(|c| c.password_hash.clone());
        let fits = self.passwords.verify(password, stored).await?;
        let Some(user) = known.map(|c| c.user).filter(|_| fits) else {
            return Err(Fault::WrongCredentials);
        };
        self.logins_by_address.refund(&address, now_ms);
        self.logins_by_account.refund(&email, now_ms);
        let (new, secret) = self.new_session(&user, caller)?;
        let brought = draft.brought.as_deref().map(digest);
        let caller = as_user(caller, &user);
        self.store
            .begin_session(&new, brought.as_ref(), self.stamp(&caller))
            .await?;
        Ok(SignedIn {
            user,
            session: new.session,
            secret,
        })
    }

    /// Whom a session's secret stands for. Idle for a week, it is over.
    pub async fn session_member(&self, presented: &str) -> Result<Option<(Member, Session, User)>, Fault> {
        let now_ms = self.now_ms();
        let Some((session, user)) = self.store.session(&digest(presented), now_ms).await? else {
            return Ok(None);
        };
        if session.last_used_at_ms + SESSION_IDLE_MS <= now_ms {
            return Ok(None);
        }
        if session.last_used_at_ms + TOUCH_EVERY_MS <= now_ms {
            let (store, id) = (Arc::clone(&self.store), session.id.clone());
            self.note_use(async move { store.touch_session(&id, now_ms).await });
        }
        let member = Member {
            organization_id: user.organization_id.clone(),
            actor: Actor::User {
                id: user.id.clone(),
                email: user.email.clone(),
            },
            session_id: Some(session.id.clone()),
        };
        Ok(Some((member, session, user)))
    }

    /// Ends a session of the user.
    pub async fn end_session(&self, caller: &Caller, user_id: &str, session_id: &str) -> Result<(), Fault> {
        match self
            .store
            .end_sessions(user_id, EndSessions::One(session_id), self.stamp(caller))
            .await?
        {
            0 => Err(Fault::NotFound),
            _ => Ok(()),
        }
    }

    /// Ends every session of the user but this one; answers how many.
    pub async fn end_other_sessions(&self, caller: &Caller, user_id: &str, keep: &str) -> Result<u64, Fault> {
        self.store
            .end_sessions(user_id, EndSessions::AllBut(keep), self.stamp(caller))
            .await
    }

    /// The user's sessions, the latest used first.
    pub async fn sessions(&self, user_id: &str) -> Result<Vec<Session>, Fault> {
        let now_ms = self.now_ms();
        let sessions = self.store.sessions(user_id, now_ms).await?;
        Ok(sessions
            .into_iter()
            .filter(|s| s.last_used_at_ms + SESSION_IDLE_MS > now_ms)
            .collect())
    }

    /// Changes the password. Every session ends, also the one that asks: it gets a new id.
    pub async fn change_password(&self, caller: &Caller, user: &User, draft: PasswordDraft) -> Result<SignedIn, Fault> {
        let now_ms = self.now_ms();
        let mut check = Check::new(draft.faults);
        let current = check.required("currentPassword", draft.current);
        let new = check.required("newPassword", draft.new);
        check.password("newPassword", &new);
        if current.chars().count() > 1024 {
            check.fault("currentPassword", "must have at most 1024 characters");
        }
        check.finish()?;
        // A stolen session must not be a way to guess the password.
        self.logins_by_account.attempt(&user.email, now_ms)?;
        let known = self.store.credentials_by_user(&user.id).await?.ok_or(Fault::NotFound)?;
        if !self.passwords.verify(current, Some(known.password_hash)).await? {
            return Err(Fault::field("currentPassword", "is wrong"));
        }
        self.logins_by_account.refund(&user.email, now_ms);
        let password_hash = self.passwords.hash(new).await?;
        let (new, secret) = self.new_session(user, caller)?;
        self.store
            .change_password(&user.id, &password_hash, &new, self.stamp(caller))
            .await?;
        Ok(SignedIn {
            user: user.clone(),
            session: new.session,
            secret,
        })
    }

    fn new_session(&self, user: &User, caller: &Caller) -> Result<(NewSession, Secret), Fault> {
        let now_ms = self.now_ms();
        let secret = secret::session()?;
        let digest: Digest = secret.digest();
        let session = Session {
            id: secret::id("ses_")?,
            user_id: user.id.clone(),
            created_at_ms: now_ms,
            last_used_at_ms: now_ms,
            expires_at_ms: now_ms + SESSION_LIFE_MS,
            address: caller.origin.address_text(),
            user_agent: caller.origin.user_agent.clone(),
        };
        Ok((NewSession { session, digest }, secret))
    }
}

fn as_user(caller: &Caller, user: &User) -> Caller {
    let actor = Actor::User {
        id: user.id.clone(),
        email: user.email.clone(),
    };
    Caller {
        actor,
        origin: caller.origin.clone(),
    }
}

/// A session ends after 30 days, however much it is used (OWASP ASVS 3.3.2 for level 1).
pub const SESSION_LIFE_MS: i64 = 30 * 24 * 3_600_000;
/// A session that was not used for 7 days is over.
const SESSION_IDLE_MS: i64 = 7 * 24 * 3_600_000;
/// The time of the last use is written at most once a minute: a read must not cost a write.
pub(super) const TOUCH_EVERY_MS: i64 = 60_000;
