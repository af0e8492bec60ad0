//! The schema: which migrations a database has, and those that it lacks.

use sqlx::Connection as _;
use sqlx::PgConnection;
use sqlx::migrate::{Migrate as _, Migrator};

use super::connect;
use crate::control::model::Fault;
use crate::control::store::MigrationState;

/// The migrations, as they were when this binary was built.
static MIGRATIONS: Migrator = sqlx::migrate!("src/control/store/migrations/postgres");

/// The state of every migration. Nothing is written.
pub async fn migration_states(url: &str) -> Result<Vec<MigrationState>, Fault> {
    let mut connection = connect::patient(url).await?;
    let applied = applied(&mut connection).await?;
    close(connection).await;
    Ok(MigrationState::of(&MIGRATIONS, &applied))
}

/// Applies what is missing. Processes that do so at once wait for each other: sqlx takes an advisory lock.
///
/// A database that lacks nothing is only read, so that a process needs the right to change the schema at an upgrade only.
pub async fn migrate(url: &str) -> Result<(), Fault> {
    let mut connection = connect::patient(url).await?;
    let applied = applied(&mut connection).await?;
    if let Some(newer) = applied.iter().find(|version| !MIGRATIONS.version_exists(**version)) {
        return Err(Fault::Unavailable(format!(
            "the database has migration {newer}, which this version does not know: it is of a newer version"
        )));
    }
    if MIGRATIONS.iter().any(|migration| !applied.contains(&migration.version)) {
        MIGRATIONS
            .run_direct(None, &mut connection, false)
            .await
            .map_err(|error| Fault::Unavailable(format!("the schema cannot be updated: {error}")))?;
    }
    close(connection).await;
    Ok(())
}

async fn applied(connection: &mut PgConnection) -> Result<Vec<i64>, Fault> {
    let unavailable = |error: sqlx::Error| Fault::Unavailable(error.to_string());
    let is_there: bool = sqlx::query_scalar("SELECT to_regclass('_sqlx_migrations') IS NOT NULL")
        .fetch_one(&mut *connection)
        .await
        .map_err(unavailable)?;
    if !is_there {
        return Ok(Vec::new());
    }
    let applied = connection
        .list_applied_migrations("_sqlx_migrations")
        .await
        .map_err(|error| Fault::Unavailable(error.to_string()))?;
    Ok(applied.into_iter().map(|migration| migration.version).collect())
}

async fn close(connection: PgConnection) {
    if let Err(error) = connection.close().await {
        log::debug!("a connection to the database did not end well: {error}");
    }
}
