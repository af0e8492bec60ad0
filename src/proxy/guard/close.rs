//! The end of a connection.

use std::time::Duration;

use nix::libc::linger;
use nix::sys::socket::{setsockopt, sockopt};
use pingora::protocols::Stream;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Says that no more will be written. That takes a flush, for which a client that does not read is not waited for.
pub(in crate::proxy) async fn close(io: &mut Stream) {
    let _ = tokio::time::timeout(LINGER, io.shutdown()).await;
}

/// Says that no more will be written, then reads on for a while and throws it away.
pub(in crate::proxy) async fn close_lingering(io: &mut Stream) {
    close(io).await;
    let drain = async {
        let mut scratch = [0u8; 4096];
        let mut total = 0;
        while total < LINGER_BYTES {
            match io.read(&mut scratch).await {
                Ok(0) | Err(_) => return,
                Ok(read) => total += read,
            }
        }
    };
    let _ = tokio::time::timeout(LINGER, drain).await;
}

/// Makes the end of the connection a reset. Otherwise the kernel would keep what the client does not take, for as long
/// as it goes on not taking it: hours, and a megabyte or more each.
pub(super) fn reset_on_close(io: &Stream) {
    let at_once = linger {
        l_onoff: 1,
        l_linger: 0,
    };
    // Where it fails, the connection is closed as any other.
    let _ = setsockopt(io.id(), sockopt::Linger, &at_once);
}

/// After a response that came before the request's end: how long and how much is still read, so that the client gets
/// to see the response instead of a reset.
pub(super) const LINGER: Duration = Duration::from_secs(1);
pub(super) const LINGER_BYTES: usize = 1024 * 1024;
