//! What the control plane must be told; `app` fills it from the configuration.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::time::Duration;

/// Everything that can be set. `Debug` prints no token.
#[derive(Clone)]
pub struct Settings {
    /// `sqlite:///path/to/file`, `postgres://…`, or `sqlite::memory:` for a database that ends with the process.
    pub database: String,
    /// What gates present at `/feed/v1/…`.
    pub feed_token: String,
    /// What the operator presents at `/api/v1/admin/…`.
    pub admin_token: String,
    /// How browsers reach the control plane. With `https://`, cookies are `Secure` and carry the `__Host-` prefix.
    pub public_url: Option<String>,
    /// How clients reach the gates, such as `https://api.example.com`: the portal shows lines to paste with it.
    pub gate_url: Option<String>,
    pub registration: Registration,
    pub environments: Vec<Environment>,
    pub scopes: Vec<Scope>,
    pub tiers: Vec<Tier>,
    pub plans: Vec<Plan>,
    /// The plan of a new organisation; one of `plans`.
    pub default_plan: String,
    /// How long an old secret lives after a rotation that does not say: 24 h by default.
    pub default_grace_ms: i64,
    /// The longest grace that a rotation may ask for: 30 d by default.
    pub max_grace_ms: i64,
    /// Whose `X-Forwarded-For` is believed, for the audit log and for throttling. Loopback by default.
    pub trusted_proxies: Vec<Network>,
    /// Time between two heartbeats on the feed: 5 s.
    pub heartbeat: Duration,
    /// A gate that is not connected counts as live for so long after it was last heard: 15 s, three heartbeats.
    pub gate_live_for: Duration,
    /// How many registrations one address may make in an hour: 100.
    pub registrations_per_hour: u32,
    /// How many failed sign-ins one address, and one account, may have in 15 minutes: 10.
    pub login_attempts: u32,
    pub retention: Retention,
}

/// How long what grows without end is kept; none: for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// Lines of the audit log: for ever.
    pub audit: Option<Duration>,
    /// Usage by the minute, which is then kept by the hour: 90 d.
    pub usage_by_minute: Option<Duration>,
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            audit: None,
            usage_by_minute: Some(Duration::from_secs(90 * 24 * 3_600)),
        }
    }
}

impl Default for Settings {
    /// An empty catalogue with the numbers of the manual. The tokens are empty, which lets nobody in.
    fn default() -> Self {
        Self {
            database: "sqlite::memory:".to_owned(),
            feed_token: String::new(),
            admin_token: String::new(),
            public_url: None,
            gate_url: None,
            registration: Registration::Open,
            environments: Vec::new(),
            scopes: Vec::new(),
            tiers: Vec::new(),
            plans: Vec::new(),
            default_plan: "starter".to_owned(),
            default_grace_ms: 24 * 3_600_000,
            max_grace_ms: 30 * 24 * 3_600_000,
            trusted_proxies: vec![Network::LOOPBACK_V4, Network::LOOPBACK_V6],
            heartbeat: Duration::from_secs(5),
            gate_live_for: Duration::from_secs(15),
            registrations_per_hour: 100,
            login_attempts: 10,
            retention: Retention::default(),
        }
    }
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // `postgres://user:password@host` holds a password, so the database is named by its scheme alone.
        f.debug_struct("Settings")
            .field("database", &self.database.split(':').next().unwrap_or_default())
            .field("public_url", &self.public_url)
            .field("registration", &self.registration)
            .field("environments", &self.environments)
            .field("plans", &self.plans)
            .finish_non_exhaustive()
    }
}

/// Who may make an account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Registration {
    /// Anybody.
    Open,
    /// Whoever has an invitation that the operator made.
    Invite,
    /// Nobody.
    Off,
}

/// An environment of keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Environment {
    pub name: String,
    /// What its secrets begin with, such as `pxk_live_`.
    pub prefix: String,
    /// Whether its permits are billable.
    pub billed: bool,
}

/// What a key may be allowed to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope {
    pub name: String,
    pub description: String,
}

/// A bucket of routes that share one limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tier {
    pub name: String,
    /// Requests per window.
    pub limit: u32,
    pub window_ms: u64,
}

/// A named set of limits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    pub name: String,
    /// Requests of one key that may be under way at once; none: unlimited.
    pub max_in_flight: Option<u32>,
    /// Every tier, with this plan's limit.
    pub tiers: Vec<Tier>,
}

/// A range of addresses, written `10.0.0.0/8`, or one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    prefix_bits: u8,
}

impl Network {
    pub const LOOPBACK_V4: Network = Network {
        address: IpAddr::V4(std::net::Ipv4Addr::new(127, 0, 0, 0)),
        prefix_bits: 8,
    };
    pub const LOOPBACK_V6: Network = Network {
        address: IpAddr::V6(std::net::Ipv6Addr::LOCALHOST),
        prefix_bits: 128,
    };

    /// The network of `prefix_bits` leading bits of `address`; `None` if an address has not so many.
    pub fn new(address: IpAddr, prefix_bits: u8) -> Option<Self> {
        let most = if address.is_ipv4() { 32 } else { 128 };
        (prefix_bits <= most).then_some(Self { address, prefix_bits })
    }

    /// Whether `address` lies in this network. An IPv4 address mapped into IPv6 counts as the IPv4 address.
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address.to_canonical(), address.to_canonical()) {
            (IpAddr::V4(network), IpAddr::V4(address)) => {
                let shift = 32 - u32::from(self.prefix_bits.min(32));
                (u64::from(network.to_bits()) >> shift) == (u64::from(address.to_bits()) >> shift)
            }
            (IpAddr::V6(network), IpAddr::V6(address)) => {
                let shift = 128 - u32::from(self.prefix_bits);
                network.to_bits().checked_shr(shift) == address.to_bits().checked_shr(shift)
            }
            _ => false,
        }
    }
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || format!("`{text}` is neither an address nor a network such as 10.0.0.0/8");
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits.parse::<u8>().map_err(|_| wrong())?)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        Network::new(address, bits.unwrap_or(if address.is_ipv4() { 32 } else { 128 })).ok_or_else(wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_contain_what_they_should() {
        let ten: Network = "10.0.0.0/8".parse().unwrap();
        assert!(ten.contains("10.255.0.1".parse().unwrap()));
        assert!(ten.contains("::ffff:10.1.2.3".parse().unwrap()));
        assert!(!ten.contains("11.0.0.1".parse().unwrap()));
        assert!(!ten.contains("::1".parse().unwrap()));
        let all: Network = "0.0.0.0/0".parse().unwrap();
        assert!(all.contains("203.0.113.9".parse().unwrap()));
        let everything: Network = "::/0".parse().unwrap();
        assert!(everything.contains("2001:db8::1".parse().unwrap()));
        let documentation: Network = "2001:db8::/32".parse().unwrap();
        assert!(documentation.contains("2001:db8:1::1".parse().unwrap()));
        assert!(!documentation.contains("2001:db9::1".parse().unwrap()));
        assert!("10.0.0.0/33".parse::<Network>().is_err());
        assert!("nonsense".parse::<Network>().is_err());
    }

    #[test]
    fn debug_prints_no_token() {
        let settings = Settings {
            feed_token: "feed-canary".into(),
            admin_token: "admin-canary".into(),
            database: "postgres://me:db-canary@host/x".into(),
            ..Settings::default()
        };
        assert!(!format!("{settings:?}").contains("canary"));
    }
}
