//! Running the tool, and stores for it.

use std::process::{Output, Stdio};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Executor, PgConnection};
use storied::store::Append;
use storied::{Event, EventStore, ExpectedVersion, Metadata, NewEvent, PostgresStore, SqliteStore, StreamId};
use tempfile::TempDir;
use tokio::process::Command;
use tokio::time::timeout;

use crate::support::PostgresServer;
pub use crate::support::{PATIENCE, eventually_async as eventually};

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OrderEvent {
    Placed { pence: i64, by: String },
    Cancelled,
}

impl Event for OrderEvent {
    const CATEGORY: &'static str = "order";
}

/// Returns the program.
pub fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_storied"));
    for variable in [
        "DATABASE_URL",
        "NATS_URL",
        "STORIED_SCHEMA",
        "NATS_USER",
        "NATS_PASSWORD",
        "NATS_TOKEN",
        "NATS_CREDS",
    ] {
        command.env_remove(variable);
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

/// The output of a run.
pub struct Run {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Run {
    pub fn of(output: Output) -> Self {
        Self {
            code: output.status.code().expect("it ends by itself"),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Expects an exit code.
    #[track_caller]
    pub fn code(self, code: i32) -> Self {
        assert_eq!(self.code, code, "stdout:\n{}\nstderr:\n{}", self.out, self.err);
        self
    }

    /// Expects parts of the standard output.
    #[track_caller]
    pub fn shows(self, parts: &[&str]) -> Self {
        for part in parts {
            assert!(self.out.contains(part), "{part:?} is not in\n{}\nstderr:\n{}", self.out, self.err);
        }
        self
    }

    /// Expects parts of the standard error.
    #[track_caller]
    pub fn complains(self, parts: &[&str]) -> Self {
        for part in parts {
            assert!(self.err.contains(part), "{part:?} is not in\n{}", self.err);
        }
        self
    }

    /// Parses the only JSON document.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {}", self.out))
    }

    /// Parses one JSON document per line.
    #[track_caller]
    pub fn lines(&self) -> Vec<Value> {
        self.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

/// Runs the tool without a database.
pub async fn bare(args: &[&str]) -> Run {
    run(program().args(args)).await
}

pub async fn run(command: &mut Command) -> Run {
    // Not `Command::output` of tokio: it would replace the standard output that a test has chosen.
    let child = command.spawn().unwrap();
    Run::of(timeout(PATIENCE, child.wait_with_output()).await.expect("it ends").unwrap())
}

/// A store of one kind for the tool.
pub struct Fixture {
    pub url: String,
    pub kind: &'static str,
    _dir: TempDir,
}

/// Returns an empty database of each kind.
pub async fn databases() -> Vec<Fixture> {
    let dir = TempDir::new().unwrap();
    let sqlite = format!("sqlite:{}", dir.path().join("events.db").display());
    let postgres = PostgresServer::shared().await.create_database().await;
    vec![
        Fixture { url: sqlite, kind: "sqlite", _dir: dir },
        Fixture { url: postgres, kind: "postgres", _dir: TempDir::new().unwrap() },
    ]
}

/// Returns a store of each kind with five events of three streams.
pub async fn filled() -> Vec<(Fixture, Arc<dyn EventStore>)> {
    let mut filled = Vec::new();
    for fixture in databases().await {
        let store = fixture.open().await;
        fill(&store).await;
        filled.push((fixture, store));
    }
    filled
}

pub async fn fill(store: &Arc<dyn EventStore>) {
    for (stream, events) in
        [("1", vec![placed(100), placed(250)]), ("2", vec![placed(7), OrderEvent::Cancelled])]
    {
        append(store, stream, &events).await;
    }
    append(store, "a/b", &[placed(1)]).await;
}

pub fn placed(pence: i64) -> OrderEvent {
    OrderEvent::Placed { pence, by: "Zoë".into() }
}

pub async fn append(store: &Arc<dyn EventStore>, stream: &str, events: &[OrderEvent]) {
    let mut metadata = Metadata::default();
    metadata.user.insert("tenant".into(), "acme".into());
    let encoded = events.iter().map(|event| NewEvent::encode(event, store.info().codec, &metadata).unwrap());
    append_raw(store, stream, encoded.collect()).await;
}

pub async fn append_raw(store: &Arc<dyn EventStore>, stream: &str, events: Vec<NewEvent>) {
    let stream = StreamId::new("order", stream).unwrap();
    store.append(vec![Append::one(stream, ExpectedVersion::Any, events)]).await.remove(0).unwrap();
}

impl Fixture {
    pub async fn open(&self) -> Arc<dyn EventStore> {
        match self.url.strip_prefix("sqlite:") {
            Some(path) => Arc::new(SqliteStore::open(path).await.unwrap()),
            None => Arc::new(PostgresStore::connect(self.url.as_str()).await.unwrap()),
        }
    }

    /// Copies the database, which must not be open.
    pub async fn copy(&self) -> Self {
        let dir = TempDir::new().unwrap();
        let url = match self.url.strip_prefix("sqlite:") {
            Some(_) => {
                let copy = dir.path().join("events.db");
                self.run_sql(&format!("VACUUM INTO '{}'", copy.display())).await;
                format!("sqlite:{}", copy.display())
            }
            None => crate::cli::adoption::copy_database(&self.url).await,
        };
        Self { url, kind: self.kind, _dir: dir }
    }

    /// Returns the tool with this database.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = program();
        command.env("DATABASE_URL", &self.url).args(args);
        command
    }

    pub async fn run(&self, args: &[&str]) -> Run {
        run(&mut self.command(args)).await
    }

    /// Runs forbidden SQL past every guard, with `{events}` for the table of the log.
    pub async fn tamper(&self, sql: &str) {
        match self.url.strip_prefix("sqlite:") {
            Some(path) => {
                let mut connection = SqliteConnectOptions::new().filename(path).connect().await.unwrap();
                let triggers = "SELECT name FROM sqlite_master WHERE type = 'trigger'";
                let triggers: Vec<String> =
                    sqlx::query_scalar(triggers).fetch_all(&mut connection).await.unwrap();
                for trigger in triggers {
                    connection.execute(AssertSqlSafe(format!("DROP TRIGGER {trigger}"))).await.unwrap();
                }
                connection.execute(AssertSqlSafe(sql.replace("{events}", "storied_events"))).await.unwrap();
                connection.close().await.unwrap();
            }
            None => {
                let mut connection = PgConnection::connect(&self.url).await.unwrap();
                connection.execute("SET session_replication_role = replica").await.unwrap();
                let sql = AssertSqlSafe(sql.replace("{events}", "storied.events"));
                connection.execute(sql).await.unwrap();
            }
        }
    }

    /// Runs SQL on the database.
    pub async fn run_sql(&self, sql: &str) {
        match self.url.strip_prefix("sqlite:") {
            Some(path) => {
                let mut connection = SqliteConnectOptions::new().filename(path).connect().await.unwrap();
                connection.execute(AssertSqlSafe(sql.to_owned())).await.unwrap();
                connection.close().await.unwrap();
            }
            None => {
                let mut connection = PgConnection::connect(&self.url).await.unwrap();
                connection.execute(AssertSqlSafe(sql.to_owned())).await.unwrap();
            }
        }
    }
}
