//! What a failed attempt means, and when to make another one.

use std::time::Duration;

use tokio::time::Instant;

use crate::control::model::Fault;

/// One run of a transaction.
pub type Attempt<T> = Result<T, Failure>;

/// Why an attempt failed.
#[derive(Debug)]
pub enum Failure {
    /// Another attempt would fail as well.
    Final(Fault),
    /// The database took the transaction back so that others could go on: a serialisation failure or a deadlock.
    Conflict(String),
    /// The connection is gone, or leads to a server that is no longer the primary.
    Lost(String),
}

/// Runs `attempt` until it is done or fails for good. It must begin anew each time: what was tried is rolled back.
///
/// # Errors
/// [`Fault::Unavailable`] after [`MOST_ATTEMPTS`], or when [`LONGEST`] is over.
pub async fn retry<T, F: Future<Output = Attempt<T>>>(mut attempt: impl FnMut() -> F) -> Result<T, Fault> {
    let begun = Instant::now();
    let (mut number, mut ceiling) = (0, FIRST_PAUSE);
    loop {
        number += 1;
        let why = match attempt().await {
            Ok(done) => return Ok(done),
            Err(Failure::Final(fault)) => return Err(fault),
            Err(Failure::Conflict(why) | Failure::Lost(why)) => why,
        };
        if number >= MOST_ATTEMPTS || begun.elapsed() >= LONGEST {
            let tried = if number == 1 { "once" } else { "several times" };
            return Err(Fault::Unavailable(format!("tried {tried}: {why}")));
        }
        log::debug!("a transaction is tried again: {why}");
        // Jitter over the whole pause: those that got in each other's way must not meet again. Without randomness they
        // merely wait longer.
        let fraction = f64::from(getrandom::u32().unwrap_or(u32::MAX)) / f64::from(u32::MAX);
        tokio::time::sleep(ceiling.mul_f64(fraction)).await;
        ceiling *= 2;
    }
}

/// Eight attempts with seven pauses, of 0.3 s on average and 0.64 s at most together.
const MOST_ATTEMPTS: u32 = 8;
const FIRST_PAUSE: Duration = Duration::from_millis(5);
/// As long as a request waits for SQLite's lock.
const LONGEST: Duration = Duration::from_secs(5);

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Failure::Final(fault)
    }
}

impl From<sqlx::Error> for Failure {
    /// Tells what passes by itself from what is our bug. The codes: <https://www.postgresql.org/docs/current/errcodes-appendix.html>
    fn from(error: sqlx::Error) -> Self {
        let text = error.to_string();
        let code = match &error {
            sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::WorkerCrashed | sqlx::Error::BeginFailed => {
                return Failure::Lost(text);
            }
            // The pool has waited and tried by itself already.
            sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed => return Failure::Final(Fault::Unavailable(text)),
            sqlx::Error::Database(database) => database.code().unwrap_or_default().into_owned(),
            _ => return Failure::Final(Fault::Internal(text)),
        };
        match code.as_str() {
            "40001" | "40P01" => Failure::Conflict(text),
            // Shut down, crashed, starting; and a primary that has become a standby.
            "57P01" | "57P02" | "57P03" | "25006" => Failure::Lost(text),
            "55P03" => Failure::Final(Fault::Unavailable(format!(
                "waited too long for another change: {text}"
            ))),
            // An id with a NUL in it cannot be stored, so it names nothing.
            "22021" => Failure::Final(Fault::NotFound),
            _ => match code.get(..2) {
                Some("08") => Failure::Lost(text),
                // No such database or role, no right; resources, limits, an operator's hand, the disk.
                Some("28" | "3D" | "53" | "54" | "57" | "58") => Failure::Final(Fault::Unavailable(text)),
                _ => Failure::Final(Fault::Internal(text)),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn conflicts_are_tried_again_but_not_for_ever() {
        let mut attempts = 0;
        let done = retry(|| {
            attempts += 1;
            let number = attempts;
            async move {
                match number {
                    1 => Err(Failure::Conflict("deadlock".into())),
                    2 => Err(Failure::Lost("gone".into())),
                    _ => Ok(number),
                }
            }
        });
        assert_eq!(done.await, Ok(3));
        let mut attempts = 0;
        let never = retry(|| {
            attempts += 1;
            async { Err::<(), _>(Failure::Conflict("again".into())) }
        });
        assert_eq!(
            never.await,
            Err(Fault::Unavailable("tried several times: again".into()))
        );
        assert_eq!(attempts, MOST_ATTEMPTS);
    }

    #[tokio::test]
    async fn what_is_final_is_not_tried_again() {
        let mut attempts = 0;
        let refused = retry(|| {
            attempts += 1;
            async { Err::<(), _>(Failure::from(Fault::EmailTaken)) }
        });
        assert_eq!(refused.await, Err(Fault::EmailTaken));
        assert_eq!(attempts, 1);
    }
}
