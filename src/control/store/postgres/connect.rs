//! Connections: how many, for what, and how they heal.
//!
//! A connection may have died since it was last used: the server was restarted, or a router forgot it. One that lay idle
//! for a second is asked before it is used, and so is whether its server is still the primary: after a fail-over behind
//! one name the old server may answer on as a standby. What is found dead is closed, and the pool opens another one. A
//! connection that dies in use makes the attempt one to be repeated ([`super::retry`]).

use std::str::FromStr;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgConnection, PgPool, PgPoolOptions};
use sqlx::{ConnectOptions as _, Connection as _};

use crate::control::model::Fault;

/// The connections of one process: at most 15 with the one that listens, so that PostgreSQL's 100 by default carry six
/// processes.
pub struct Pools {
    /// Reading, sessions, the ledger.
    pub general: PgPool,
    /// Changes. They run one after another anyway; apart from the rest, so that those that wait keep nobody from reading.
    pub changes: PgPool,
    /// Gates that load everything, at their own pace.
    pub snapshots: PgPool,
    /// How to connect beside the pools.
    pub options: PgConnectOptions,
}

impl Pools {
    /// Connects when a connection is needed, and not before.
    pub fn open(url: &str) -> Result<Self, Fault> {
        let options = options(url)?.options([
            // As long as a request waits for SQLite's lock.
            ("lock_timeout", "5s"),
            // Nothing of ours takes that long; what does has lost its way.
            ("statement_timeout", "60s"),
        ]);
        // A process that stops in the middle of a change, or whose machine is gone, must not hold the feed's lock for
        // longer than this.
        let working = options
            .clone()
            .options([("idle_in_transaction_session_timeout", "10s")]);
        // Between two pieces of a snapshot a gate may take its time: 20 s for each of a few.
        let reading = options
            .clone()
            .options([("idle_in_transaction_session_timeout", "180s")]);
        Ok(Self {
            general: pool(GENERAL).connect_lazy_with(working.clone()),
            changes: pool(CHANGES).connect_lazy_with(working),
            snapshots: pool(SNAPSHOTS).connect_lazy_with(reading),
            options,
        })
    }
}

/// A connection for work that may take long: migrations and copies.
pub async fn patient(url: &str) -> Result<PgConnection, Fault> {
    options(url)?
        .connect()
        .await
        .map_err(|error| Fault::Unavailable(error.to_string()))
}

fn options(url: &str) -> Result<PgConnectOptions, Fault> {
    let options = PgConnectOptions::from_str(url)
        // The error may quote the URL, and with it the password.
        .map_err(|_| Fault::Unavailable("the database's URL is not postgres://USER:PASSWORD@HOST/NAME".into()))?;
    Ok(options
        .application_name("tollgate")
        // A peer that vanished without a word is noticed by the server within half a minute, and its locks end.
        .options([
            ("tcp_keepalives_idle", "10"),
            ("tcp_keepalives_interval", "5"),
            ("tcp_keepalives_count", "4"),
        ])
        .disable_statement_logging())
}

fn pool(connections: u32) -> PgPoolOptions {
    PgPoolOptions::new()
        .max_connections(connections)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .idle_timeout(Some(Duration::from_secs(300)))
        // Now and then a new one, so that load spreads again after a fail-over or behind a balancer.
        .max_lifetime(Some(Duration::from_secs(3_600)))
        .test_before_acquire(false)
        .before_acquire(|connection, metadata| {
            Box::pin(async move {
                if metadata.idle_for < TRUSTED_FOR {
                    return Ok(true);
                }
                let answer = tokio::time::timeout(PING_TIMEOUT, is_primary(connection)).await;
                Ok(matches!(answer, Ok(Ok(true))))
            })
        })
}

async fn is_primary(connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
    connection.ping().await?;
    sqlx::query_scalar("SELECT NOT pg_is_in_recovery()")
        .fetch_one(connection)
        .await
}

const GENERAL: u32 = 8;
const CHANGES: u32 = 2;
/// Snapshots for gates at once; further gates wait their turn.
const SNAPSHOTS: u32 = 4;
/// How long a request waits for a connection before it is told that there is none; as on SQLite.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);
/// A connection that was used so recently is not asked whether it lives.
const TRUSTED_FOR: Duration = Duration::from_secs(1);
/// How long a connection may take to say that it lives.
const PING_TIMEOUT: Duration = Duration::from_secs(1);
