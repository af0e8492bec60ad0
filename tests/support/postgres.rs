//! A PostgreSQL server of the tests' own: the system's binaries, a fresh directory, a Unix socket in it. It ends with the
//! value.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// A running server.
pub struct Postgres {
    binaries: PathBuf,
    directory: TempDir,
    databases: AtomicU32,
    settings: &'static [&'static str],
    process: Option<Child>,
}

impl Postgres {
    /// Makes a cluster and starts it. What it commits does not wait for the disk: it survives a restart, and that the
    /// machine's power fails is nothing that tests try.
    ///
    /// # Panics
    /// If PostgreSQL is not installed: a test whose part is missing fails.
    pub fn start() -> Self {
        Self::with(&["fsync=off", "full_page_writes=off", "synchronous_commit=off"])
    }

    /// One whose commits wait for the disk, for those who measure.
    pub fn durable() -> Self {
        Self::with(&[])
    }

    fn with(settings: &'static [&'static str]) -> Self {
        let directory = tempfile::Builder::new().prefix("tollgate-postgres-").tempdir().unwrap();
        if is_root() {
            // PostgreSQL refuses to run as root.
            let owner = Command::new("chown")
                .arg(UNPRIVILEGED)
                .arg(directory.path())
                .status()
                .unwrap();
            assert!(owner.success());
        }
        let mut server = Self {
            binaries: binaries(),
            directory,
            databases: AtomicU32::new(0),
            settings,
            process: None,
        };
        let data = server.data();
        // `--no-sync`: what a test cluster holds need not survive the loss of power.
        let made = server.run("initdb", |initdb| {
            initdb.args([
                "--username=tollgate",
                "--auth=trust",
                "--encoding=UTF8",
                "--locale=C",
                "--no-sync",
                "-D",
            ]);
            initdb.arg(&data);
        });
        assert!(
            made.status.success(),
            "initdb: {}",
            String::from_utf8_lossy(&made.stderr)
        );
        server.resume();
        server
    }

    /// The URL of a fresh database.
    pub fn database(&self) -> String {
        let name = format!("db{}", self.databases.fetch_add(1, Ordering::Relaxed));
        self.execute("postgres", &format!("CREATE DATABASE {name}"));
        self.url(&name)
    }

    /// The URL of a database of that name.
    pub fn url(&self, name: &str) -> String {
        let socket = self.directory.path().display().to_string().replace('/', "%2F");
        format!("postgres://tollgate@{socket}/{name}")
    }

    /// Runs a statement in a database of that name.
    pub fn execute(&self, name: &str, statement: &str) {
        let url = self.url(name);
        let done = self.run("psql", |psql| {
            psql.args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", &url, "-c", statement]);
        });
        assert!(
            done.status.success(),
            "{statement}: {}",
            String::from_utf8_lossy(&done.stderr)
        );
    }

    /// Stops it as an administrator does in a hurry: every connection is cut off, nothing committed is lost.
    pub fn stop(&mut self) {
        let mut process = self.process.take().expect("it runs");
        self.signal(&process, "INT");
        let deadline = Instant::now() + PATIENCE;
        while process.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "the server does not stop");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Starts it again, on the same socket and with what it held.
    pub fn resume(&mut self) {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.directory.path().join("log"))
            .unwrap();
        let mut command = self.command("postgres");
        command
            .arg("-D")
            .arg(self.data())
            .args(["-h", "", "-k"])
            .arg(self.directory.path())
            // A small cache; and a deadlock is looked for once, after a time in which a test can surely make one.
            .args(["-c", "shared_buffers=32MB", "-c", "deadlock_timeout=2s"])
            .args(["-c", "max_connections=200"])
            .args(self.settings.iter().flat_map(|setting| ["-c", setting]))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        self.process = Some(command.spawn().unwrap());
        let deadline = Instant::now() + PATIENCE;
        let url = self.url("postgres");
        while !self
            .run("psql", |psql| {
                psql.args(["-X", "-q", "-d", &url, "-c", "SELECT 1"]);
            })
            .status
            .success()
        {
            let log = || std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
            assert!(Instant::now() < deadline, "the server does not start:\n{}", log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn run(&self, name: &str, arguments: impl FnOnce(&mut Command)) -> Output {
        let mut command = self.command(name);
        arguments(&mut command);
        command.output().unwrap()
    }

    /// One of PostgreSQL's programs; as somebody without rights where the tests run as root.
    fn command(&self, name: &str) -> Command {
        let program = self.binaries.join(name);
        let mut command = match is_root() {
            true => {
                let mut command = Command::new("setpriv");
                command
                    .args(["--reuid", UNPRIVILEGED, "--regid", UNPRIVILEGED, "--clear-groups", "--"])
                    .arg(program);
                command
            }
            false => Command::new(program),
        };
        command.current_dir(self.directory.path()).env("LC_ALL", "C");
        command
    }

    fn signal(&self, process: &Child, name: &str) {
        // `setpriv` has become the server: the same process.
        let sent = Command::new("kill")
            .arg(format!("-{name}"))
            .arg(process.id().to_string())
            .status();
        assert!(sent.unwrap().success());
    }

    fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            self.signal(&process, "QUIT");
            let _ = process.wait();
        }
    }
}

/// The newest version that is installed: where Debian puts it, or in the PATH.
fn binaries() -> PathBuf {
    let mut found: Vec<(u32, PathBuf)> = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path().join("bin"))))
        .filter(|(_, path)| path.join("initdb").exists())
        .collect();
    found.sort();
    if let Some((_, path)) = found.pop() {
        return path;
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .find(|path| path.join("initdb").exists() && path.join("postgres").exists())
        .expect("PostgreSQL is not installed: neither /usr/lib/postgresql/*/bin nor the PATH has initdb")
}

fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt as _;
    Path::new("/proc/self").metadata().unwrap().uid() == 0
}

/// Nobody: the number is the same on every Linux.
const UNPRIVILEGED: &str = "65534";
/// How long a server may take to start or to stop.
const PATIENCE: Duration = Duration::from_secs(60);
