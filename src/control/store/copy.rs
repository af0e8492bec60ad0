//! Moves a store from SQLite to PostgreSQL: whole or not at all, and looked at again before it counts.
//!
//! Everything happens in one transaction on each side. The source's keeps others from writing to it, so that no change is
//! acknowledged there and missing here. The target's locks every table, finds each of them empty, fills it, reads it back,
//! and commits only if every table has the same number of rows with the same digest as the source.
//!
//! Revisions are copied too, so gates go on where they were and need no full snapshot.

use futures_util::TryStreamExt as _;
use sha2::{Digest as _, Sha256};
use sqlx::sqlite::SqliteRow;
use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection, Row as _, SqliteConnection};

use self::tables::TABLES;
use super::{postgres, sqlite};
use crate::control::model::Fault;
use crate::control::secret::hex;

mod tables;

/// How far a copy is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    pub table: &'static str,
    /// Whether rows are written, or read back and compared.
    pub is_verifying: bool,
    /// Rows of all tables that are copied or verified so far, and how many there are to be: twice as many as rows, since
    /// each is read back.
    pub done: u64,
    pub total: u64,
}

/// A table that is the same on both sides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copied {
    pub table: &'static str,
    pub rows: u64,
    /// SHA-256 of the rows in the order of their primary key, in hexadecimal.
    pub sha256: String,
}

/// Copies the SQLite database at `from` into the empty PostgreSQL database at `to`.
///
/// # Errors
/// [`Fault::Unavailable`] if one of them cannot be used, `to` is not empty, or a table is not the same afterwards. Then
/// `to` is as it was.
pub async fn copy(from: &str, to: &str, progress: &mut (dyn FnMut(Progress) + Send)) -> Result<Vec<Copied>, Fault> {
    if !from.starts_with("sqlite:") || !(to.starts_with("postgres:") || to.starts_with("postgresql:")) {
        return Err(refused("a store is copied from sqlite://… to postgres://…"));
    }
    let mut source = sqlite::connect_to_existing(from).await?;
    postgres::migrate(to).await?;
    let mut target = postgres::connect_patiently(to).await?;

    let mut reading = source.begin_with("BEGIN IMMEDIATE").await.map_err(failed)?;
    let mut writing = target.begin().await.map_err(failed)?;
    claim_empty(&mut writing).await?;
    let mut total = 0;
    for table in TABLES {
        total += 2 * table.count(&mut reading).await?;
    }
    let mut done = 0;
    let mut report = |table: &Table, is_verifying: bool, rows: u64| {
        done += rows;
        progress(Progress {
            table: table.name,
            is_verifying,
            done,
            total,
        });
    };
    let mut originals = Vec::with_capacity(TABLES.len());
    for table in TABLES {
        originals.push(
            table
                .write(&mut reading, &mut writing, &mut |rows| report(table, false, rows))
                .await?,
        );
    }
    continue_serials(&mut writing).await?;
    for (table, original) in TABLES.iter().zip(&originals) {
        let copied = table
            .read_back(&mut writing, &mut |rows| report(table, true, rows))
            .await?;
        if copied != *original {
            return Err(refused(format!(
                "table {} is not the same after it was copied: {} rows with SHA-256 {}, read back as {} rows with {}; \
                 nothing was kept",
                table.name, original.rows, original.sha256, copied.rows, copied.sha256
            )));
        }
    }
    writing.commit().await.map_err(failed)?;
    reading.rollback().await.map_err(failed)?;
    Ok(originals)
}

/// A table on both sides: the same name, the same columns.
struct Table {
    name: &'static str,
    columns: &'static [(&'static str, Kind)],
    /// The primary key.
    order: &'static [&'static str],
}

/// How a column is stored.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Number,
    Text,
    /// 0 or 1 on SQLite.
    Truth,
    Bytes,
    /// JSON, whose spelling the two keep differently.
    Json,
    /// A JSON list of texts on SQLite, an array on PostgreSQL.
    Texts,
}

use Kind::{Bytes, Json, Number, Text, Texts, Truth};

impl Table {
    async fn count(&self, source: &mut SqliteConnection) -> Result<u64, Fault> {
        let sql = format!("SELECT count(*) FROM {}", self.name);
        let count: i64 = sqlx::query_scalar(AssertSqlSafe(sql))
            .fetch_one(source)
            .await
            .map_err(failed)?;
        Ok(count.unsigned_abs())
    }

    /// Reads the source and writes the target, by PostgreSQL's COPY.
    async fn write(
        &self,
        source: &mut SqliteConnection,
        target: &mut PgConnection,
        report: &mut (dyn FnMut(u64) + Send),
    ) -> Result<Copied, Fault> {
        let names: Vec<&str> = self.columns.iter().map(|(name, _)| *name).collect();
        let copy = format!("COPY {} ({}) FROM STDIN", self.name, names.join(", "));
        let mut copying = target.copy_in_raw(&copy).await.map_err(failed)?;
        let cells = self.columns.iter().map(|(name, kind)| match kind {
            Number | Truth => format!("CAST({name} AS TEXT)"),
            Bytes => format!("lower(hex({name}))"),
            Text | Json | Texts => (*name).to_owned(),
        });
        let select = self.select(cells);
        let mut rows = sqlx::query(AssertSqlSafe(select)).fetch(source);
        let (mut digest, mut piece) = (Tally::default(), String::new());
        while let Some(row) = rows.try_next().await.map_err(failed)? {
            let line = self.line(|column| cell_of_sqlite(&row, column))?;
            digest.add(&line);
            piece.push_str(&line);
            if piece.len() >= PIECE_BYTES {
                copying
                    .send(std::mem::take(&mut piece).into_bytes())
                    .await
                    .map_err(failed)?;
                report(digest.unreported());
            }
        }
        drop(rows);
        copying.send(piece.into_bytes()).await.map_err(failed)?;
        copying.finish().await.map_err(failed)?;
        report(digest.unreported());
        Ok(digest.finish(self.name))
    }

    async fn read_back(
        &self,
        target: &mut PgConnection,
        report: &mut (dyn FnMut(u64) + Send),
    ) -> Result<Copied, Fault> {
        let cells = self.columns.iter().map(|(name, kind)| match kind {
            Number | Json => format!("{name}::text"),
            Truth => format!("{name}::int::text"),
            Bytes => format!("encode({name}, 'hex')"),
            Texts => format!("array_to_json({name})::text"),
            Text => (*name).to_owned(),
        });
        let select = self.select(cells);
        let mut rows = sqlx::query(AssertSqlSafe(select)).fetch(target);
        let mut digest = Tally::default();
        while let Some(row) = rows.try_next().await.map_err(failed)? {
            let line = self.line(|column| row.try_get(column))?;
            digest.add(&line);
            if digest.unreported >= ROWS_BETWEEN_REPORTS {
                report(digest.unreported());
            }
        }
        report(digest.unreported());
        Ok(digest.finish(self.name))
    }

    fn select(&self, cells: impl Iterator<Item = String>) -> String {
        let cells: Vec<String> = cells.collect();
        // With the table's name, or PostgreSQL would take the cell of that name, and order numbers as text.
        let order: Vec<String> = self
            .order
            .iter()
            .map(|column| format!("{}.{column}", self.name))
            .collect();
        format!(
            "SELECT {} FROM {} ORDER BY {}",
            cells.join(", "),
            self.name,
            order.join(", ")
        )
    }

    /// A row in the text form of COPY, which is the same for the same content whichever side it was read from.
    fn line(&self, cell: impl Fn(usize) -> Result<Option<String>, sqlx::Error>) -> Result<String, Fault> {
        let mut line = String::new();
        for (index, (name, kind)) in self.columns.iter().enumerate() {
            if index > 0 {
                line.push('\t');
            }
            let Some(text) = cell(index).map_err(failed)? else {
                line.push_str(r"\N");
                continue;
            };
            let odd = |error| Fault::Unavailable(format!("{}.{name} is not JSON: {error}", self.name));
            match kind {
                Number | Truth => line.push_str(&text),
                Bytes => line.push_str(&format!(r"\\x{text}")),
                Text => escape(&text, &mut line),
                Json => {
                    let value: serde_json::Value = serde_json::from_str(&text).map_err(odd)?;
                    escape(&value.to_string(), &mut line);
                }
                Texts => {
                    let texts: Vec<String> = serde_json::from_str(&text).map_err(odd)?;
                    escape(&array(&texts), &mut line);
                }
            }
        }
        line.push('\n');
        Ok(line)
    }
}

fn cell_of_sqlite(row: &SqliteRow, column: usize) -> Result<Option<String>, sqlx::Error> {
    row.try_get(column)
}

/// What COPY would read as an end or an escape: <https://www.postgresql.org/docs/current/sql-copy.html#id-1.9.55.9.2>
fn escape(text: &str, line: &mut String) {
    for character in text.chars() {
        match character {
            '\\' => line.push_str(r"\\"),
            '\t' => line.push_str(r"\t"),
            '\n' => line.push_str(r"\n"),
            '\r' => line.push_str(r"\r"),
            other => line.push(other),
        }
    }
}

/// An array as PostgreSQL reads it, each text in quotes.
fn array(texts: &[String]) -> String {
    let quoted = texts
        .iter()
        .map(|text| format!("\"{}\"", text.replace('\\', r"\\").replace('"', "\\\"")));
    format!("{{{}}}", quoted.collect::<Vec<_>>().join(","))
}

/// Counts and digests rows.
#[derive(Default)]
struct Tally {
    rows: u64,
    unreported: u64,
    sha256: Sha256,
}

impl Tally {
    fn add(&mut self, line: &str) {
        self.rows += 1;
        self.unreported += 1;
        self.sha256.update(line.as_bytes());
    }

    fn unreported(&mut self) -> u64 {
        std::mem::take(&mut self.unreported)
    }

    fn finish(self, table: &'static str) -> Copied {
        Copied {
            table,
            rows: self.rows,
            sha256: hex(&self.sha256.finalize()),
        }
    }
}

/// Locks every table, and makes sure that nothing is in any. What the migrations put there is replaced.
async fn claim_empty(target: &mut PgConnection) -> Result<(), Fault> {
    let names: Vec<&str> = TABLES.iter().map(|table| table.name).collect();
    let lock = format!("LOCK TABLE {} IN SHARE ROW EXCLUSIVE MODE", names.join(", "));
    target.execute(AssertSqlSafe(lock)).await.map_err(failed)?;
    for table in TABLES {
        let pristine = match table.name {
            "feed_state" => "revision = 0 AND oldest = 0",
            _ => "false",
        };
        let sql = format!("SELECT EXISTS (SELECT 1 FROM {} WHERE NOT ({pristine}))", table.name);
        let is_used: bool = sqlx::query_scalar(AssertSqlSafe(sql))
            .fetch_one(&mut *target)
            .await
            .map_err(failed)?;
        if is_used {
            return Err(refused(format!(
                "the PostgreSQL database is not empty: {} has rows; nothing was copied",
                table.name
            )));
        }
    }
    target.execute("DELETE FROM feed_state").await.map_err(failed).map(drop)
}

/// Lets numbers that PostgreSQL gives go on after those that were copied.
async fn continue_serials(target: &mut PgConnection) -> Result<(), Fault> {
    for table in ["key_secrets", "audit"] {
        let sql = format!(
            "SELECT setval(pg_get_serial_sequence('{table}', 'serial'), greatest(max(serial), 1), max(serial) IS NOT NULL)
             FROM {table}"
        );
        target.execute(AssertSqlSafe(sql)).await.map_err(failed)?;
    }
    Ok(())
}

fn failed(error: sqlx::Error) -> Fault {
    Fault::Unavailable(error.to_string())
}

fn refused(why: impl Into<String>) -> Fault {
    Fault::Unavailable(why.into())
}

/// How much is sent at once.
const PIECE_BYTES: usize = 256 * 1024;
const ROWS_BETWEEN_REPORTS: u64 = 1_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_escaped_as_copy_and_arrays_want_it() {
        let mut line = String::new();
        escape("a\tb\\c\nd", &mut line);
        assert_eq!(line, r"a\tb\\c\nd");
        assert_eq!(array(&["a:b".into(), "q\"\\".into()]), r#"{"a:b","q\"\\"}"#);
    }

    #[tokio::test]
    async fn no_table_and_no_column_is_left_out() {
        let store = tempfile::tempdir().expect("a directory");
        let url = format!("sqlite://{}", store.path().join("tollgate.db").display());
        sqlite::migrate(&url).await.expect("a database");
        let mut source = sqlite::connect_to_existing(&url).await.expect("a connection");
        let found: Vec<(String, String)> = sqlx::query_as(
            "SELECT t.name, c.name FROM pragma_table_list AS t JOIN pragma_table_info(t.name) AS c
             WHERE t.schema = 'main' AND t.name NOT LIKE 'sqlite_%' AND t.name NOT LIKE '_sqlx_%' ORDER BY t.name, c.name",
        )
        .fetch_all(&mut source)
        .await
        .expect("its columns");
        let mut listed: Vec<(String, String)> = TABLES
            .iter()
            .flat_map(|table| {
                table
                    .columns
                    .iter()
                    .map(|(column, _)| (table.name.to_owned(), (*column).to_owned()))
            })
            .collect();
        listed.sort();
        assert_eq!(listed, found);
    }
}
