//! Rotation to the millisecond: a control plane, its feed and a gate, all by one clock that the test moves.

#[path = "../gate_support/mod.rs"]
mod gate_support;

use std::sync::Arc;
use std::time::Duration;

use http::HeaderValue;
use serde_json::json;
use tollgate::feed::{Feed, Settings, Source, Tls, Token, http_client};
use tollgate::gate::{Gate, Reason};

use crate::harness::{FEED_TOKEN, Harness, Tenant, text};

const HOUR: Duration = Duration::from_secs(3_600);
const DAY: Duration = Duration::from_secs(24 * 3_600);
const MS: Duration = Duration::from_millis(1);

/// A gate that follows the harness's control plane, unless it is cut off.
struct Follower<'h> {
    harness: &'h Harness,
    tenant: &'h Tenant,
    gate: Arc<Gate>,
    feed: Arc<Feed>,
    task: Option<tokio::task::JoinHandle<()>>,
    _directory: tempfile::TempDir,
}

impl<'h> Follower<'h> {
    async fn new(harness: &'h Harness, tenant: &'h Tenant) -> Self {
        let gate = Arc::new(Gate::new(gate_support::settings(1_000_000)).unwrap());
        let directory = tempfile::tempdir().unwrap();
        let client = http_client("http://127.0.0.1", &Tls::default()).unwrap();
        let source = Source::http(harness.url(""), Token::new(FEED_TOKEN).unwrap(), client);
        let settings = Settings::new("gate-1", source, directory.path());
        let feed = Arc::new(Feed::new(settings, Arc::clone(&gate), harness.clock.clone()));
        let mut follower = Follower {
            harness,
            tenant,
            gate,
            feed,
            task: None,
            _directory: directory,
        };
        follower.connect();
        follower.catch_up().await;
        follower
    }

    fn connect(&mut self) {
        let feed = Arc::clone(&self.feed);
        self.task = Some(tokio::spawn(async move { feed.run(std::future::pending()).await }));
    }

    async fn cut_off(&mut self) {
        let task = self.task.take().unwrap();
        task.abort();
        let _ = task.await;
    }

    async fn catch_up(&self) {
        for _ in 0..20_000 {
            if self.gate.revision() == Some(self.harness.plane.revision()) {
                return;
            }
            tokio::time::sleep(MS).await;
        }
        panic!("the gate does not catch up");
    }

    fn ask(&self, secret: &str) -> Result<(), Reason> {
        let mut headers = http::HeaderMap::new();
        headers.insert("x-api-key", HeaderValue::from_str(secret).unwrap());
        let now = self.harness.clock.now();
        gate_support::ask(&self.gate, "/any", &headers, gate_support::CLIENT, now)
            .map(drop)
            .map_err(|refusal| refusal.reason)
    }

    async fn create(&self, expires_at: Option<&str>) -> (String, String) {
        let body = json!({"name": "k", "environment": "live", "scopes": [], "expiresAt": expires_at});
        let made = self.harness.post(self.tenant, "/api/v1/keys", body).await.expect(201);
        self.catch_up().await;
        (text(&made["id"]), text(&made["apiKey"]))
    }

    /// Rotates; the new secret. The gate need not know of it yet.
    async fn rotate(&self, id: &str, grace: Duration) -> String {
        let body = json!({"gracePeriodSeconds": grace.as_secs()});
        let path = format!("/api/v1/keys/{id}/rotate");
        let rotated = self.harness.post(self.tenant, &path, body).await.expect(201);
        text(&rotated["apiKey"])
    }

    fn wait(&self, time: Duration) {
        self.harness.clock.advance(time);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chained_rotations_each_keep_their_grace_to_the_millisecond() {
    let harness = Harness::start().await;
    let tenant = harness.tenant("dev@example.com").await;
    let follower = Follower::new(&harness, &tenant).await;
    let (id, first) = follower.create(None).await;
    let second = follower.rotate(&id, DAY).await;
    follower.catch_up().await;
    assert_eq!((follower.ask(&first), follower.ask(&second)), (Ok(()), Ok(())));
    follower.wait(HOUR);
    // Without grace the second dies at once; the first keeps its own date.
    let third = follower.rotate(&id, Duration::ZERO).await;
    follower.catch_up().await;
    assert_eq!(follower.ask(&second), Err(Reason::RevokedKey));
    assert_eq!((follower.ask(&first), follower.ask(&third)), (Ok(()), Ok(())));
    follower.wait(HOUR);
    // Thirty days for the third do not lengthen the first one's grace.
    let fourth = follower.rotate(&id, 30 * DAY).await;
    follower.catch_up().await;
    follower.wait(DAY - 2 * HOUR - MS);
    assert_eq!(follower.ask(&first), Ok(()), "a millisecond before its grace ends");
    follower.wait(MS);
    assert_eq!(follower.ask(&first), Err(Reason::RevokedKey), "at the very millisecond");
    assert_eq!((follower.ask(&third), follower.ask(&fourth)), (Ok(()), Ok(())));
    follower.wait(29 * DAY + 2 * HOUR - MS);
    assert_eq!(follower.ask(&third), Ok(()), "a millisecond before its thirty days end");
    follower.wait(MS);
    assert_eq!(follower.ask(&third), Err(Reason::RevokedKey));
    follower.wait(MS);
    assert_eq!(follower.ask(&third), Err(Reason::RevokedKey));
    assert_eq!(follower.ask(&fourth), Ok(()));
    let too_long = json!({"gracePeriodSeconds": 30 * 24 * 3_600 + 1});
    harness
        .post(&tenant, &format!("/api/v1/keys/{id}/rotate"), too_long)
        .await
        .refused(422, "VALIDATION_ERROR");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_grace_can_be_ended_now() {
    let harness = Harness::start().await;
    let tenant = harness.tenant("dev@example.com").await;
    let follower = Follower::new(&harness, &tenant).await;
    let (id, first) = follower.create(None).await;
    let second = follower.rotate(&id, 30 * DAY).await;
    let third = follower.rotate(&id, DAY).await;
    follower.catch_up().await;
    for secret in [&first, &second, &third] {
        assert_eq!(follower.ask(secret), Ok(()));
    }
    let path = format!("/api/v1/keys/{id}/end-grace");
    harness.post(&tenant, &path, json!({})).await.expect(200);
    follower.catch_up().await;
    for secret in [&first, &second] {
        assert_eq!(follower.ask(secret), Err(Reason::RevokedKey));
    }
    assert_eq!(follower.ask(&third), Ok(()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expiry_is_inherited_by_every_secret_to_the_millisecond() {
    let harness = Harness::start().await;
    let tenant = harness.tenant("dev@example.com").await;
    let follower = Follower::new(&harness, &tenant).await;
    // Two hours after the harness's start.
    let (id, first) = follower.create(Some("2026-11-24T12:00:00.000Z")).await;
    follower.wait(HOUR);
    let second = follower.rotate(&id, DAY).await;
    follower.catch_up().await;
    follower.wait(HOUR - MS);
    assert_eq!((follower.ask(&first), follower.ask(&second)), (Ok(()), Ok(())));
    follower.wait(MS);
    for secret in [&first, &second] {
        assert_eq!(follower.ask(secret), Err(Reason::ExpiredKey));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotation_during_an_outage_of_the_feed_takes_effect_after_it_and_old_secrets_die_during_it() {
    let harness = Harness::start().await;
    let tenant = harness.tenant("dev@example.com").await;
    let mut follower = Follower::new(&harness, &tenant).await;
    let (id, first) = follower.create(None).await;
    let second = follower.rotate(&id, HOUR).await;
    follower.catch_up().await;
    follower.cut_off().await;
    // The gate knows the instant and needs no message.
    follower.wait(HOUR - MS);
    assert_eq!((follower.ask(&first), follower.ask(&second)), (Ok(()), Ok(())));
    follower.wait(MS);
    assert_eq!(follower.ask(&first), Err(Reason::RevokedKey));
    // Of a rotation meanwhile it learns when the feed is back; the old secret works until then, and no longer than its grace.
    let third = follower.rotate(&id, HOUR).await;
    assert_eq!(follower.ask(&second), Ok(()));
    assert_eq!(follower.ask(&third), Err(Reason::UnknownKey));
    follower.wait(HOUR / 2);
    follower.connect();
    follower.catch_up().await;
    assert_eq!((follower.ask(&second), follower.ask(&third)), (Ok(()), Ok(())));
    follower.wait(HOUR / 2 - MS);
    assert_eq!(follower.ask(&second), Ok(()));
    follower.wait(MS);
    assert_eq!(follower.ask(&second), Err(Reason::RevokedKey));
    assert_eq!(follower.ask(&third), Ok(()));
}
