//! What only a database with many connections can show: conflicts that it takes back, connections that die.

use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::{Connection as _, Executor as _, PgConnection};
use tollgate::control::model::Fault;
use tollgate::control::store::{News, Store};
use tollgate::control::{migrate, migration_states};

use crate::parts::{Place, caller, create, register, rename, session};
use crate::postgres::Postgres;

async fn place(server: &Postgres) -> (Place, PgConnection) {
    let place = Place::open(server.database()).await;
    let connection = PgConnection::connect(&place.url).await.unwrap();
    register(&*place.store, "acme").await;
    create(&*place.store, "org_acme", "k001").await.unwrap();
    (place, connection)
}

async fn attempts(connection: &mut PgConnection) -> i64 {
    sqlx::query_scalar("SELECT last_value FROM attempts")
        .fetch_one(connection)
        .await
        .unwrap()
}

/// A trigger that fails the first attempts of a change with a code. A sequence counts them: it is not rolled back.
async fn fail(connection: &mut PgConnection, code: &str, times: u32) {
    let function = format!(
        "DROP SEQUENCE IF EXISTS attempts; CREATE SEQUENCE attempts;
         CREATE OR REPLACE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             IF nextval('attempts') <= {times} THEN RAISE EXCEPTION 'on purpose' USING ERRCODE = '{code}'; END IF;
             RETURN NEW;
         END $$;
         CREATE OR REPLACE TRIGGER failing BEFORE INSERT ON audit FOR EACH ROW EXECUTE FUNCTION fail()"
    );
    connection.execute(sqlx::AssertSqlSafe(function)).await.unwrap();
}

#[tokio::test]
async fn conflicts_are_tried_again_and_not_for_ever() {
    let server = Postgres::start();
    let (place, mut other) = place(&server).await;
    let store = &*place.store;
    for (code, revision) in [("40001", 2), ("40P01", 3)] {
        fail(&mut other, code, 3).await;
        assert_eq!(
            rename(store, "key_k001", code).await,
            Ok(revision),
            "{code}: no revision is lost by it"
        );
        assert_eq!(attempts(&mut other).await, 4, "{code}");
    }
    fail(&mut other, "40001", 3).await;
    let caller = caller();
    let stamp = tollgate::control::store::Stamp {
        caller: &caller,
        now_ms: 1,
    };
    store
        .begin_session(&session("acme", "s", 1), None, stamp)
        .await
        .unwrap();
    assert_eq!(attempts(&mut other).await, 4);

    fail(&mut other, "40001", 1_000).await;
    let refused = rename(store, "key_k001", "never").await;
    assert!(
        matches!(&refused, Err(Fault::Unavailable(why)) if why.contains("several times")),
        "{refused:?}"
    );
    assert_eq!(attempts(&mut other).await, 8);
    // What is no conflict is not tried again.
    fail(&mut other, "23514", 1_000).await;
    assert!(matches!(
        rename(store, "key_k001", "never").await,
        Err(Fault::Internal(_))
    ));
    assert_eq!(attempts(&mut other).await, 1);
    assert_eq!(store.revision().await, Ok(3));
    real_deadlock(place.store.clone(), &mut other).await;
}

/// Another client takes the locks in the wrong order. PostgreSQL ends one of the two; the store begins again.
async fn real_deadlock(store: Arc<dyn Store>, other: &mut PgConnection) {
    // Fails nothing, and counts how often a key's row is about to be written.
    fail(other, "40001", 0).await;
    let count = "DROP TRIGGER failing ON audit;
                 CREATE TRIGGER counting BEFORE UPDATE ON keys FOR EACH STATEMENT EXECUTE FUNCTION fail()";
    other.execute(count).await.unwrap();
    // This one waits longer before it looks for a deadlock, so the store's transaction is the one that is ended.
    other
        .execute("SET deadlock_timeout = '20s'; BEGIN; SELECT 1 FROM keys FOR UPDATE")
        .await
        .unwrap();
    let change = tokio::spawn(async move { rename(&*store, "key_k001", "after all").await });
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()";
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let waiting: i64 = sqlx::query_scalar(waits).fetch_one(&mut *other).await.unwrap();
        if waiting > 0 {
            break;
        }
        assert!(Instant::now() < deadline, "the change does not wait");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    other.execute("SELECT 1 FROM feed_state FOR UPDATE").await.unwrap();
    other.execute("COMMIT").await.unwrap();
    assert_eq!(change.await.unwrap(), Ok(4));
    // The second may be quicker than the other client to take what the first let go of, and they meet again.
    let attempts = attempts(other).await;
    assert!((2..=8).contains(&attempts), "{attempts}");
}

#[tokio::test]
async fn a_lock_that_is_not_released_is_a_clear_fault_and_reading_goes_on() {
    let server = Postgres::start();
    let (place, mut other) = place(&server).await;
    other
        .execute("BEGIN; SELECT 1 FROM feed_state FOR UPDATE")
        .await
        .unwrap();
    let refused = rename(&*place.store, "key_k001", "n").await;
    assert!(
        matches!(&refused, Err(Fault::Unavailable(why)) if why.contains("waited too long")),
        "{refused:?}"
    );
    assert_eq!(place.store.key(None, "key_k001").await.unwrap().unwrap().name, "k001");
    other.execute("ROLLBACK").await.unwrap();
    assert_eq!(rename(&*place.store, "key_k001", "n").await, Ok(2));
}

#[tokio::test]
async fn connections_heal_by_themselves() {
    let mut server = Postgres::start();
    let (place, other) = place(&server).await;
    let store = &*place.store;
    let mut news = store.news().unwrap();
    assert_eq!(news.recv().await, Some(News::Unknown));
    rename(store, "key_k001", "one").await.unwrap();
    assert_eq!(news.recv().await, Some(News::Revision(2)));
    drop(other);
    // Every connection of every pool is cut off under it, again and again: nobody notices.
    for round in 0..5_u64 {
        let name = place.url.rsplit('/').next().unwrap();
        let cut = format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'");
        server.execute("postgres", &cut);
        assert_eq!(store.revision().await, Ok(2 + round));
        assert_eq!(rename(store, "key_k001", &format!("n{round}")).await, Ok(3 + round));
    }
    // Notifications are followed anew, and say that something may have been missed.
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match tokio::time::timeout(left, news.recv())
            .await
            .expect("they are followed anew")
            .unwrap()
        {
            News::Unknown => break,
            News::Revision(_) | News::Gates(_) => {}
        }
    }
    server.stop();
    let away = rename(store, "key_k001", "away").await;
    assert!(matches!(away, Err(Fault::Unavailable(_))), "{away:?}");
    assert!(matches!(store.revision().await, Err(Fault::Unavailable(_))));
    server.resume();
    assert_eq!(rename(store, "key_k001", "back").await, Ok(8));
}

#[tokio::test]
async fn several_processes_may_make_the_schema_at_once_and_a_newer_one_is_refused() {
    let server = Postgres::start();
    let url = server.database();
    assert!(migration_states(&url).await.unwrap().iter().all(|state| !state.applied));
    let places = futures_util::future::join_all((0..4).map(|_| Place::open(url.clone()))).await;
    assert!(migration_states(&url).await.unwrap().iter().all(|state| state.applied));
    assert_eq!(places[3].store.revision().await, Ok(0));
    migrate(&url).await.unwrap();
    let name = url.rsplit('/').next().unwrap();
    server.execute(
        name,
        "INSERT INTO _sqlx_migrations VALUES (9999, 'later', now(), true, '\\x00', 0)",
    );
    let refused = migrate(&url).await.unwrap_err().to_string();
    assert!(refused.contains("newer version"), "{refused}");
    let nowhere = migrate(&server.url("nowhere")).await.unwrap_err().to_string();
    assert!(nowhere.contains("\"nowhere\" does not exist"), "{nowhere}");
}
