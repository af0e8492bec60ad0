//! How much of everything a client may use.

use std::time::Duration;

use pingora::protocols::http::v2::server::H2Options;

use super::super::client_address::IpNet;
use super::super::frames::FrameLimits;
use super::super::guard::{GuardSettings, PaceLimits};
use super::super::strict::{HeadLimits, PathRules};

/// How much of everything a client may use. One per listener; [`Slots`] are shared between listeners.
#[derive(Clone, Debug)]
pub struct EdgeSettings {
    /// Bytes of a request head, HTTP/2 header lists included. 32 KiB: section 8 of the design; nginx has 4 × 8 KiB.
    pub head_bytes: usize,
    /// Field lines in a head. 100: section 8 of the design; Apache's default, too.
    pub head_fields: usize,
    /// Bytes of a request target. 8 KiB: what RFC 9112 section 3 recommends as a minimum, and nginx's limit.
    pub target_bytes: usize,
    /// From a head's first byte (a connection's start, for its first head) to its last. 10 s: section 8 of the design.
    pub head_deadline: Duration,
    /// For the whole TLS handshake, and for a PROXY header. 10 s, as for a head.
    pub handshake_deadline: Duration,
    /// How long a kept-alive connection may wait for its next request. 60 s: Pingora's default; nginx has 75.
    pub idle_timeout: Duration,
    /// The longest pause in a request body, and the start's credit of its pace. 20 s: Apache's `mod_reqtimeout`.
    pub body_grace: Duration,
    /// The longest time in which a client takes nothing of a response. 60 s: nginx's `send_timeout`.
    pub response_grace: Duration,
    /// Bytes per second that a body, or a response that the client takes, must keep up. 500: Apache's
    /// `mod_reqtimeout`.
    pub min_bytes_per_second: u32,
    /// How long an upgraded connection may be silent in both directions. 1 h: longer than any heartbeat in use.
    pub upgraded_idle: Duration,
    /// Connections in all. 20,000: section 10 of the design. `tests/edge/hostile.rs` measures what each costs.
    pub connections: usize,
    /// Connections from one IPv4 address or IPv6 /64. 1,000: section 10 of the design. Trusted proxies are exempt.
    pub connections_per_address: usize,
    /// Requests on one HTTP/1 connection. None: nothing here grows with their number.
    pub requests_per_connection: Option<u32>,
    /// How long an idle connection is still served after shutdown has begun. 300 ms: long enough for a request that
    /// is already on its way, short enough for section 7's "ends within 1 s".
    pub shutdown_linger: Duration,
    /// HTTP/2's own limits.
    pub http2: Http2Settings,
    /// Speak HTTP/2 without TLS to clients that start with its preface.
    pub h2c: bool,
    /// Proxies whose `X-Forwarded-For`, `Forwarded` and PROXY headers are believed.
    pub trusted_proxies: Vec<IpNet>,
    /// Every connection starts with version 2 of the PROXY protocol; refused from peers that are not trusted.
    pub proxy_protocol: bool,
    /// What a path may contain.
    pub paths: PathRules,
}

/// Limits of one HTTP/2 connection.
#[derive(Clone, Debug)]
pub struct Http2Settings {
    /// Requests at once. 100: RFC 9113's recommended minimum, and Pingora's default.
    pub concurrent_streams: u32,
    /// Bytes of a request body that may be on their way before it is read. 64 KiB: RFC 9113's initial window.
    pub stream_window: u32,
    /// The same for all streams of a connection. 1 MiB: 16 streams at full speed.
    pub connection_window: u32,
    /// Response bytes buffered for one stream. 256 KiB.
    pub send_buffer: usize,
    /// Streams that the client cancels in a minute. 1,000: no browser comes near; a rapid-reset attack needs more in a
    /// second.
    pub resets_per_minute: u32,
    /// Frames without content in a second. 1,000: an upload that opens its window with every frame needs less.
    pub control_frames_per_second: u32,
}

impl Default for Http2Settings {
    fn default() -> Self {
        Http2Settings {
            concurrent_streams: 100,
            stream_window: 65_535,
            connection_window: 1 << 20,
            send_buffer: 256 * 1024,
            resets_per_minute: 1_000,
            control_frames_per_second: 1_000,
        }
    }
}

impl Default for EdgeSettings {
    fn default() -> Self {
        EdgeSettings {
            head_bytes: 32 * 1024,
            head_fields: 100,
            target_bytes: 8 * 1024,
            head_deadline: Duration::from_secs(10),
            handshake_deadline: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(60),
            body_grace: Duration::from_secs(20),
            response_grace: Duration::from_secs(60),
            min_bytes_per_second: 500,
            upgraded_idle: Duration::from_secs(3600),
            connections: 20_000,
            connections_per_address: 1_000,
            requests_per_connection: None,
            shutdown_linger: Duration::from_millis(300),
            http2: Http2Settings::default(),
            h2c: false,
            trusted_proxies: Vec::new(),
            proxy_protocol: false,
            paths: PathRules::Strict,
        }
    }
}

impl EdgeSettings {
    /// The part of the settings that heads are checked by.
    pub fn head_limits(&self) -> HeadLimits {
        HeadLimits {
            bytes: self.head_bytes,
            fields: self.head_fields,
            target_bytes: self.target_bytes,
            paths: self.paths,
        }
    }

    pub(super) fn guard(&self) -> GuardSettings {
        let pace = |grace| PaceLimits {
            grace,
            bytes_per_second: self.min_bytes_per_second,
        };
        GuardSettings {
            body: pace(self.body_grace),
            response: pace(self.response_grace),
            upgraded_idle: self.upgraded_idle,
            read_ahead_bytes: self.head_bytes,
        }
    }

    pub(super) fn frames(&self) -> FrameLimits {
        FrameLimits {
            deadline: self.head_deadline,
            body: PaceLimits {
                grace: self.body_grace,
                bytes_per_second: self.min_bytes_per_second,
            },
            resets_per_minute: self.http2.resets_per_minute,
            control_frames_per_second: self.http2.control_frames_per_second,
            stream_window: self.http2.stream_window,
        }
    }

    pub(super) fn h2_options(&self) -> H2Options {
        let mut options = H2Options::default();
        options
            .max_concurrent_streams(self.http2.concurrent_streams)
            .max_header_list_size(u32::try_from(self.head_bytes).unwrap_or(u32::MAX))
            .initial_window_size(self.http2.stream_window)
            .initial_connection_window_size(self.http2.connection_window)
            .max_send_buffer_size(self.http2.send_buffer)
            .max_frame_size(16 * 1024);
        options
    }
}
