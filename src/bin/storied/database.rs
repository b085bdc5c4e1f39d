//! Opening a store from the command line.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use sqlx::ConnectOptions;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::sqlite::{SqliteConnectOptions, SqlitePoolOptions};
use storied::projection::{Operator, PostgresReadModel, SqliteReadModel};
use storied::{Codec, EventStore, PostgresOptions, SqliteOptions, StoreError};

use crate::failure::Failure;
use crate::input_file;
use crate::redact::{self, Given};
use crate::wait::{Server, with_notice};

/// The database, and the time limit of its connections.
#[derive(Debug, clap::Args)]
pub(crate) struct DatabaseArgs {
    /// Event store: postgres://HOST/DATABASE or sqlite:FILE
    #[arg(long, global = true, env = "DATABASE_URL", hide_env_values = true, value_name = "URL")]
    database_url: Option<String>,

    /// PostgreSQL schema of storied's tables
    #[arg(long, global = true, env = "STORIED_SCHEMA", default_value = "storied", value_name = "NAME")]
    pub(crate) schema: String,

    /// Supports a pooler in transaction mode, such as PgBouncer, in front of PostgreSQL
    #[arg(long, global = true)]
    transaction_pooler: bool,

    /// Time limit of a connection, and of an answer, 1 to 86400
    #[arg(long, global = true, default_value_t = 10, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
}

impl DatabaseArgs {
    /// Returns the secrets that must not be printed.
    pub(crate) fn secrets(&self) -> Vec<Given<'_>> {
        self.database_url.iter().map(|url| Given::Url(url)).collect()
    }

    pub(crate) fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout)
    }

    pub(crate) fn database(&self) -> Result<Database, Failure> {
        let url = self.database_url.as_deref().map(str::trim).filter(|url| !url.is_empty());
        let missing = || Failure::Usage("no database: pass --database-url, or set DATABASE_URL".into());
        url.ok_or_else(missing)?.parse()
    }

    /// Opens the store without changing its schema.
    pub(crate) async fn store(&self) -> Result<Arc<dyn EventStore>, Failure> {
        let database = self.database()?;
        let opened = self.open(&database, Tables::default()).await;
        opened.map_err(|error| Failure::from(error).about(&database.shown()))
    }

    /// Opens the store; a codec other than the recorded one is an error.
    pub(crate) async fn open(
        &self,
        database: &Database,
        tables: Tables,
    ) -> Result<Arc<dyn EventStore>, StoreError> {
        match (self.open_with(database, tables).await, tables.codec) {
            // The store has the other codec, and the command line names none.
            (Err(first @ StoreError::Incompatible { .. }), None) => {
                let json = Tables { codec: Some(Codec::Json), ..tables };
                self.open_with(database, json).await.map_err(|_| first)
            }
            (opened, _) => opened,
        }
    }

    async fn open_with(
        &self,
        database: &Database,
        tables: Tables,
    ) -> Result<Arc<dyn EventStore>, StoreError> {
        let codec = tables.codec.unwrap_or_default();
        match database {
            Database::Postgres(url) => {
                let options = PostgresOptions::new()
                    .url(url)
                    .schema(&self.schema)
                    .application_name("storied-cli")
                    .max_connections(2)
                    .acquire_timeout(self.timeout())
                    .connect_timeout(self.timeout())
                    .transaction_pooler(self.transaction_pooler)
                    .codec(codec)
                    .migrate(tables.migrate)
                    .index_by_name(tables.index_by_name);
                let connected = with_notice(Server::postgres(url), self.timeout(), options.connect());
                Ok(Arc::new(connected.await?))
            }
            Database::Sqlite(_) if tables.index_by_name => {
                Err(StoreError::Invalid { reason: "an index by name needs a PostgreSQL store".into() })
            }
            Database::Sqlite(path) => {
                let options = SqliteOptions::new(path)
                    .create_if_missing(tables.migrate)
                    .busy_timeout(self.timeout())
                    .codec(codec)
                    .migrate(tables.migrate);
                Ok(Arc::new(options.open().await?))
            }
        }
    }
}

/// Options of opening a store. Default: change nothing.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Tables {
    /// Creates missing tables.
    pub(crate) migrate: bool,
    /// Required codec of the payloads; default: the recorded one.
    pub(crate) codec: Option<Codec>,
    pub(crate) index_by_name: bool,
}

/// The location of read models and their checkpoints.
#[derive(Debug, clap::Args)]
pub(crate) struct ReadModelArgs {
    /// Database of the read model and its checkpoints [default: that of the event store]
    #[arg(long, env = "STORIED_READ_MODEL_URL", hide_env_values = true, value_name = "URL")]
    read_model_url: Option<String>,

    /// PostgreSQL schema of its checkpoints [default: that of the event store]
    #[arg(long, value_name = "NAME")]
    read_model_schema: Option<String>,
}

/// A store, and the projections with checkpoints in one database.
pub(crate) struct Models {
    pub(crate) store: Arc<dyn EventStore>,
    pub(crate) operator: Operator,
}

impl ReadModelArgs {
    pub(crate) fn secret(&self) -> Option<Given<'_>> {
        self.read_model_url.as_deref().map(Given::Url)
    }

    pub(crate) async fn open(&self, from: &DatabaseArgs) -> Result<Models, Failure> {
        let store = from.store().await?;
        let url = self.read_model_url.as_deref().map(str::trim).filter(|url| !url.is_empty());
        let database = match url {
            Some(url) => url.parse()?,
            None => from.database()?,
        };
        let shown = database.shown();
        let operator = match database {
            Database::Postgres(url) => {
                if let Some(problem) = input_file::postgres_problem(&url) {
                    return Err(Failure::Usage(problem).about(&shown));
                }
                let options = PgConnectOptions::from_str(&url)
                    .map_err(|error| {
                        let message = redact::driver(&error.to_string());
                        Failure::Usage(format!("invalid URL of the read model: {message}"))
                    })?
                    .application_name("storied-cli")
                    .disable_statement_logging();
                let pool = PgPoolOptions::new().max_connections(1).acquire_timeout(from.timeout());
                let server = Server::postgres(&url);
                let schema = self.read_model_schema.as_deref().unwrap_or(&from.schema);
                let model = PostgresReadModel::new(pool.connect_lazy_with(options)).schema(schema)?;
                with_notice(server, from.timeout(), Operator::new(store.clone(), model)).await
            }
            Database::Sqlite(path) => {
                let options = SqliteConnectOptions::new()
                    .filename(path)
                    .busy_timeout(from.timeout())
                    .disable_statement_logging();
                let pool = SqlitePoolOptions::new().max_connections(1).acquire_timeout(from.timeout());
                let model = SqliteReadModel::new(pool.connect_lazy_with(options));
                Operator::new(store.clone(), model).await
            }
        };
        let operator = operator.map_err(|error| Failure::from(error).about(&shown))?;
        Ok(Models { store, operator })
    }
}

/// The database of a URL.
#[derive(Debug)]
pub(crate) enum Database {
    Postgres(String),
    Sqlite(PathBuf),
}

impl Database {
    /// Returns the URL without secrets.
    pub(crate) fn shown(&self) -> String {
        match self {
            Self::Postgres(url) => redact::url(url),
            Self::Sqlite(path) => format!("sqlite:{}", path.display()),
        }
    }
}

impl FromStr for Database {
    type Err = Failure;

    fn from_str(url: &str) -> Result<Self, Failure> {
        match url.split_once(':') {
            Some(("postgres" | "postgresql", _)) => Ok(Self::Postgres(url.to_owned())),
            Some(("sqlite", file)) => {
                let name = sqlite_file(file);
                // SQLite reads `file:…` as a URI.
                let directory = if name.starts_with("file:") { "./" } else { "" };
                let path = PathBuf::from(format!("{directory}{name}"));
                if path.is_dir() {
                    let problem = format!("{} is a directory; name a file in it", path.display());
                    return Err(Failure::Usage(problem));
                }
                if path.metadata().is_ok_and(|file| !file.is_file()) {
                    let problem = format!("{} is not a regular file; name a database", path.display());
                    return Err(Failure::Usage(problem));
                }
                Ok(Self::Sqlite(path))
            }
            _ => Err(Failure::Usage("invalid database URL: must begin with postgres:// or sqlite:".into())),
        }
    }
}

/// Returns the file that `sqlite:FILE` or `sqlite://FILE` names, without decoding.
///
/// The library takes a path and does not decode it either. A trailing `mode`, which programs pass
/// to their own pools, has no meaning here and is removed.
fn sqlite_file(file: &str) -> &str {
    let file = file.strip_prefix("//").unwrap_or(file);
    match file.rsplit_once("?mode=") {
        Some((file, "ro" | "rw" | "rwc")) => file,
        _ => file,
    }
}

#[cfg(test)]
mod tests {
    use super::sqlite_file;

    #[test]
    fn a_file_is_named_as_it_is_written() {
        for name in ["a%20b.db", "a b.db", "ä#?.db", "dir/x.db", "/abs/x.db", "a?mode=odd"] {
            assert_eq!(sqlite_file(name), name);
            assert_eq!(sqlite_file(&format!("//{name}")), name);
            assert_eq!(sqlite_file(&format!("{name}?mode=rwc")), name);
        }
    }
}
