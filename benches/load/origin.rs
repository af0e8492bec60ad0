//! What stands behind the gates: answers every request at once with as many bytes as its path's last segment says.

use std::net::SocketAddr;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

pub struct Origin {
    pub address: SocketAddr,
}

impl Origin {
    /// Serves for as long as the process lives.
    pub fn start() -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("a bound address");
        listener.set_nonblocking(true).expect("a socket of ours");
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_io()
                .build()
                .expect("a runtime");
            runtime.block_on(async move {
                let listener = TcpListener::from_std(listener).expect("a socket of ours");
                while let Ok((stream, _)) = listener.accept().await {
                    let _ = stream.set_nodelay(true);
                    tokio::spawn(answer(stream));
                }
            });
        });
        Origin { address }
    }
}

async fn answer(mut stream: TcpStream) {
    let mut seen = Vec::with_capacity(4096);
    let mut answers: Vec<(usize, Vec<u8>)> = Vec::new();
    loop {
        match stream.read_buf(&mut seen).await {
            Ok(1..) if seen.ends_with(b"\r\n\r\n") => {}
            Ok(1..) => continue,
            _ => return,
        }
        let target = seen.split(|b| *b == b' ').nth(1).unwrap_or_default();
        let segment = target.rsplit(|b| *b == b'/').next().unwrap_or_default();
        let bytes = std::str::from_utf8(segment)
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or(0);
        seen.clear();
        let at = answers.iter().position(|(size, _)| *size == bytes).unwrap_or_else(|| {
            let head = format!("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {bytes}\r\n\r\n");
            answers.push((bytes, [head.as_bytes(), &vec![b'x'; bytes]].concat()));
            answers.len() - 1
        });
        if stream.write_all(&answers[at].1).await.is_err() {
            return;
        }
    }
}
