//! Passwords: argon2id, away from the async threads and never more at once than there are cores.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use argon2::password_hash::phc::PasswordHash;
use argon2::{Algorithm, Argon2, Params, PasswordHasher as _, PasswordVerifier as _, Version};
use tokio::sync::Semaphore;

use super::model::Fault;

/// Hashes and verifies passwords.
#[derive(Clone)]
pub struct Passwords(Arc<Inner>);

struct Inner {
    argon2: Argon2<'static>,
    /// One hash takes a core and 19 MiB for tens of milliseconds.
    permits: Arc<Semaphore>,
    waiting: AtomicUsize,
    checked: AtomicU64,
    /// What a password for an unknown account is compared with, so that both take the same time.
    nobody: String,
}

impl Passwords {
    /// Parameters of OWASP's Password Storage Cheat Sheet: 19 MiB, 2 passes, 1 lane.
    pub async fn new() -> Result<Self, Fault> {
        let params = Params::new(19 * 1024, 2, 1, None).map_err(|e| Fault::Internal(format!("argon2: {e}")))?;
        let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let hasher = argon2.clone();
        let nobody = tokio::task::spawn_blocking(move || hash(&hasher, "nobody has this password"))
            .await
            .map_err(|e| Fault::Internal(e.to_string()))??;
        Ok(Self(Arc::new(Inner {
            argon2,
            permits: Arc::new(Semaphore::new(cores)),
            waiting: AtomicUsize::new(0),
            checked: AtomicU64::new(0),
            nobody,
        })))
    }

    /// The PHC string to store. [`Fault::Busy`] if too many wait already.
    pub async fn hash(&self, password: String) -> Result<String, Fault> {
        let argon2 = self.0.argon2.clone();
        self.run(move || hash(&argon2, &password)).await
    }

    /// Whether the password fits. Without a stored hash it does the same work and answers false.
    pub async fn verify(&self, password: String, stored: Option<String>) -> Result<bool, Fault> {
        let argon2 = self.0.argon2.clone();
        let known = stored.is_some();
        let stored = stored.unwrap_or_else(|| self.0.nobody.clone());
        let this = self.clone();
        self.run(move || {
            // Relaxed: a count for people.
            this.0.checked.fetch_add(1, Ordering::Relaxed);
            let stored = PasswordHash::new(&stored)
                .map_err(|e| Fault::Internal(format!("a stored password hash cannot be read: {e}")))?;
            Ok(argon2.verify_password(password.as_bytes(), &stored).is_ok() && known)
        })
        .await
    }

    /// How often a password was compared with a hash, that of nobody included.
    pub fn checked(&self) -> u64 {
        self.0.checked.load(Ordering::Relaxed)
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, Fault> {
        let waiting = Waiting::enter(&self.0.waiting)?;
        let permit = Arc::clone(&self.0.permits)
            .acquire_owned()
            .await
            .map_err(|e| Fault::Internal(e.to_string()))?;
        drop(waiting);
        // The permit goes along: if the caller gives up, the work still counts until it is done.
        tokio::task::spawn_blocking(move || {
            let _permit = permit;
            work()
        })
        .await
        .map_err(|e| Fault::Internal(e.to_string()))?
    }
}

struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn enter(count: &'a AtomicUsize) -> Result<Self, Fault> {
        // Relaxed: the count bounds a queue and guards no other memory.
        if count.fetch_add(1, Ordering::Relaxed) >= MOST_WAITING {
            count.fetch_sub(1, Ordering::Relaxed);
            return Err(Fault::Busy);
        }
        Ok(Self(count))
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn hash(argon2: &Argon2<'_>, password: &str) -> Result<String, Fault> {
    let mut salt = [0_u8; 16];
    getrandom::fill(&mut salt).map_err(|e| Fault::Internal(format!("the system gives no randomness: {e}")))?;
    let hash: PasswordHash = argon2
        .hash_password_with_salt(password.as_bytes(), &salt)
        .map_err(|e| Fault::Internal(format!("argon2: {e}")))?;
    Ok(hash.to_string())
}

/// At 30 ms each on two cores, the last of these waits about a second.
const MOST_WAITING: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_password_fits_its_own_hash_only() {
        let passwords = Passwords::new().await.unwrap();
        let stored = passwords.hash("correct horse".into()).await.unwrap();
        assert!(stored.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"));
        assert!(
            passwords
                .verify("correct horse".into(), Some(stored.clone()))
                .await
                .unwrap()
        );
        assert!(!passwords.verify("battery staple".into(), Some(stored)).await.unwrap());
        assert!(!passwords.verify("nobody has this password".into(), None).await.unwrap());
    }
}
