//! What surrounds the program on a server: units, the service manager's protocols, the package.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const TOLLGATE: &str = env!("CARGO_BIN_EXE_tollgate");
const SERVICES: [&str; 2] = ["tollgate-gate.service", "tollgate-control.service"];
/// Generous: the machines that run tests are slow and shared.
const PATIENCE: Duration = Duration::from_secs(30);

fn unit(name: &str) -> PathBuf {
    Path::new(ROOT).join("systemd").join(name)
}

#[test]
fn the_services_are_exposed_to_at_most_1_6() {
    for service in SERVICES {
        let output = Command::new("systemd-analyze")
            .args(["security", "--offline=yes", "--threshold=16", "--no-pager"])
            .arg(unit(service))
            .output()
            .expect("systemd-analyze is in the package systemd");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let level = said
            .lines()
            .find(|line| line.contains("Overall exposure level"))
            .unwrap_or_default();
        println!("{level}");
        assert!(output.status.success() && !level.is_empty(), "{said}");
    }
}

#[test]
fn the_units_are_well_formed() {
    // As installed, but for where the program lies.
    let directory = tempfile::tempdir().unwrap();
    let mut units = vec![];
    for entry in fs::read_dir(Path::new(ROOT).join("systemd")).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            continue;
        }
        let text = fs::read_to_string(&path)
            .unwrap()
            .replace("/usr/bin/tollgate", TOLLGATE);
        let copy = directory.path().join(path.file_name().unwrap());
        fs::write(&copy, text).unwrap();
        units.push(copy);
    }
    assert_eq!(units.len(), 4);
    let output = Command::new("systemd-analyze")
        .args(["verify", "--man=no"])
        .args(&units)
        .output()
        .expect("systemd-analyze is in the package systemd");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    // Of other units that a machine may have it can say what it likes.
    let ours: Vec<&str> = said.lines().filter(|line| line.contains("tollgate")).collect();
    assert!(ours.is_empty() && output.status.success(), "{said}");
}

/// A gate on a key file, in a directory of its own.
struct Service {
    directory: tempfile::TempDir,
    notified: UnixDatagram,
    child: Child,
}

impl Service {
    fn configured(listen: &str) -> (tempfile::TempDir, UnixDatagram) {
        let directory = tempfile::tempdir().unwrap();
        let dir = directory.path();
        fs::write(
            dir.join("tollgate.yaml"),
            format!(
                "version: 1\ngate:\n  listen: [{{address: \"{listen}\"}}]\n  state_dir: state\n  \
                 feed: {{file: keys.ndjson}}\ntiers: {{default: {{limit: 10, window: 1h}}}}\n\
                 upstreams: {{mine: {{servers: [\"127.0.0.1:9\"]}}}}\nadmin: {{listen: \"127.0.0.1:0\"}}\n"
            ),
        )
        .unwrap();
        fs::write(dir.join("keys.ndjson"), "").unwrap();
        let notified = UnixDatagram::bind(dir.join("notify")).unwrap();
        notified.set_read_timeout(Some(PATIENCE)).unwrap();
        (directory, notified)
    }

    fn start(mut command: Command, directory: tempfile::TempDir, notified: UnixDatagram) -> Self {
        let child = command
            .env("NOTIFY_SOCKET", directory.path().join("notify"))
            .stdin(Stdio::null())
            .stderr(fs::File::create(directory.path().join("log")).unwrap())
            .spawn()
            .unwrap();
        Service {
            directory,
            notified,
            child,
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap()
    }

    /// What the service manager is told next.
    fn told(&self) -> String {
        let mut buffer = [0; 1024];
        let length = self
            .notified
            .recv(&mut buffer)
            .unwrap_or_else(|error| panic!("{error}: {}", self.log()));
        String::from_utf8_lossy(&buffer[..length]).trim().to_owned()
    }

    fn address(&self, name: &str) -> String {
        let path = self.directory.path().join(format!("state/run/{name}.addr"));
        fs::read_to_string(path).unwrap().trim().to_owned()
    }

    /// Runs a line of the unit, as the service manager would, but for the paths.
    fn line(&self, key: &str) -> std::process::Output {
        let unit = fs::read_to_string(unit(SERVICES[0])).unwrap();
        let line = unit
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
            .unwrap();
        let mut words = line.split(' ').map(|word| match word {
            "/usr/bin/tollgate" => TOLLGATE.to_owned(),
            "/etc/tollgate/gate.yaml" => self.directory.path().join("tollgate.yaml").display().to_string(),
            other => other.to_owned(),
        });
        Command::new(words.next().unwrap()).args(words).output().unwrap()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn signal(pid: u32, name: &str) {
    assert!(
        Command::new("kill")
            .arg(format!("-{name}"))
            .arg(pid.to_string())
            .status()
            .unwrap()
            .success()
    );
}

fn status_line(address: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nhost: h\r\n\r\n").unwrap();
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    line.trim().to_owned()
}

#[test]
fn the_service_manager_is_told_of_readiness_upgrade_and_end() {
    let (directory, notified) = Service::configured("127.0.0.1:0");
    let mut command = Command::new(TOLLGATE);
    command.args(["run", "-c"]).arg(directory.path().join("tollgate.yaml"));
    let mut service = Service::start(command, directory, notified);
    assert_eq!(service.told(), "READY=1");
    let gate = service.address("gate");
    assert_eq!(status_line(&gate), "HTTP/1.1 401 Unauthorized", "ready means serving");

    let reload = service.line("ExecReload");
    assert!(reload.status.success(), "{reload:?}");
    let config = service.directory.path().join("tollgate.yaml");
    let good = fs::read_to_string(&config).unwrap();
    fs::write(&config, good.replace("limit: 10", "limit: ten")).unwrap();
    let reload = service.line("ExecReload");
    assert_eq!(
        reload.status.code(),
        Some(3),
        "a failed reload is a failed command: {reload:?}"
    );
    fs::write(&config, good).unwrap();

    let upgrade = Command::new(TOLLGATE)
        .args(["upgrade", "--admin", &service.address("admin")])
        .output()
        .unwrap();
    assert!(upgrade.status.success(), "{upgrade:?}\n{}", service.log());
    let main_pid = service.told();
    let successor: u32 = main_pid.strip_prefix("MAINPID=").expect(&main_pid).parse().unwrap();
    assert_ne!(successor, service.child.id());
    assert!(service.child.wait().unwrap().success());
    assert_eq!(status_line(&gate), "HTTP/1.1 401 Unauthorized");
    signal(successor, "TERM");
    assert_eq!(service.told(), "STOPPING=1");
    let deadline = Instant::now() + PATIENCE;
    while TcpStream::connect(&gate).is_ok() {
        assert!(Instant::now() < deadline, "{}", service.log());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_socket_of_the_service_manager_is_used_and_handed_on() {
    // A port that is free now; whoever takes it in between makes the activation fail, and the test with it.
    let address = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .to_string();
    let (directory, notified) = Service::configured(&address);
    let mut command = Command::new("systemd-socket-activate");
    command
        .args(["--listen", &address, "--setenv"])
        .arg(format!("NOTIFY_SOCKET={}", directory.path().join("notify").display()))
        .arg(TOLLGATE)
        .args(["run", "-c"])
        .arg(directory.path().join("tollgate.yaml"));
    let mut service = Service::start(command, directory, notified);
    // The service manager listens before there is a process, and the first connection starts it.
    let deadline = Instant::now() + PATIENCE;
    let mut first = loop {
        match TcpStream::connect(&address) {
            Ok(stream) => break stream,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    first
        .write_all(b"GET / HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    first.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 401 "), "{answer}");
    assert_eq!(service.told(), "READY=1");
    assert_eq!(service.address("gate"), address);
    let upgrade = Command::new(TOLLGATE)
        .args(["upgrade", "--admin", &service.address("admin")])
        .output()
        .unwrap();
    assert!(upgrade.status.success(), "{upgrade:?}\n{}", service.log());
    let main_pid = service.told();
    assert!(service.child.wait().unwrap().success());
    assert_eq!(status_line(&address), "HTTP/1.1 401 Unauthorized");
    signal(
        main_pid.strip_prefix("MAINPID=").expect(&main_pid).parse().unwrap(),
        "TERM",
    );
    assert_eq!(service.told(), "STOPPING=1");
}

#[test]
fn the_package_configurations_are_fine() {
    let etc = tempfile::tempdir().unwrap();
    for (name, token) in [
        ("feed", "0123456789abcdef".repeat(4)),
        ("admin", "fedcba9876543210".repeat(4)),
    ] {
        let path = etc.path().join(format!("{name}.token"));
        fs::write(&path, token).unwrap();
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    }
    for file in ["conf/gate.yaml", "conf/control.yaml"] {
        let output = Command::new(TOLLGATE)
            .args(["check", "-c"])
            .arg(Path::new(ROOT).join(file))
            .env("TOLLGATE_ETC", etc.path())
            .output()
            .unwrap();
        assert!(output.status.success(), "{file}: {output:?}");
    }
}

#[test]
fn the_package_has_everything_that_it_names() {
    let manifest = fs::read_to_string(Path::new(ROOT).join("Cargo.toml")).unwrap();
    let package = manifest
        .split("[package.metadata.deb]")
        .nth(1)
        .expect("a package is described");
    let mut named = 0;
    for line in package.lines().filter(|line| line.trim_start().starts_with("[\"")) {
        let source = line.trim_start().trim_start_matches("[\"").split('"').next().unwrap();
        // What is built: the program, its man pages and completions.
        if !source.starts_with("target/") {
            named += 1;
            assert!(Path::new(ROOT).join(source).exists(), "Cargo.toml names {source}");
        }
    }
    assert!(named >= 6, "{named}");
    for script in ["postinst", "prerm", "postrm"] {
        let path = Path::new(ROOT).join("systemd/debian").join(script);
        let output = Command::new("sh").arg("-n").arg(&path).output().unwrap();
        assert!(output.status.success(), "{}: {output:?}", path.display());
    }
}
