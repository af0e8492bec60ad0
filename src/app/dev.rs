//! What `tollgate dev` has beside a usual process: tokens that it makes itself, and a key that it prints.

use super::AppError;
use crate::control::ControlPlane;
use crate::gate::Gate;
use std::fmt;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// A token that is made once and kept, readable by its owner only.
pub fn token_file(data: &Path, name: &str) -> Result<PathBuf, AppError> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let path = data.join(name);
    let failed = |error: &dyn fmt::Display| AppError::Failed(format!("cannot make {}: {error}", path.display()));
    match fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
    {
        Ok(mut file) => {
            let mut random = [0; 32];
            getrandom::fill(&mut random).map_err(|error| failed(&error))?;
            let token: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
            file.write_all(token.as_bytes())
                .and_then(|()| file.sync_all())
                .map_err(|error| failed(&error))?;
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(failed(&error)),
    }
    Ok(path)
}

/// Tells the developer what to paste, once it works.
pub struct DevPrinter {
    pub gate: Option<Arc<Gate>>,
    pub address: Option<SocketAddr>,
    pub control: Option<SocketAddr>,
}

impl DevPrinter {
    pub async fn print(self, control: ControlPlane) {
        let key = match control.dev_key().await {
            Ok(key) => key,
            Err(error) => return log::error!("no key could be made: {error}"),
        };
        let (Some(gate), Some(address), Some(portal)) = (self.gate, self.address, self.control) else {
            return;
        };
        // A key that is printed works: wait until the gate has it, which takes milliseconds.
        let mut tries = 0;
        while !gate.has_secret(key.secret.as_bytes()) && tries < 1000 {
            tokio::time::sleep(Duration::from_millis(10)).await;
            tries += 1;
        }
        println!("Tollgate is running. Stop it with Ctrl-C; what it knows is kept.\n");
        println!("  gate            http://{address}");
        println!("  portal and API  http://{portal}");
        println!("\nA fresh key (shown only now):\n\n  {}\n", key.secret);
        println!("Try it in a second terminal:\n");
        println!(
            "  curl -i -H 'x-api-key: {}' http://{address}/api/v1/identity/me\n",
            key.secret
        );
    }
}
