//! Access tokens: what scripts and the command line use instead of a session.

use std::sync::Arc;

use super::Service;
use super::check::Check;
use super::sessions::TOUCH_EVERY_MS;
use crate::control::model::{AccessToken, Actor, Caller, Fault, FieldFault, Member};
use crate::control::secret::{self, Secret, digest};

/// A token to be made.
#[derive(Default)]
pub struct TokenDraft {
    pub faults: Vec<FieldFault>,
    pub name: Option<String>,
    pub expires_at_ms: Option<i64>,
    /// The token's id, where the caller must be able to tell a repetition; none: a random one.
    pub id: Option<String>,
}

impl Service {
    /// Makes a token that acts for the organisation.
    pub async fn create_token(
        &self,
        caller: &Caller,
        organization: &str,
        draft: TokenDraft,
    ) -> Result<(AccessToken, Secret), Fault> {
        let now_ms = self.now_ms();
        let mut check = Check::new(draft.faults);
        let name = check.required("name", draft.name);
        check.name("name", &name);
        check.future("expiresAt", draft.expires_at_ms, now_ms);
        check.finish()?;
        let secret = secret::access_token()?;
        let token = AccessToken {
            id: draft.id.map_or_else(|| secret::id("tok_"), Ok)?,
            organization_id: organization.to_owned(),
            name,
            last_four: secret.last_four(),
            created_at_ms: now_ms,
            expires_at_ms: draft.expires_at_ms,
            last_used_at_ms: None,
        };
        self.store
            .create_token(&token, &secret.digest(), MOST_TOKENS, self.stamp(caller))
            .await?;
        Ok((token, secret))
    }

    /// The organisation's tokens, oldest first.
    pub async fn tokens(&self, organization: &str) -> Result<Vec<AccessToken>, Fault> {
        self.store.tokens(organization).await
    }

    /// Ends a token at once.
    pub async fn delete_token(&self, caller: &Caller, organization: &str, id: &str) -> Result<(), Fault> {
        match self.store.delete_token(organization, id, self.stamp(caller)).await? {
            true => Ok(()),
            false => Err(Fault::NotFound),
        }
    }

    /// Whom a presented token stands for.
    pub async fn token_member(&self, presented: &str) -> Result<Option<Member>, Fault> {
        let now_ms = self.now_ms();
        let Some(token) = self.store.token(&digest(presented), now_ms).await? else {
            return Ok(None);
        };
        if token.last_used_at_ms.is_none_or(|at| at + TOUCH_EVERY_MS <= now_ms) {
            let (store, id) = (Arc::clone(&self.store), token.id.clone());
            self.note_use(async move { store.touch_token(&id, now_ms).await });
        }
        Ok(Some(Member {
            organization_id: token.organization_id,
            actor: Actor::Token {
                id: token.id,
                name: token.name,
            },
            session_id: None,
        }))
    }
}

/// Tokens of one organisation. The list has no pages.
const MOST_TOKENS: u64 = 100;
