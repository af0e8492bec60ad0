//! Hearing at once what other processes have changed.
//!
//! PostgreSQL forgets notifications for whoever is not connected, so they are only ever a reason to look: after each
//! connection there is [`News::Unknown`], and whoever follows looks at the database now and then anyway. A notification
//! comes after the commit that it tells of, and in the order of commits.

use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgListener, PgNotification, PgPoolOptions};
use tokio::sync::mpsc;

use super::gates::GateRow;
use crate::control::model::Fault;
use crate::control::store::News;

/// Where changes are announced, with the revision.
pub const FEED: &str = "tollgate_feed";
/// Where gates are announced, with their rows.
pub const GATES: &str = "tollgate_gates";

/// Follows both until the receiver is dropped. `own` names this process.
pub fn follow(options: PgConnectOptions, own: String) -> mpsc::Receiver<News> {
    let (news, receiver) = mpsc::channel(WAITING);
    tokio::spawn(async move {
        let mut pause = FIRST_PAUSE;
        while !news.is_closed() {
            match connect(&options).await {
                Ok(mut listener) => {
                    pause = FIRST_PAUSE;
                    if news.send(News::Unknown).await.is_err() {
                        return;
                    }
                    let end = tokio::select! {
                        end = pass_on(&mut listener, &news, &own) => end,
                        () = news.closed() => return,
                    };
                    log::debug!("the database's notifications are followed anew: {end}");
                }
                Err(error) => log::debug!("the database's notifications cannot be followed yet: {error}"),
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = news.closed() => return,
            }
            pause = (pause * 2).min(LAST_PAUSE);
        }
    });
    receiver
}

async fn connect(options: &PgConnectOptions) -> Result<PgListener, sqlx::Error> {
    let pool = PgPoolOptions::new()
        .max_connections(1)
        .acquire_timeout(CONNECT_TIMEOUT)
        .connect_with(options.clone())
        .await?;
    let mut listener = PgListener::connect_with(&pool).await?;
    // Nobody else uses this pool, and nobody closes it. A lost connection is ours to replace: what was missed meanwhile
    // must be looked for.
    listener.ignore_pool_close_event(true);
    listener.eager_reconnect(false);
    listener.listen_all([FEED, GATES]).await?;
    Ok(listener)
}

async fn pass_on(listener: &mut PgListener, news: &mpsc::Sender<News>, own: &str) -> String {
    loop {
        // A server that vanished without a word is silent too: a new connection shows it.
        let Ok(received) = tokio::time::timeout(LONGEST_SILENCE, listener.try_recv()).await else {
            return "nothing was heard for long".to_owned();
        };
        let read = match received {
            Ok(Some(notification)) => read(&notification, own),
            Ok(None) => return "the connection was lost".to_owned(),
            Err(error) => return error.to_string(),
        };
        if news.send(read).await.is_err() {
            return "nobody follows them".to_owned();
        }
    }
}

/// What cannot be read, perhaps of another version, is a reason to look all the same.
fn read(notification: &PgNotification, own: &str) -> News {
    let payload = notification.payload();
    match notification.channel() {
        FEED => payload.parse().map_or(News::Unknown, News::Revision),
        _ => match serde_json::from_str::<Vec<GateRow>>(payload) {
            Ok(rows) if !rows.is_empty() => News::Gates(rows.into_iter().map(|row| row.into_state(own)).collect()),
            _ => News::Unknown,
        },
    }
}

/// Rows as JSON lists, each short enough for a notification.
pub fn payloads(rows: &[GateRow]) -> Result<Vec<String>, Fault> {
    let mut payloads: Vec<String> = Vec::new();
    for row in rows {
        let row = serde_json::to_string(row).map_err(|e| Fault::Internal(e.to_string()))?;
        match payloads.last_mut() {
            Some(list) if list.len() + row.len() < LONGEST_PAYLOAD => {
                list.pop();
                list.push_str(&format!(",{row}]"));
            }
            _ => payloads.push(format!("[{row}]")),
        }
    }
    Ok(payloads)
}

/// PostgreSQL takes payloads of fewer than 8,000 bytes.
const LONGEST_PAYLOAD: usize = 7_900;
/// Notifications between the connection and whoever follows; beyond them the server keeps the rest.
const WAITING: usize = 64;
/// Six times as long as the time between two reports of a gate that is connected.
const LONGEST_SILENCE: Duration = Duration::from_secs(30);
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_secs(1);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
