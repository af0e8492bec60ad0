//! A real control plane on SQLite with a million keys, in a process of its own, and what is asked of it.

use super::gate_support::secret;
use super::{KEYS, TOKEN};
use rustix::fs::{Advice, fadvise};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use sqlx::{Connection as _, Executor as _, SqliteConnection};
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tollgate::clock::Clock;
use tollgate::control::{ControlPlane, Environment, Plan, Settings, migrate};
use tollgate::wire::{FeedLine, KeyLine, SecretLine};

pub const ORGANIZATIONS: u32 = 10_000;
/// Rows to a statement.
const AT_ONCE: u32 = 1_000;

/// A control plane, and its operator.
pub struct Plane {
    process: Child,
    database: PathBuf,
    pub url: String,
}

impl Plane {
    /// Starts one over the database in `directory`, which is made where there is none.
    pub fn start(directory: &Path) -> Self {
        let mut process = Command::new(std::env::current_exe().expect("a path of its own"))
            .arg("control")
            .arg(directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("can start itself");
        let mut url = String::new();
        let output = process.stdout.take().expect("it is piped");
        BufReader::new(output).read_line(&mut url).expect("it says where it is");
        Plane {
            process,
            database: directory.join("tollgate.db"),
            url: url.trim().to_owned(),
        }
    }

    /// Has the system forget what it holds of the database in memory. Where it does not, a measurement looks too good.
    pub fn out_of_cache(&self) {
        // Nothing that is mapped is forgotten, and the control plane's map lives on for 5 s after its last use.
        std::thread::sleep(Duration::from_secs(7));
        let file = File::open(&self.database).expect("it is there");
        file.sync_all().expect("a disk that works");
        fadvise(&file, 0, None, Advice::DontNeed).expect("a file");
    }

    /// Makes every gate load a full snapshot; the revision that they will have then. With `wait`, they have.
    pub async fn resync(&self, client: &reqwest::Client, wait: bool) -> u64 {
        let wait = if wait { "?wait=all&wait_seconds=30" } else { "" };
        let asked = client.post(format!("{}/api/v1/admin/feed/resync{wait}", self.url));
        let done = answer(asked.bearer_auth(TOKEN)).await;
        done["revision"].as_u64().expect("a revision")
    }

    /// An access token of a new organisation.
    pub async fn tenant(&self, client: &reqwest::Client) -> String {
        // The database may be that of an earlier run.
        let email = format!("bench-{}@example.com", Clock::system().now().unix_ms);
        let mut who = json!({"email": email, "password": "your-secure-password"});
        let post = |path: &str| client.post(format!("{}/api/v1/{path}", self.url));
        let login = post("login").json(&who);
        who["name"] = json!("Bench");
        answer(post("register").json(&who)).await;
        let login = login.send().await.expect("an answer");
        let cookie = login.headers()["set-cookie"].to_str().expect("a cookie").to_owned();
        let cookie = cookie.split(';').next().unwrap_or_default().to_owned();
        let token = answer(post("tokens").header("cookie", cookie).json(&json!({"name": "bench"}))).await;
        token["token"].as_str().expect("a token").to_owned()
    }

    /// The secret of a new key.
    pub async fn add_key(&self, client: &reqwest::Client, token: &str) -> String {
        let key = json!({"name": "added", "environment": "live", "scopes": []});
        let asked = client.post(format!("{}/api/v1/keys", self.url)).bearer_auth(token);
        let made = answer(asked.json(&key)).await;
        made["apiKey"].as_str().expect("a secret").to_owned()
    }
}

impl Drop for Plane {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

async fn answer(request: reqwest::RequestBuilder) -> Value {
    let answer = request.send().await.expect("an answer");
    let status = answer.status();
    let mut body: Value = answer.json().await.expect("JSON");
    assert!(status.is_success(), "{status}: {body}");
    body["data"].take()
}

/// The control plane's process: serves until its standard input ends.
#[tokio::main]
pub async fn serve(directory: &str) {
    let path = format!("{directory}/tollgate.db");
    let database = format!("sqlite://{path}");
    if !Path::new(&path).exists() {
        fill(&database).await;
    }
    let environment = |name: &str, billed| Environment {
        name: name.into(),
        prefix: format!("pxk_{name}_"),
        billed,
    };
    let settings = Settings {
        database,
        feed_token: TOKEN.into(),
        admin_token: TOKEN.into(),
        environments: vec![environment("live", true), environment("test", false)],
        plans: vec![Plan {
            name: "starter".into(),
            max_in_flight: None,
            tiers: vec![],
        }],
        ..Settings::default()
    };
    let plane = ControlPlane::open(settings, Clock::system())
        .await
        .expect("sound settings");
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    println!("http://{}", listener.local_addr().expect("it is bound"));
    let ended = tokio::task::spawn_blocking(|| std::io::stdin().lines().for_each(drop));
    plane
        .serve(listener, None, async {
            let _ = ended.await;
        })
        .await
        .expect("a server");
}

/// A million keys as the service makes them: organisation, key, secret and feed line.
async fn fill(database: &str) {
    migrate(database).await.expect("a new database");
    let mut connection = SqliteConnection::connect(database).await.expect("it was just made");
    connection.execute("BEGIN").await.expect("no other writer");
    insert(
        &mut connection,
        ORGANIZATION,
        (0..ORGANIZATIONS).map(|n| json!(organization(n))),
    )
    .await;
    for first in (0..KEYS).step_by(AT_ONCE as usize) {
        let rows: Vec<Value> = (first..first + AT_ONCE).map(row).collect();
        for statement in [KEY, SECRET, LINE] {
            insert(&mut connection, statement, rows.iter().cloned()).await;
        }
    }
    let revision = format!("UPDATE feed_state SET revision = {KEYS}");
    connection
        .execute(sqlx::AssertSqlSafe(revision))
        .await
        .expect("one row");
    connection.execute("COMMIT").await.expect("room on the disk");
    connection.close().await.expect("nothing is under way");
}

async fn insert(connection: &mut SqliteConnection, statement: &'static str, rows: impl Iterator<Item = Value>) {
    sqlx::query(statement)
        .bind(Value::from_iter(rows).to_string())
        .execute(connection)
        .await
        .expect("new rows");
}

const ORGANIZATION: &str = "INSERT INTO organizations (id, name, plan, created_at_ms)
    SELECT value, 'Bench', 'starter', 0 FROM json_each(?)";
const KEY: &str = "INSERT INTO keys (id, organization_id, name, environment, prefix, scopes, created_at_ms, disabled, revision)
    SELECT value ->> 1, value ->> 2, 'k', 'live', 'pxk_live_', '[\"permissions:check\",\"storage:read\"]', 0, 0, value ->> 0
    FROM json_each(?)";
const SECRET: &str = "INSERT INTO key_secrets (key_id, digest, last_four, created_at_ms)
    SELECT value ->> 1, unhex(value ->> 3), 'abcd', 0 FROM json_each(?)";
const LINE: &str = "INSERT INTO feed_lines (revision, key_id, line)
    SELECT value ->> 0, value ->> 1, value ->> 4 FROM json_each(?)";

fn organization(n: u32) -> String {
    format!("org_{:016}", n % ORGANIZATIONS)
}

/// Revision, id, organisation, digest, line.
fn row(n: u32) -> Value {
    let key = line(n);
    let (id, organization, digest) = (key.id.clone(), key.organization.clone(), key.secrets[0].sha256.clone());
    let line = serde_json::to_string(&FeedLine::Key(key)).expect("plain data");
    json!([n + 1, id, organization, digest, line])
}

fn line(n: u32) -> KeyLine {
    let digest = Sha256::digest(secret(n).as_bytes());
    KeyLine {
        revision: u64::from(n) + 1,
        id: format!("key_{n:016}"),
        organization: organization(n),
        environment: "live".into(),
        scopes: vec!["permissions:check".into(), "storage:read".into()],
        plan: "starter".into(),
        secrets: vec![SecretLine {
            sha256: digest.iter().map(|byte| format!("{byte:02x}")).collect(),
            not_after: None,
        }],
        expires_at: None,
        disabled: false,
        revoked: false,
    }
}
