//! What can lie between a gate and its control plane: a wire that stalls or breaks, and a post that loses, repeats and
//! delays batches of usage.

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// What the wire does with bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    Passes,
    /// Connections stay open and nothing arrives.
    Stalls,
    /// Connections end, and new ones too.
    Breaks,
}

/// A TCP connection to `to` with a [`Wire`] in it.
pub struct Cable {
    pub url: String,
    wire: watch::Sender<Wire>,
}

impl Cable {
    pub async fn to(url: &str) -> Self {
        let to = url.strip_prefix("http://").unwrap().to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let cable = Cable {
            url: format!("http://{}", listener.local_addr().unwrap()),
            wire: watch::Sender::new(Wire::Passes),
        };
        let wire = cable.wire.subscribe();
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let (to, wire) = (to.clone(), wire.clone());
                tokio::spawn(async move {
                    let mut breaking = wire.clone();
                    tokio::select! {
                        _ = breaking.wait_for(|wire| *wire == Wire::Breaks) => {}
                        () = connect(near, &to, wire) => {}
                    }
                });
            }
        });
        cable
    }

    pub fn set(&self, wire: Wire) {
        self.wire.send_replace(wire);
    }
}

async fn connect(near: TcpStream, to: &str, wire: watch::Receiver<Wire>) {
    let Ok(far) = TcpStream::connect(to).await else { return };
    let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
    tokio::select! {
        () = pump(near_in, far_out, wire.clone()) => {}
        () = pump(far_in, near_out, wire) => {}
    }
}

async fn pump(
    mut from: impl AsyncReadExt + Unpin,
    mut to: impl AsyncWriteExt + Unpin,
    mut wire: watch::Receiver<Wire>,
) {
    let mut bytes = vec![0; 64 * 1024];
    loop {
        let count = match from.read(&mut bytes).await {
            Ok(0) | Err(_) => return,
            Ok(count) => count,
        };
        if wire.wait_for(|wire| *wire == Wire::Passes).await.is_err() || to.write_all(&bytes[..count]).await.is_err() {
            return;
        }
    }
}

/// A post for batches of usage that treats one in two as posts do at their worst. Everything else passes.
pub struct Post {
    pub url: String,
    shared: Arc<Office>,
}

struct Office {
    to: String,
    client: reqwest::Client,
    counts: Mutex<Counts>,
}

/// What was done to batches.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    pub received: u64,
    pub lost: u64,
    pub answers_lost: u64,
    pub repeated: u64,
    pub delivered_late: u64,
    /// Nothing is done to them any more.
    pub honest: bool,
    /// Copies that arrive after later batches.
    held: Vec<axum::body::Bytes>,
}

impl Post {
    pub async fn to(url: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let shared = Arc::new(Office {
            to: url.to_owned(),
            client: crate::harness::client(),
            counts: Mutex::default(),
        });
        let post = Post {
            url: format!("http://{}", listener.local_addr().unwrap()),
            shared: Arc::clone(&shared),
        };
        let router = axum::Router::new().fallback(pass).with_state(shared);
        tokio::spawn(async move { axum::serve(listener, router).await });
        post
    }

    pub fn counts(&self) -> Counts {
        self.shared.counts.lock().unwrap().clone()
    }

    pub fn be_honest(&self) {
        self.shared.counts.lock().unwrap().honest = true;
    }
}

async fn pass(State(office): State<Arc<Office>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let url = format!("{}{}", office.to, parts.uri);
    let is_usage = parts.uri.path() == "/feed/v1/usage";
    let body = axum::body::to_bytes(body, 64 << 20).await.unwrap();
    let forward = async |body: axum::body::Bytes| {
        let mut request = office.client.request(parts.method.clone(), &url).body(body);
        for name in ["authorization", "content-type", "x-tollgate-gate"] {
            if let Some(value) = parts.headers.get(name) {
                request = request.header(name, value);
            }
        }
        request.send().await
    };
    let lost = || StatusCode::BAD_GATEWAY.into_response();
    if is_usage {
        let (kind, late) = office.treat(&body);
        for copy in late {
            let _ = forward(copy).await;
        }
        match kind {
            0 => return lost(),
            1 => {
                let _ = forward(body).await;
                return lost();
            }
            2 => {
                let (first, second) = tokio::join!(forward(body.clone()), forward(body));
                return first.or(second).map_or_else(|_| lost(), answer);
            }
            _ => {}
        }
    }
    forward(body).await.map_or_else(|_| lost(), answer)
}

impl Office {
    /// What happens to a batch, and which earlier ones arrive now.
    fn treat(&self, body: &axum::body::Bytes) -> (u64, Vec<axum::body::Bytes>) {
        let mut counts = self.counts.lock().unwrap();
        counts.received += 1;
        if counts.honest {
            return (9, std::mem::take(&mut counts.held));
        }
        let kind = u64::from(getrandom::u32().unwrap()) % 8;
        let late = match kind {
            0 => {
                counts.lost += 1;
                vec![]
            }
            1 => {
                counts.answers_lost += 1;
                vec![]
            }
            2 => {
                counts.repeated += 1;
                vec![]
            }
            3 => {
                counts.held.push(body.clone());
                vec![]
            }
            4 => {
                let held = std::mem::take(&mut counts.held);
                counts.delivered_late += held.len() as u64;
                held
            }
            _ => vec![],
        };
        (kind, late)
    }
}

fn answer(response: reqwest::Response) -> Response {
    let mut answer = Response::builder().status(response.status());
    for name in ["content-type", "content-encoding"] {
        if let Some(value) = response.headers().get(name) {
            answer = answer.header(name, value);
        }
    }
    answer.body(Body::from_stream(response.bytes_stream())).unwrap()
}
