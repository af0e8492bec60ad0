//! What the shared counts are kept in.

use super::protocol::{Batch, BatchAnswer};
use async_trait::async_trait;
use std::fmt;

/// A store of shared counts: it carries batches out, each call in it atomically.
#[async_trait]
pub trait Store: Send + Sync + fmt::Debug {
    /// Into how many parts the windows are divided that fail each by itself.
    fn partitions(&self) -> u16;

    /// Carries a batch out in one partition. All of it goes to one server, in its order, and the identity is read last.
    ///
    /// # Errors
    /// [`StoreError`] where there is no full answer. What was asked may have been done all the same.
    async fn exchange(&self, partition: u16, batch: &Batch) -> Result<BatchAnswer, StoreError>;

    /// Says whether the store is fit for its purpose.
    ///
    /// # Errors
    /// [`StoreError::Unfit`] where it would forget counts by itself; others where it could not be asked.
    async fn check(&self) -> Result<Vec<String>, StoreError>;
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreError {
    /// Not reached, or no answer in time; the text says what happened.
    Unreachable(String),
    /// It answered what it should not.
    Garbled(String),
    /// Its settings would let it forget counts.
    Unfit(String),
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoreError::Unreachable(why) => write!(f, "the store of shared counts cannot be reached: {why}"),
            StoreError::Garbled(what) => write!(f, "the store of shared counts answered {what}"),
            StoreError::Unfit(why) => write!(f, "the store of shared counts is not fit: {why}"),
        }
    }
}

impl std::error::Error for StoreError {}
