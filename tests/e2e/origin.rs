//! An upstream that misbehaves as it is told, and counts what reaches it.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// What it does with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// Answers 200 with its name, and keeps the connection.
    Answers,
    /// Answers with this status.
    Status(u16),
    /// Answers after a while.
    Delays(Duration),
    /// Never answers, and keeps the connection open.
    IsSilent,
    /// Takes the request and closes without a byte.
    Closes,
    /// Closes within the response's head.
    BreaksHead,
    /// Closes within the response's body.
    BreaksBody,
    /// Something that is no HTTP.
    TalksGarbage,
    /// Answers the first request of each connection, and closes at the second without a byte.
    AnswersOncePerConnection,
}

#[derive(Clone)]
pub struct Origin {
    pub address: SocketAddr,
    state: Arc<State>,
    serving: Arc<JoinHandle<()>>,
}

struct State {
    name: String,
    manner: Mutex<Manner>,
    /// What health checks get.
    health: Mutex<Manner>,
    /// Request lines without health checks, in the order of arrival.
    seen: Mutex<Vec<String>>,
}

impl Origin {
    pub async fn start(name: &str, manner: Manner) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self::on(listener, name, manner)
    }

    fn on(listener: TcpListener, name: &str, manner: Manner) -> Self {
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            name: name.to_owned(),
            manner: Mutex::new(manner),
            health: Mutex::new(Manner::Answers),
            seen: Mutex::default(),
        });
        let shared = state.clone();
        let serving = tokio::spawn(async move {
            // Ended with the listener's task: a killed server keeps no connection.
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                connections.spawn(serve(stream, shared.clone()));
            }
        });
        Origin {
            address,
            state,
            serving: Arc::new(serving),
        }
    }

    pub fn behave(&self, manner: Manner) {
        *self.state.manner.lock().unwrap() = manner;
    }

    pub fn behave_towards_checks(&self, manner: Manner) {
        *self.state.health.lock().unwrap() = manner;
    }

    /// Takes what was seen since the last time.
    pub fn take_seen(&self) -> Vec<String> {
        std::mem::take(&mut self.state.seen.lock().unwrap())
    }

    /// Closes the listener and every connection.
    pub async fn kill(&self) {
        self.serving.abort();
        while !self.serving.is_finished() {
            tokio::task::yield_now().await;
        }
    }

    /// Starts it again at the same address after [`Origin::kill`].
    pub async fn revive(&self) -> Self {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(self.address).unwrap();
        Self::on(socket.listen(1024).unwrap(), &self.state.name, Manner::Answers)
    }
}

async fn serve<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, state: Arc<State>) {
    let mut buffer = Vec::new();
    let mut served = 0;
    // Ends where the client closes.
    while let Some(request) = read_request(&mut stream, &mut buffer).await {
        let manner = if request.contains(" /healthz ") {
            *state.health.lock().unwrap()
        } else {
            state.seen.lock().unwrap().push(request);
            *state.manner.lock().unwrap()
        };
        let answer =
            |status: u16, body: &str| format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        let (text, stays) = match manner {
            Manner::Answers => (answer(200, &state.name), true),
            Manner::Status(status) => (answer(status, ""), true),
            Manner::Delays(delay) => {
                tokio::time::sleep(delay).await;
                (answer(200, &state.name), true)
            }
            Manner::IsSilent => std::future::pending().await,
            Manner::Closes => (String::new(), false),
            Manner::BreaksHead => ("HTTP/1.1 200 O".to_owned(), false),
            Manner::BreaksBody => (
                "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nten bytes.".to_owned(),
                false,
            ),
            Manner::TalksGarbage => ("\u{1}\u{2} what?\r\n\r\n".to_owned(), false),
            Manner::AnswersOncePerConnection if served == 0 => (answer(200, &state.name), true),
            Manner::AnswersOncePerConnection => (String::new(), false),
        };
        served += 1;
        if stream.write_all(text.as_bytes()).await.is_err() || !stays {
            break;
        }
    }
    // A client that is gone already needs no farewell.
    let _ = stream.shutdown().await;
}

/// The request line of the next request, its body read; `None` at the end.
async fn read_request<S: AsyncRead + Unpin>(stream: &mut S, buffer: &mut Vec<u8>) -> Option<String> {
    loop {
        let text = String::from_utf8_lossy(buffer).into_owned();
        if let Some((head, _)) = text.split_once("\r\n\r\n") {
            let length = head
                .lines()
                .find_map(|line| {
                    line.to_ascii_lowercase()
                        .strip_prefix("content-length:")?
                        .trim()
                        .parse()
                        .ok()
                })
                .unwrap_or(0);
            let end = head.len() + 4 + length;
            if buffer.len() >= end {
                buffer.drain(..end);
                return head.lines().next().map(str::to_owned);
            }
        }
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
}
