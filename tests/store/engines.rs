//! Every test of the contract on every engine.

use std::panic::AssertUnwindSafe;

use futures_util::FutureExt as _;
use futures_util::future::join_all;

use crate::contract::CONTRACT;
use crate::parts::Place;
use crate::postgres::Postgres;

/// Databases of one engine, as many as are wanted.
enum Engine {
    /// Files in a directory.
    Sqlite(tempfile::TempDir),
    Postgres(Postgres),
}

impl Engine {
    async fn place(&self, name: &str) -> Place {
        Place::open(match self {
            Engine::Sqlite(directory) => format!("sqlite://{}", directory.path().join(format!("{name}.db")).display()),
            Engine::Postgres(server) => server.database(),
        })
        .await
    }

    fn sqlite() -> Self {
        Engine::Sqlite(tempfile::tempdir().unwrap())
    }

    fn postgres() -> Self {
        Engine::Postgres(Postgres::start())
    }
}

/// Runs one test; answers its name if it failed. The panic's message is on standard error.
async fn run(engine: &Engine, name: &'static str, test: crate::contract::Test) -> Option<&'static str> {
    let outcome = AssertUnwindSafe(async { test(engine.place(name).await).await })
        .catch_unwind()
        .await;
    outcome.is_err().then_some(name)
}

async fn one_after_another(engine: Engine) {
    let mut failed = Vec::new();
    for (name, test) in CONTRACT {
        failed.extend(run(&engine, name, *test).await);
    }
    assert!(failed.is_empty(), "{failed:?}");
}

async fn all_at_once(engine: Engine) {
    let tests = CONTRACT.iter().map(|(name, test)| run(&engine, name, *test));
    let failed: Vec<_> = join_all(tests).await.into_iter().flatten().collect();
    assert!(failed.is_empty(), "{failed:?}");
}

#[tokio::test]
async fn the_contract_holds_on_sqlite_serially() {
    one_after_another(Engine::sqlite()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_contract_holds_on_sqlite_concurrently() {
    all_at_once(Engine::sqlite()).await;
}

#[tokio::test]
async fn the_contract_holds_on_postgresql_serially() {
    one_after_another(Engine::postgres()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_contract_holds_on_postgresql_concurrently() {
    all_at_once(Engine::postgres()).await;
}
