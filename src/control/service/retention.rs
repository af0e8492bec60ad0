//! What is not kept for ever: lines of the audit log, and how usage was spread over the minutes of an hour. In small steps,
//! between which everybody else gets their turn at the database.

use std::time::Duration;

use super::Service;
use crate::control::model::Fault;

impl Service {
    /// Forgets what was kept for as long as the settings say, or a part of it: the rest at the next call.
    pub(super) async fn forget_old(&self) -> Result<(), Fault> {
        let retention = self.settings.retention;
        if let Some(kept) = retention.audit {
            self.forget_audit(self.ago_ms(kept)).await?;
        }
        if let Some(kept) = retention.usage_by_minute {
            self.fold_usage(self.ago_ms(kept)).await?;
        }
        Ok(())
    }

    fn ago_ms(&self, kept: Duration) -> i64 {
        self.now_ms() - i64::try_from(kept.as_millis()).unwrap_or(i64::MAX)
    }

    async fn forget_audit(&self, before_ms: i64) -> Result<(), Fault> {
        for _ in 0..STEPS {
            if self.store.forget_audit(before_ms, AUDIT_LINES).await? < u64::from(AUDIT_LINES) {
                break;
            }
        }
        Ok(())
    }

    /// Adds up the minutes of every hour that ended before `before_ms`. How far that has come is a fact in the database; what
    /// arrives for an hour later on stays by the minute.
    async fn fold_usage(&self, before_ms: i64) -> Result<(), Fault> {
        let end = before_ms.div_euclid(60_000).div_euclid(60) * 60;
        let begun = self.store.fact(FOLDED_UP_TO).await?.and_then(|text| text.parse().ok());
        let begin = match begun {
            Some(minute) => minute,
            None => match self.store.oldest_usage().await? {
                Some(minute) => minute.div_euclid(60) * 60,
                None => return Ok(()),
            },
        };
        let (mut hour, mut organization) = (begin, None);
        for _ in 0..STEPS {
            if hour >= end {
                break;
            }
            organization = self.store.fold_usage(hour, organization.as_deref()).await?;
            if organization.is_none() {
                hour += 60;
            }
        }
        if hour > begin || begun.is_none() {
            self.store.set_fact(FOLDED_UP_TO, &hour.to_string()).await?;
        }
        Ok(())
    }
}

/// The first minute that was not looked at yet.
const FOLDED_UP_TO: &str = "usage_folded_up_to_minute";
/// In one call, which comes each minute: a year of hours in nine minutes, where they are of few organisations.
const STEPS: u32 = 1_000;
/// Lines of one step: some milliseconds.
const AUDIT_LINES: u32 = 1_000;
