//! A gate in this process that shares its limits: the proxy's filter, the gate, the running part of the shared counts. Only
//! the connections are made up, and whatever store it is given.
#![allow(dead_code, reason = "the two tests that include this file use different parts of it")]

use crate::gate_support::{gate, key, secret, settings};
use pingora::proxy::{ProxyHttp, Session};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tollgate::clock::Clock;
use tollgate::cluster::Cluster;
use tollgate::cluster::coordinator::Settings;
use tollgate::cluster::store::Store;
use tollgate::gate::limit::Limit;
use tollgate::proxy::{self, Proxy, ResponseSettings, SharedLimits};

/// Keys that it knows: the numbers below.
pub const KEYS: u32 = 3;

/// A gate that runs where it was started, until it is told to end.
pub struct SharingGate {
    pub cluster: Cluster,
    proxy: Arc<Proxy>,
    running: JoinHandle<()>,
    end: Option<oneshot::Sender<()>>,
}

/// What came of a request.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// When its head had been read.
    pub came: Instant,
    /// When it was decided, and its refusal written.
    pub answered: Instant,
    pub passed: bool,
}

impl SharingGate {
    /// `seen_as`: what the proxy sees of the shared counts.
    pub fn start(
        sharing: &Settings,
        limit: Limit,
        wait: Duration,
        store: Arc<dyn Store>,
        clock: &Clock,
        seen_as: impl FnOnce(Cluster) -> Arc<dyn SharedLimits>,
    ) -> Self {
        let mut rules = settings(limit.permits());
        rules.tiers = vec![("default".into(), limit)];
        let gate = gate(rules, (0..KEYS).map(|n| key(n, 1))).sharing_limits();
        let passing = proxy::Settings {
            header_prefix: "x-tollgate-".into(),
            response: ResponseSettings::default(),
            upstreams: vec![],
            trusted_proxies: vec![],
            upstream_pool: 16,
            count_keys: false,
        };
        let proxy = Proxy::new(&passing, Arc::new(gate), clock.clone(), None).unwrap();
        let cluster = Cluster::new(sharing, wait, store, clock.clone());
        proxy.share_limits(seen_as(cluster.clone()));
        let (end, ended) = oneshot::channel::<()>();
        let own = cluster.clone();
        SharingGate {
            cluster,
            proxy: Arc::new(proxy),
            running: tokio::spawn(async move { own.run(async { drop(ended.await) }).await }),
            end: Some(end),
        }
    }

    /// A request with one of the keys, which comes when this is first polled.
    pub fn request(&self, key: u32) -> impl Future<Output = Asked> + Send + use<> {
        let proxy = self.proxy.clone();
        let head = format!("GET / HTTP/1.1\r\nhost: a\r\nx-api-key: {}\r\n\r\n", secret(key));
        async move {
            let (mut client, connection) = tokio::io::duplex(4_096);
            client.write_all(head.as_bytes()).await.unwrap();
            let mut session = Session::new_h1(Box::new(connection));
            assert!(session.read_request().await.unwrap());
            let mut context = proxy.new_ctx();
            let came = Instant::now();
            let is_answered = proxy.request_filter(&mut session, &mut context).await.unwrap();
            let answered = Instant::now();
            if is_answered {
                let mut status = [0; 12];
                client.read_exact(&mut status).await.unwrap();
                assert_eq!(&status, b"HTTP/1.1 429");
            }
            Asked {
                came,
                answered,
                passed: !is_answered,
            }
        }
    }

    /// Tells it to end. It still answers.
    pub fn begin_to_end(&mut self) {
        let _ = self.end.take().map(|end| end.send(()));
    }

    /// Whether it has said goodbye to the store, or given that up.
    pub fn has_ended(&self) -> bool {
        self.running.is_finished()
    }
}
