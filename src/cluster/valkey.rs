//! Valkey or Redis (7.0 and later) as the store: one server, one watched by Sentinel, or a Cluster.
//!
//! A batch is one pipeline of `EVALSHA`s, each on one key, all with the partition's hash tag, so all on one server. A
//! server that does not know a script yet is sent the whole text; that some calls then come twice does no harm.
//!
//! Connections are the crate's multiplexed ones rather than its `ConnectionManager`: that one reconnects and retries by
//! itself, and the coordinator wants to know at once.

use super::protocol::{Answer, Ask, Batch, BatchAnswer, Census, Entry, Grant, Hello, buckets};
use super::store::{Store, StoreError};
use async_trait::async_trait;
use redis::aio::MultiplexedConnection;
use redis::cluster::ClusterClient;
use redis::cluster_async::ClusterConnection;
use redis::sentinel::{SentinelClient, SentinelNodeConnectionInfo, SentinelServerType};
use redis::{
    AsyncConnectionConfig, Cmd, IntoConnectionInfo, Pipeline, RedisError, RedisResult, Script, TlsMode, Value,
};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

const WINDOW: &str = include_str!("script.lua");
const GATES: &str = include_str!("gates.lua");
const IDENTITY: &str = include_str!("identity.lua");

/// Of a Cluster: as many as half a dozen masters share evenly enough. Each costs every gate a hello now and then.
const CLUSTER_PARTITIONS: u16 = 16;

/// How often the link to a Cluster is made anew while a part of it cannot be reached.
const CLUSTER_RENEWAL: Duration = Duration::from_millis(250);

/// Where the store is.
#[derive(Clone, PartialEq, Eq)]
pub enum Place {
    /// One server, by its URL.
    Server(String),
    /// The master that Sentinels, by their URLs, watch under this name.
    Sentinel {
        /// The Sentinels.
        urls: Vec<String>,
        /// The name.
        master: String,
    },
    /// A Cluster, by the URLs of some of its nodes.
    Cluster(Vec<String>),
}

/// URLs may carry a password.
impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Place::Server(_) => "Server",
            Place::Sentinel { .. } => "Sentinel",
            Place::Cluster(_) => "Cluster",
        })
    }
}

/// The store.
pub struct Valkey {
    source: Source,
    prefix: String,
    timeout: Duration,
    partitions: u16,
    scripts: [Script; 3],
    link: Mutex<Option<Link>>,
    /// Links made so far.
    links: AtomicU64,
}

#[allow(clippy::large_enum_variant, reason = "a process has one of them")]
enum Source {
    Server(redis::Client),
    /// A client for each connection: it is not shared while it looks for the master, which may take long.
    Sentinel {
        urls: Vec<String>,
        master: String,
    },
    Cluster(ClusterClient),
}

/// What is talked over, and which of those that were made it is.
#[derive(Clone)]
struct Link {
    number: u64,
    made: Instant,
    wire: Wire,
}

impl Link {
    /// To a Cluster there is one for all partitions, and it is dear to make. It mends itself, but may take seconds to learn that
    /// a replica has taken over.
    fn is_new(&self) -> bool {
        matches!(self.wire, Wire::Many(_)) && self.made.elapsed() < CLUSTER_RENEWAL
    }
}

#[derive(Clone)]
enum Wire {
    One(MultiplexedConnection),
    Many(ClusterConnection),
}

impl fmt::Debug for Valkey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Valkey")
            .field("prefix", &self.prefix)
            .finish_non_exhaustive()
    }
}

impl Valkey {
    /// The store at `place`. Our keys begin with `prefix`; an answer is waited for as long as `timeout`. Does not connect.
    ///
    /// # Errors
    /// Where an URL cannot be read; the text does not repeat it.
    pub fn new(place: &Place, prefix: &str, timeout: Duration) -> Result<Self, StoreError> {
        let unfit = |error: RedisError| StoreError::Unfit(format!("its URL: {error}"));
        let source = match place {
            Place::Server(url) => Source::Server(redis::Client::open(url.as_str()).map_err(unfit)?),
            Place::Sentinel { urls, master } => {
                sentinel(urls, master).map_err(unfit)?;
                Source::Sentinel {
                    urls: urls.clone(),
                    master: master.clone(),
                }
            }
            Place::Cluster(urls) => {
                let builder = ClusterClient::builder(urls.iter().map(String::as_str));
                let builder = builder.connection_timeout(timeout).response_timeout(timeout).retries(1);
                Source::Cluster(builder.build().map_err(unfit)?)
            }
        };
        Ok(Valkey {
            partitions: if matches!(source, Source::Cluster(_)) {
                CLUSTER_PARTITIONS
            } else {
                1
            },
            source,
            prefix: prefix.to_owned(),
            timeout,
            scripts: [WINDOW, GATES, IDENTITY].map(Script::new),
            link: Mutex::new(None),
            links: AtomicU64::new(0),
        })
    }

    /// The link there is, or another. What is made anew takes the place of the one there is.
    async fn link(&self, anew: bool) -> RedisResult<Link> {
        let link = self.lock().clone();
        match link {
            Some(link) if !anew || link.is_new() => Ok(link),
            _ => {
                let link = self.connect().await?;
                *self.lock() = Some(link.clone());
                Ok(link)
            }
        }
    }

    async fn connect(&self) -> RedisResult<Link> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.timeout))
            .set_response_timeout(Some(self.timeout));
        let wire = match &self.source {
            Source::Server(client) => Wire::One(client.get_multiplexed_async_connection_with_config(&config).await?),
            Source::Sentinel { urls, master } => {
                let mut client = sentinel(urls, master)?;
                Wire::One(client.get_async_connection_with_config(&config).await?)
            }
            Source::Cluster(client) => Wire::Many(client.get_async_connection().await?),
        };
        let number = self.links.fetch_add(1, Ordering::Relaxed);
        let made = Instant::now();
        Ok(Link { number, made, wire })
    }

    /// After an error nothing is known of a connection: the next exchange makes another. A Cluster's has others that work.
    fn drop_link(&self, number: u64) {
        let mut link = self.lock();
        if let Some(Link {
            number: there,
            wire: Wire::One(_),
            ..
        }) = &*link
            && *there == number
        {
            *link = None;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Link>> {
        self.link.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn pipeline(&self, partition: u16, batch: &Batch, whole_text: bool) -> Pipeline {
        let gates = format!("{}{{{partition}}}gates", self.prefix);
        let mut pipeline = redis::pipe();
        pipeline.ignore_errors();
        if let Some(hello) = &batch.hello {
            let mut call = self.call(GATES_SCRIPT, &gates, whole_text);
            hello_arguments(&mut call, hello, 0);
            pipeline.add_command(call);
        }
        for (name, ask) in &batch.asks {
            let key = format!("{}{{{partition}}}{name}", self.prefix);
            let mut call = self.call(WINDOW_SCRIPT, &key, whole_text);
            ask_arguments(&mut call, ask, 0);
            pipeline.add_command(call);
        }
        pipeline.add_command(self.call(IDENTITY_SCRIPT, &gates, whole_text));
        pipeline
    }

    fn call(&self, script: usize, key: &str, whole_text: bool) -> Cmd {
        let mut call = if whole_text {
            let mut call = redis::cmd("EVAL");
            call.arg([WINDOW, GATES, IDENTITY][script]);
            call
        } else {
            let mut call = redis::cmd("EVALSHA");
            call.arg(self.scripts[script].get_hash());
            call
        };
        call.arg(1).arg(key);
        call
    }

    /// Sends it, within the time that is left. What came back, and over which link.
    async fn send(&self, pipeline: &Pipeline, anew: bool) -> Result<(Vec<RedisResult<Value>>, u64), StoreError> {
        let mut number = None;
        let sent = async {
            let link = self.link(anew).await?;
            number = Some(link.number);
            match link.wire {
                Wire::One(mut link) => pipeline.query_async::<Vec<RedisResult<Value>>>(&mut link).await,
                Wire::Many(mut link) => pipeline.query_async::<Vec<RedisResult<Value>>>(&mut link).await,
            }
        };
        let sent = tokio::time::timeout(self.timeout, sent).await;
        let failed = match (sent, number) {
            (Ok(Ok(values)), Some(number)) => return Ok((values, number)),
            (Ok(Ok(_)), None) => unreachable!("what was sent was sent over a link"),
            (Ok(Err(error)), _) => error.to_string(),
            (Err(_), _) => format!("no answer within {:?}", self.timeout),
        };
        number.into_iter().for_each(|number| self.drop_link(number));
        Err(StoreError::Unreachable(failed))
    }
}

const WINDOW_SCRIPT: usize = 0;
const GATES_SCRIPT: usize = 1;
const IDENTITY_SCRIPT: usize = 2;

#[async_trait]
impl Store for Valkey {
    fn partitions(&self) -> u16 {
        self.partitions
    }

    async fn exchange(&self, partition: u16, batch: &Batch) -> Result<BatchAnswer, StoreError> {
        let (mut values, mut link) = self.send(&self.pipeline(partition, batch, false), batch.anew).await?;
        let unknown = |value: &RedisResult<Value>| matches!(value, Err(error) if error.code() == Some("NOSCRIPT"));
        if values.iter().any(unknown) {
            (values, link) = self.send(&self.pipeline(partition, batch, true), false).await?;
        }
        let read = read_answers(batch, values);
        if read.is_err() {
            // A replica that was a master answers READONLY, one that is still loading LOADING: another may serve.
            self.drop_link(link);
        }
        read
    }

    async fn check(&self) -> Result<Vec<String>, StoreError> {
        let mut warnings = vec![];
        let unreachable = |error: RedisError| StoreError::Unreachable(error.to_string());
        let connect = tokio::time::timeout(self.timeout, self.link(false)).await;
        let link = connect.map_err(|_| StoreError::Unreachable("no connection in time".to_owned()))?;
        let Wire::One(mut link) = link.map_err(unreachable)?.wire else {
            warnings.push(
                "whether the nodes of the Cluster evict keys is not checked: each needs maxmemory-policy noeviction"
                    .to_owned(),
            );
            return Ok(warnings);
        };
        let mut ask = redis::cmd("CONFIG");
        ask.arg("GET")
            .arg("maxmemory")
            .arg("maxmemory-policy")
            .arg("min-replicas-to-write");
        let settings: Vec<String> = match ask.query_async(&mut link).await {
            Ok(settings) => settings,
            Err(error) if error.is_io_error() || error.is_timeout() => return Err(unreachable(error)),
            Err(error) => {
                warnings.push(format!(
                    "whether it evicts keys cannot be checked ({error}): maxmemory-policy must be noeviction"
                ));
                return Ok(warnings);
            }
        };
        let setting = |name: &str| {
            settings
                .chunks_exact(2)
                .find(|pair| pair[0] == name)
                .map_or("", |pair| pair[1].as_str())
        };
        let policy = setting("maxmemory-policy");
        if policy != "noeviction" {
            return Err(StoreError::Unfit(format!(
                "maxmemory-policy is {policy}, and an evicted count is a forgiven one; set it to noeviction"
            )));
        }
        let replication: String = redis::cmd("INFO")
            .arg("replication")
            .query_async(&mut link)
            .await
            .unwrap_or_default();
        let replicas = replication
            .lines()
            .find_map(|line| line.strip_prefix("connected_slaves:"));
        let has_replicas =
            replicas.is_some_and(|count| count.trim() != "0") || matches!(self.source, Source::Sentinel { .. });
        if has_replicas && setting("min-replicas-to-write") == "0" {
            warnings.push(
                "min-replicas-to-write is 0: a master that is cut off from its replicas goes on granting; set it to 1 or more".to_owned(),
            );
        }
        Ok(warnings)
    }
}

/// The arguments of `script.lua`; `now_ms` 0 is the server's own time.
fn ask_arguments(call: &mut Cmd, ask: &Ask, now_ms: u64) {
    call.arg(ask.id.to_string())
        .arg(ask.sequence)
        .arg(ask.limit)
        .arg(ask.window_ms)
        .arg(buckets(ask.window_ms))
        .arg(ask.spent)
        .arg(ask.reserved)
        .arg(ask.held_until)
        .arg(ask.spent_until)
        .arg(ask.want)
        .arg(ask.hold_ms)
        .arg(ask.slack_ms)
        .arg(ask.keep_ms)
        .arg(now_ms);
    match &ask.history {
        Some(history) => call.arg(history.to_string()),
        None => call.arg("-"),
    };
    call.arg(ask.granted).arg(u8::from(ask.afresh));
}

/// The arguments of `gates.lua`.
fn hello_arguments(call: &mut Cmd, hello: &Hello, now_ms: u64) {
    call.arg(format!("{:016x}", hello.id))
        .arg(&*hello.name)
        .arg(&hello.candidate)
        .arg(&hello.refilled)
        .arg(hello.seen)
        .arg(u8::from(hello.left))
        .arg(hello.version.map_or(-1, |version| version as i64))
        .arg(hello.forget_ms)
        .arg(now_ms)
        .arg(hello.unresolved_ms);
}

fn read_answers(batch: &Batch, values: Vec<RedisResult<Value>>) -> Result<BatchAnswer, StoreError> {
    let mut values = values.into_iter();
    let mut next = || match values.next() {
        Some(Ok(value)) => Ok(value),
        Some(Err(error)) => Err(StoreError::Unreachable(error.to_string())),
        None => Err(StoreError::Garbled("fewer times than it was asked".to_owned())),
    };
    let census = match &batch.hello {
        Some(_) => Some(read_census(&next()?)?),
        None => None,
    };
    let mut answers = vec![];
    for _ in &batch.asks {
        answers.push(Some(read_answer(&next()?)?));
    }
    let who = next()?;
    let Value::Array(who) = &who else {
        return Err(garbled(&who));
    };
    match who.as_slice() {
        [token, Value::BulkString(run_id)] => Ok(BatchAnswer {
            token: text(token),
            run_id: String::from_utf8_lossy(run_id).into_owned(),
            census,
            answers,
        }),
        _ => Err(StoreError::Garbled("no run id".to_owned())),
    }
}

fn read_answer(value: &Value) -> Result<Answer, StoreError> {
    let numbers = match value {
        Value::Array(values) => values.iter().map(number).collect::<Option<Vec<i64>>>(),
        _ => None,
    };
    match numbers.as_deref() {
        Some([0, granted, label, valid_ms, total, leaves_ms, stamp]) => Ok(Answer::Done(Grant {
            granted: *granted as u64,
            label: *label as u64,
            valid_ms: *valid_ms,
            total: *total,
            leaves_ms: *leaves_ms as u64,
            stamp: *stamp as u64,
        })),
        Some([1]) => Ok(Answer::Overtaken),
        Some([2]) => Ok(Answer::Unknown),
        _ => Err(garbled(value)),
    }
}

fn read_census(value: &Value) -> Result<Census, StoreError> {
    let Value::Array(parts) = value else {
        return Err(garbled(value));
    };
    let (head, list) = parts.split_at_checked(5).ok_or_else(|| garbled(value))?;
    let head = head.iter().map(number).collect::<Option<Vec<i64>>>();
    let Some([now_ms, born_ms, version, joined, joins]) = head.as_deref().and_then(|head| head.first_chunk().copied())
    else {
        return Err(garbled(value));
    };
    let entries = list
        .chunks_exact(2)
        .map(|pair| read_entry(&text(&pair[0])?, &text(&pair[1])?));
    let gates = entries.collect::<Option<Vec<_>>>().ok_or_else(|| garbled(value))?;
    Ok(Census {
        now_ms: now_ms as u64,
        born_ms: born_ms as u64,
        version: version as u64,
        joined: joined as u64,
        joins: joins as u64,
        // The gate itself is in every list.
        gates: (!gates.is_empty()).then_some(gates),
    })
}

fn read_entry(id: &str, fields: &str) -> Option<Entry> {
    let mut fields = fields.splitn(7, ' ');
    let mut next = || fields.next();
    let (joined, seen, last_ms, unresolved_ms) = (next()?, next()?, next()?, next()?);
    Some(Entry {
        id: u64::from_str_radix(id, 16).ok()?,
        joined: joined.parse().ok()?,
        seen: seen.parse().ok()?,
        last_ms: last_ms.parse().ok()?,
        unresolved_ms: unresolved_ms.parse().ok()?,
        left: next()? == "1",
        refilled: next()?.to_owned(),
        name: next()?.to_owned(),
    })
}

fn number(value: &Value) -> Option<i64> {
    match value {
        Value::Int(number) => Some(*number),
        _ => None,
    }
}

fn text(value: &Value) -> Option<String> {
    match value {
        Value::BulkString(bytes) => String::from_utf8(bytes.clone()).ok(),
        Value::SimpleString(text) => Some(text.clone()),
        _ => None,
    }
}

fn garbled(value: &Value) -> StoreError {
    StoreError::Garbled(format!("{value:?}"))
}

fn sentinel(urls: &[String], master: &str) -> RedisResult<SentinelClient> {
    let mut node = SentinelNodeConnectionInfo::default();
    // The master is spoken to as the Sentinels are: with the same name and password, over TLS or not.
    if let Some(url) = urls.first() {
        let info = url.as_str().into_connection_info()?;
        node = node.set_redis_connection_info(info.redis_settings().clone());
        if url.starts_with("rediss://") {
            node = node.set_tls_mode(TlsMode::Secure);
        }
    }
    SentinelClient::build(
        urls.iter().map(String::as_str).collect(),
        master,
        Some(node),
        SentinelServerType::Master,
    )
}

#[cfg(test)]
mod tests;
