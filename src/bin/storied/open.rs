//! From the command line to a store.

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
use crate::redact::{self, Given};

/// Which database, and how long to wait for it.
#[derive(Debug, clap::Args)]
pub(crate) struct DatabaseArgs {
    /// The event store: postgres://HOST/DATABASE or sqlite:FILE
    #[arg(long, global = true, env = "DATABASE_URL", hide_env_values = true, value_name = "URL")]
    database_url: Option<String>,

    /// The PostgreSQL schema of storied's tables
    #[arg(long, global = true, env = "STORIED_SCHEMA", default_value = "storied", value_name = "NAME")]
    pub(crate) schema: String,

    /// For a pooler in transaction mode, such as PgBouncer, in front of PostgreSQL
    #[arg(long, global = true)]
    transaction_pooler: bool,

    /// How long to wait for a connection, and for an answer
    #[arg(long, global = true, default_value_t = 10, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
}

impl DatabaseArgs {
    /// What must not be printed.
    pub(crate) fn secrets(&self) -> Vec<Given<'_>> {
        self.database_url.iter().map(|url| Given::Url(url)).collect()
    }

    pub(crate) fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout)
    }

    pub(crate) fn database(&self) -> Result<Database, Failure> {
        let url = self.database_url.as_deref().map(str::trim).filter(|url| !url.is_empty());
        let missing =
            || Failure::Usage("there is no database: pass --database-url, or set DATABASE_URL".into());
        url.ok_or_else(missing)?.parse()
    }

    /// Opens the store as it is.
    pub(crate) async fn store(&self) -> Result<Arc<dyn EventStore>, Failure> {
        let database = self.database()?;
        let opened = self.open(&database, Tables::default()).await;
        opened.map_err(|error| Failure::from(error).about(&database.shown()))
    }

    /// Opens the store; with a codec other than the one it remembers that is an error.
    pub(crate) async fn open(
        &self,
        database: &Database,
        tables: Tables,
    ) -> Result<Arc<dyn EventStore>, StoreError> {
        match (self.open_with(database, tables).await, tables.codec) {
            // The store remembers which one it was made with, and nobody has said one.
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
                Ok(Arc::new(options.connect().await?))
            }
            Database::Sqlite(_) if tables.index_by_name => Err(StoreError::Invalid {
                reason: "only a store in PostgreSQL can have an index by name".into(),
            }),
            Database::Sqlite(path) => {
                let options = SqliteOptions::new(path)
                    .create_if_missing(tables.migrate)
                    .readers(1)
                    .busy_timeout(self.timeout())
                    .codec(codec)
                    .migrate(tables.migrate);
                Ok(Arc::new(options.open().await?))
            }
        }
    }
}

/// What a store is opened with. By default it is left as it is.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Tables {
    /// Whether to make what is missing.
    pub(crate) migrate: bool,
    /// How payloads must be kept; the way that the store remembers unless given.
    pub(crate) codec: Option<Codec>,
    pub(crate) index_by_name: bool,
}

/// Where read models and their checkpoints are.
#[derive(Debug, clap::Args)]
pub(crate) struct ReadModelArgs {
    /// The database of the read model, with its checkpoints [default: that of the event store]
    #[arg(long, env = "STORIED_READ_MODEL_URL", hide_env_values = true, value_name = "URL")]
    read_model_url: Option<String>,

    /// The PostgreSQL schema of its checkpoints [default: that of the event store]
    #[arg(long, value_name = "NAME")]
    read_model_schema: Option<String>,
}

/// A store, and the projections that keep their checkpoints in one place.
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
                let options = PgConnectOptions::from_str(&url)
                    .map_err(|error| {
                        let said = redact::driver(&error.to_string());
                        Failure::Usage(format!("the URL of the read model cannot be read: {said}"))
                    })?
                    .application_name("storied-cli")
                    .disable_statement_logging();
                let pool = PgPoolOptions::new().max_connections(1).acquire_timeout(from.timeout());
                let schema = self.read_model_schema.as_deref().unwrap_or(&from.schema);
                let model = PostgresReadModel::new(pool.connect_lazy_with(options)).schema(schema)?;
                Operator::new(store.clone(), model).await
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

/// A database that was named.
#[derive(Debug)]
pub(crate) enum Database {
    Postgres(String),
    Sqlite(PathBuf),
}

impl Database {
    /// Without secrets.
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
                let path = PathBuf::from(sqlite_file(file));
                if path.is_dir() {
                    let problem = format!("{} is a directory; name a file in it", path.display());
                    return Err(Failure::Usage(problem));
                }
                Ok(Self::Sqlite(path))
            }
            _ => Err(Failure::Usage("the database URL should begin with postgres:// or sqlite:".into())),
        }
    }
}

/// The file that `sqlite:FILE` or `sqlite://FILE` names, as it is written: the library takes a path and decodes nothing either. A
/// `mode` at its end, which programs give to their own pools, means nothing here and is left out.
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
