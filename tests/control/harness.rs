//! A control plane on a real socket, with a clock that tests move.

use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::{FutureExt as _, StreamExt as _};

use reqwest::{Client, Method, Response, StatusCode, header};
use serde_json::{Value, json};
use tokio::sync::oneshot;
use tollgate::clock::Clock;
use tollgate::control::{ControlPlane, Environment, Plan, Scope, Settings, Tier};

use crate::postgres::Postgres;

/// Tests that hold whatever the engine: each on SQLite by itself, and all of them on one PostgreSQL server.
macro_rules! on_every_engine {
    ($($test:ident),* $(,)?) => {
        mod on_sqlite {
            $(#[tokio::test]
            async fn $test() {
                super::$test().await;
            })*
        }

        #[tokio::test]
        async fn the_same_on_postgresql() {
            $crate::harness::on_postgres(&[$((stringify!($test), || Box::pin($test()))),*]).await;
        }
    };
}

pub type Test = fn() -> BoxFuture<'static, ()>;

tokio::task_local! {
    /// Where harnesses that do not name a database get one; without it: SQLite in memory.
    static SERVER: Arc<Postgres>;
}

/// Runs tests on a server of their own, each with a database of its own, a few at once. All are run, and those that fail
/// are named; their messages are on standard error.
pub async fn on_postgres(tests: &[(&'static str, Test)]) {
    let server = Arc::new(Postgres::start());
    let run = |(name, test): &(&'static str, Test)| {
        let (name, run) = (*name, SERVER.scope(Arc::clone(&server), test()));
        async move { AssertUnwindSafe(run).catch_unwind().await.is_err().then_some(name) }
    };
    let outcomes: Vec<_> = futures_util::stream::iter(tests.iter().map(run))
        .buffer_unordered(3)
        .collect()
        .await;
    let failed: Vec<_> = outcomes.into_iter().flatten().collect();
    assert!(failed.is_empty(), "{failed:?}");
}

pub const FEED_TOKEN: &str = "feed-token-of-the-tests";
pub const ADMIN_TOKEN: &str = "admin-token-of-the-tests";
/// 2026-11-24T10:00:00Z.
pub const START_MS: i64 = 1_795_514_400_000;

pub struct Harness {
    pub plane: ControlPlane,
    pub clock: Clock,
    pub address: SocketAddr,
    pub client: Client,
    stop: Option<oneshot::Sender<()>>,
    served: Option<tokio::task::JoinHandle<std::io::Result<()>>>,
}

/// A tenant that is signed in by an access token.
#[derive(Clone)]
pub struct Tenant {
    pub organization: String,
    pub email: String,
    pub api_key: String,
    pub key_id: String,
    pub cookie: String,
    pub token: String,
    pub token_id: String,
}

pub struct Answer {
    pub status: StatusCode,
    pub headers: header::HeaderMap,
    pub body: Value,
    pub text: String,
}

pub fn settings() -> Settings {
    let tier = |name: &str, limit| Tier {
        name: name.into(),
        limit,
        window_ms: 3_600_000,
    };
    let environment = |name: &str, billed| Environment {
        name: name.into(),
        prefix: format!("pxk_{name}_"),
        billed,
    };
    let tiers = vec![
        tier("permissions:check", 5_000),
        tier("permissions:audit", 100),
        tier("default", 1_000),
    ];
    let scope = |name: &str| Scope {
        name: name.into(),
        description: format!("what {name} grants"),
    };
    Settings {
        feed_token: FEED_TOKEN.into(),
        admin_token: ADMIN_TOKEN.into(),
        environments: vec![
            environment("live", true),
            environment("test", false),
            environment("dev", false),
        ],
        scopes: [
            "messaging:send",
            "storage:read",
            "permissions:check",
            "permissions:audit",
        ]
        .map(scope)
        .into(),
        plans: vec![
            Plan {
                name: "starter".into(),
                max_in_flight: Some(100),
                tiers: tiers.clone(),
            },
            Plan {
                name: "business".into(),
                max_in_flight: None,
                tiers: tiers.clone(),
            },
        ],
        tiers,
        heartbeat: Duration::from_millis(200),
        registrations_per_hour: 10_000,
        ..Settings::default()
    }
}

impl Harness {
    pub async fn start() -> Self {
        Self::with(settings()).await
    }

    pub async fn with(settings: Settings) -> Self {
        Self::with_clock(settings, Clock::manual(START_MS)).await
    }

    pub async fn with_clock(mut settings: Settings, clock: Clock) -> Self {
        if settings.database == Settings::default().database
            && let Ok(database) = SERVER.try_with(|server| server.database())
        {
            settings.database = database;
        }
        let _ = rustls::crypto::ring::default_provider().install_default();
        let plane = ControlPlane::open(settings, clock.clone()).await.unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let server = plane.clone();
        let served = tokio::spawn(async move {
            server
                .serve(listener, None, async {
                    let _ = stopped.await;
                })
                .await
        });
        let client = Client::builder().timeout(Duration::from_secs(60)).build().unwrap();
        Self {
            plane,
            clock,
            address,
            client,
            stop: Some(stop),
            served: Some(served),
        }
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Ends the server the orderly way, and asserts that it ends.
    pub async fn stop(mut self) {
        let _ = self.stop.take().unwrap().send(());
        tokio::time::timeout(Duration::from_secs(10), self.served.take().unwrap())
            .await
            .unwrap()
            .unwrap()
            .unwrap();
    }

    pub async fn send(&self, method: Method, path: &str, headers: &[(&str, &str)], body: Option<Value>) -> Answer {
        let mut request = self.client.request(method, self.url(path));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(body) = body {
            request = request.json(&body);
        }
        Answer::read(request.send().await.unwrap()).await
    }

    pub async fn get(&self, who: &Tenant, path: &str) -> Answer {
        self.send(Method::GET, path, &[("authorization", &who.bearer())], None)
            .await
    }

    pub async fn post(&self, who: &Tenant, path: &str, body: Value) -> Answer {
        self.send(Method::POST, path, &[("authorization", &who.bearer())], Some(body))
            .await
    }

    pub async fn patch(&self, who: &Tenant, path: &str, body: Value) -> Answer {
        self.send(Method::PATCH, path, &[("authorization", &who.bearer())], Some(body))
            .await
    }

    pub async fn delete(&self, who: &Tenant, path: &str) -> Answer {
        self.send(Method::DELETE, path, &[("authorization", &who.bearer())], None)
            .await
    }

    pub async fn admin(&self, method: Method, path: &str, body: Option<Value>) -> Answer {
        self.send(
            method,
            path,
            &[("authorization", &format!("Bearer {ADMIN_TOKEN}"))],
            body,
        )
        .await
    }

    pub async fn gate(&self, path: &str, body: Value) -> Answer {
        self.send(
            Method::POST,
            path,
            &[("authorization", &format!("Bearer {FEED_TOKEN}"))],
            Some(body),
        )
        .await
    }

    pub async fn register(&self, email: &str) -> Answer {
        let body = json!({"name": "My Company", "email": email, "password": "your-secure-password"});
        self.send(Method::POST, "/api/v1/register", &[], Some(body)).await
    }

    pub async fn login(&self, email: &str, password: &str) -> Answer {
        let body = json!({"email": email, "password": password});
        self.send(Method::POST, "/api/v1/login", &[], Some(body)).await
    }

    /// Registers, signs in and makes an access token.
    pub async fn tenant(&self, email: &str) -> Tenant {
        let registered = self.register(email).await.expect(201);
        let login = self.login(email, "your-secure-password").await;
        let cookie = login.cookie();
        let made = self
            .send(
                Method::POST,
                "/api/v1/tokens",
                &[("cookie", &cookie)],
                Some(json!({"name": "tests"})),
            )
            .await
            .expect(201);
        let token = text(&made["token"]);
        let bearer = format!("Bearer {token}");
        let keys = self
            .send(Method::GET, "/api/v1/keys", &[("authorization", &bearer)], None)
            .await
            .expect(200);
        Tenant {
            organization: text(&registered["organizationId"]),
            email: email.to_owned(),
            api_key: text(&registered["apiKey"]),
            key_id: text(&keys["items"][0]["id"]),
            cookie,
            token,
            token_id: text(&made["id"]),
        }
    }

    pub async fn create_key(&self, who: &Tenant, name: &str) -> Value {
        let body = json!({"name": name, "environment": "live", "scopes": ["permissions:check"]});
        self.post(who, "/api/v1/keys", body).await.expect(201)
    }
}

impl Tenant {
    pub fn bearer(&self) -> String {
        format!("Bearer {}", self.token)
    }
}

impl Answer {
    async fn read(response: Response) -> Self {
        let (status, headers) = (response.status(), response.headers().clone());
        let text = response.text().await.unwrap();
        let body = serde_json::from_str(&text).unwrap_or(Value::Null);
        Self {
            status,
            headers,
            body,
            text,
        }
    }

    /// The data, if the status is as expected and the envelope is right.
    #[track_caller]
    pub fn expect(self, status: u16) -> Value {
        assert_eq!(self.status.as_u16(), status, "{}", self.text);
        assert_eq!(self.body["success"], true, "{}", self.text);
        self.body["data"].clone()
    }

    /// Asserts a refusal in the envelope, and gives its error.
    #[track_caller]
    pub fn refused(self, status: u16, code: &str) -> Value {
        assert_eq!(self.status.as_u16(), status, "{}", self.text);
        assert_eq!(self.body["success"], false, "{}", self.text);
        assert_eq!(self.body["error"]["code"], code, "{}", self.text);
        assert_eq!(self.headers["content-type"], "application/json");
        assert_eq!(self.headers["cache-control"], "no-store");
        assert_eq!(
            self.body["error"]["requestId"],
            self.headers["x-request-id"].to_str().unwrap()
        );
        self.body["error"].clone()
    }

    /// `name=value` of the cookie that was set.
    #[track_caller]
    pub fn cookie(&self) -> String {
        let line = self
            .headers
            .get("set-cookie")
            .unwrap_or_else(|| panic!("no cookie: {}", self.text));
        line.to_str().unwrap().split(';').next().unwrap().to_owned()
    }
}

/// The names of the fields that are at fault.
pub fn fault_fields(error: &Value) -> Vec<String> {
    let mut names: Vec<String> = error["fields"]
        .as_array()
        .unwrap()
        .iter()
        .map(|f| text(&f["field"]))
        .collect();
    names.sort();
    names
}

#[track_caller]
pub fn text(value: &Value) -> String {
    value
        .as_str()
        .unwrap_or_else(|| panic!("not a string: {value}"))
        .to_owned()
}
