//! How a store is connected to.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions, PgSslMode};
use sqlx::{AssertSqlSafe, ConnectOptions, SqlSafeStr};

use super::super::{StoreError, StoreInfo};
use super::connection::{Connections, Patience, Source};
use super::error::failed;
use super::notify::Hints;
use super::sql::Schema;
use super::{PostgresStore, schema};
use crate::codec::Codec;
use crate::invalid_option::{DAY, InvalidOption, within};
use crate::startup::{self, START_TIMEOUT};

/// Settings for every statement of the store. Each statement is written so that one index fits it; with these settings the
/// planner takes that index whatever the statistics say, also for a plan that was made while the table was empty. Compiling such a
/// statement takes longer than running it.
const PLANS: [(&str, &str); 3] = [("enable_bitmapscan", "off"), ("enable_seqscan", "off"), ("jit", "off")];

/// How a [`PostgresStore`] is connected to. Build it, then [`connect`](Self::connect).
#[derive(Clone)]
pub struct PostgresOptions {
    url: Option<String>,
    pool: Option<PgPool>,
    schema: String,
    max_connections: u32,
    application_name: String,
    migrate: bool,
    index_by_name: bool,
    codec: Codec,
    statement_timeout: Duration,
    idle_in_transaction_timeout: Duration,
    acquire_timeout: Duration,
    connect_timeout: Duration,
    transaction_pooler: bool,
    append_concurrency: usize,
    notify: bool,
}

impl fmt::Debug for PostgresOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The URL may hold a password.
        f.debug_struct("PostgresOptions")
            .field("schema", &self.schema)
            .field("max_connections", &self.max_connections)
            .field("application_name", &self.application_name)
            .finish_non_exhaustive()
    }
}

impl Default for PostgresOptions {
    fn default() -> Self {
        Self::new()
    }
}

impl PostgresOptions {
    /// The store in the database that the environment variable `DATABASE_URL` names, in the schema `storied`.
    pub fn new() -> Self {
        Self {
            url: None,
            pool: None,
            schema: Schema::DEFAULT.into(),
            max_connections: 10,
            application_name: "storied".into(),
            migrate: true,
            index_by_name: false,
            codec: Codec::default(),
            statement_timeout: Duration::from_secs(30),
            idle_in_transaction_timeout: Duration::from_secs(30),
            acquire_timeout: Duration::from_secs(10),
            connect_timeout: START_TIMEOUT,
            transaction_pooler: false,
            append_concurrency: 2,
            notify: false,
        }
    }

    /// The database: `postgres://user:password@host:port/database`, with the parameters that sqlx knows (`sslmode`,
    /// `sslrootcert`, …). `sslrootcert` without `sslmode`, or with `prefer`, is `verify-ca`, and `sslcert` is `require`: TLS is
    /// not optional then. An empty text is the same as none. Default: the environment's `DATABASE_URL`.
    #[must_use]
    pub fn url(mut self, url: impl Into<String>) -> Self {
        self.url = Some(url.into()).filter(|url| !url.trim().is_empty());
        self
    }

    /// Borrows connections from the application's own pool, one for each call, instead of making some. The pool's limits and
    /// names then apply. Each call is a transaction with this store's timeouts, which costs two round trips more. Default: none.
    #[must_use]
    pub fn pool(mut self, pool: PgPool) -> Self {
        self.pool = Some(pool);
        self
    }

    /// The schema of storied's tables: lower-case ASCII letters, digits and `_`. Several stores can live in one database,
    /// each in its own. Default: `storied`.
    #[must_use]
    pub fn schema(mut self, schema: impl Into<String>) -> Self {
        self.schema = schema.into();
        self
    }

    /// How many connections the store has at most, for everything together. Default: 10. Range: 1 to 10,000.
    #[must_use]
    pub fn max_connections(mut self, connections: u32) -> Self {
        self.max_connections = connections;
        self
    }

    /// What the connections are called in `pg_stat_activity`. Default: `storied`. Range: at most 63 bytes, no control
    /// characters.
    #[must_use]
    pub fn application_name(mut self, name: impl Into<String>) -> Self {
        self.application_name = name.into();
        self
    }

    /// Whether to create and migrate the tables when connecting. If not, the login needs no right to do so, and tables that
    /// are missing or older than the program are an error. Default: yes.
    #[must_use]
    pub fn migrate(mut self, migrate: bool) -> Self {
        self.migrate = migrate;
        self
    }

    /// Whether there must be an index of the log by event name, for projections and readers of few events among many: they
    /// look up what they ask for by name ([`Filter::names`](super::super::Filter::names), up to 16 of them) instead of looking through the log. It
    /// costs some 40 bytes an event, and appends have a third index to keep.
    ///
    /// An index that is there is used, whatever this says. If not, this makes it, together with [`migrate`](Self::migrate)'s
    /// tables; appends wait meanwhile, for some seconds with every million events. For a log in use, make it beforehand:
    /// `CREATE INDEX CONCURRENTLY events_by_name ON storied.events (name, position)`. Default: no.
    #[must_use]
    pub fn index_by_name(mut self, index: bool) -> Self {
        self.index_by_name = index;
        self
    }

    /// How payloads are kept. A store remembers it from its creation on, and is opened with nothing else. Default: CBOR.
    #[must_use]
    pub fn codec(mut self, codec: Codec) -> Self {
        self.codec = codec;
        self
    }

    /// After how long the server cancels a statement of ours; 5 seconds later the connection counts as lost. Zero: never,
    /// and then a server that hangs makes callers hang. Default: 30 s. Range: 0, or 1 ms to 1 day.
    #[must_use]
    pub fn statement_timeout(mut self, timeout: Duration) -> Self {
        self.statement_timeout = timeout;
        self
    }

    /// After how long the server ends a transaction of ours that nobody continues, so that a machine which was cut off does
    /// not hold back the readers of the log. Zero: never. Default: 30 s. Range: 0, or 1 ms to 1 day.
    #[must_use]
    pub fn idle_in_transaction_timeout(mut self, timeout: Duration) -> Self {
        self.idle_in_transaction_timeout = timeout;
        self
    }

    /// How long a call waits for a connection: a free one, or a new one while the server cannot be reached. Finding out
    /// what became of an append without an answer may take twice as long. Default: 10 s. Range: 1 ms to 1 day.
    #[must_use]
    pub fn acquire_timeout(mut self, timeout: Duration) -> Self {
        self.acquire_timeout = timeout;
        self
    }

    /// How long [`connect`](Self::connect) waits for a server that cannot be reached or is starting. Each attempt that fails is a log
    /// line; an error that lasts, as a wrong password, ends it at once. Default: 30 s. Range: at most
    /// 1 day; zero is one attempt, with [`acquire_timeout`](Self::acquire_timeout).
    #[must_use]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// Works through a pooler in transaction mode, such as PgBouncer: no statement is prepared under a name, nothing is
    /// asked for that a pooler does not pass on, and each call is an explicit transaction, which costs two to three round
    /// trips more. Default: no.
    #[must_use]
    pub fn transaction_pooler(mut self, pooler: bool) -> Self {
        self.transaction_pooler = pooler;
        self
    }

    /// How many transactions of appends the runtime keeps in flight. Default: 2. Range: 1 to 1,000.
    #[must_use]
    pub fn append_concurrency(mut self, appends: usize) -> Self {
        self.append_concurrency = appends;
        self
    }

    /// Whether processes that use the same store hint to each other (LISTEN and NOTIFY) when they have appended, at most
    /// every 10 ms, so that idle followers see it at once instead of within 100 ms. Takes one connection more, and is not
    /// possible through a pooler in transaction mode. Default: no.
    #[must_use]
    pub fn notify(mut self, notify: bool) -> Self {
        self.notify = notify;
        self
    }

    /// Connects, creates or migrates the tables if need be, and checks everything that the log rests on. Any number of
    /// processes may do so at once. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// `Invalid` for a URL or schema that cannot be one, or an option out of its range; `Incompatible` when the login, the server's version or settings,
    /// the tables, the sequence or the codec are not as needed, each with what to do; `Storage` when rights are missing;
    /// `Unavailable` when the server cannot be reached within [`connect_timeout`](Self::connect_timeout).
    pub async fn connect(self) -> Result<PostgresStore, StoreError> {
        self.validate()?;
        let schema = Schema::new(&self.schema)?;
        let connections = Arc::new(self.connections()?);
        let hints = if self.notify { Some(self.hints(&schema)?) } else { None };
        let Self { codec, migrate, index_by_name, connect_timeout, .. } = self;
        let prepare = || schema::prepare(&connections, &schema, codec, migrate, index_by_name);
        let prepared = startup::wait_for("connecting to PostgreSQL", connect_timeout, prepare).await?;
        let indexed = prepared.indexed_by_name;
        let info = StoreInfo::new("postgres", prepared.id, codec)
            .with_append_concurrency(self.append_concurrency)
            .with_adoption(prepared.adoption);
        let open = || PostgresStore::open(info.clone(), indexed, &schema, connections.clone(), hints.clone());
        startup::wait_for("reading how far the log goes", connect_timeout, open).await
    }

    fn validate(&self) -> Result<(), InvalidOption> {
        within("PostgresOptions::max_connections", self.max_connections, 1..=10_000)?;
        within("PostgresOptions::append_concurrency", self.append_concurrency, 1..=1_000)?;
        let least = Duration::from_millis(1);
        within("PostgresOptions::acquire_timeout", self.acquire_timeout, least..=DAY)?;
        within("PostgresOptions::connect_timeout", self.connect_timeout, Duration::ZERO..=DAY)?;
        let limits = [
            ("PostgresOptions::statement_timeout", self.statement_timeout),
            ("PostgresOptions::idle_in_transaction_timeout", self.idle_in_transaction_timeout),
        ];
        for (option, limit) in limits {
            if !limit.is_zero() {
                within(option, limit, least..=DAY)?;
            }
        }
        let name = &self.application_name;
        if name.len() > 63 || name.chars().any(char::is_control) {
            let range = "at most 63 bytes, no control characters";
            return Err(InvalidOption::new("PostgresOptions::application_name", name, range));
        }
        Ok(())
    }

    fn hints(&self, schema: &Schema) -> Result<Hints, StoreError> {
        if self.transaction_pooler {
            return Err(StoreError::Invalid {
                reason: "PostgresOptions::notify needs a session of its own, which a transaction pooler does not give: leave one of the two options out".into(),
            });
        }
        let pool = match &self.pool {
            Some(pool) => pool.clone(),
            None => PgPoolOptions::new().max_connections(1).connect_lazy_with(self.connect_options()?),
        };
        Ok(Hints::new(schema, pool))
    }

    fn connections(&self) -> Result<Connections, StoreError> {
        let source = match &self.pool {
            Some(pool) => Source::Pool(pool.clone()),
            None => Source::Own(Box::new(self.connect_options()?)),
        };
        let call =
            (!self.statement_timeout.is_zero()).then(|| self.statement_timeout + Duration::from_secs(5));
        let patience = Patience { acquire: self.acquire_timeout, call };
        // With the transaction rather than the session, which behind a pooler is not ours. A standby refuses READ WRITE.
        let begin = format!(
            "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; SET LOCAL statement_timeout = {}; SET LOCAL idle_in_transaction_session_timeout = {}; {}",
            millis(self.statement_timeout),
            millis(self.idle_in_transaction_timeout),
            PLANS.map(|(name, value)| format!("SET LOCAL {name} = {value}")).join("; "),
        );
        let begin = AssertSqlSafe(begin).into_sql_str();
        Ok(Connections::new(source, patience, self.transaction_pooler, begin, self.max_connections as usize))
    }

    fn connect_options(&self) -> Result<PgConnectOptions, StoreError> {
        let from_environment = || std::env::var("DATABASE_URL").ok().filter(|url| !url.trim().is_empty());
        let url = self.url.clone().or_else(from_environment).ok_or_else(|| StoreError::Invalid {
            reason: "there is no database URL: pass one, or set DATABASE_URL".into(),
        })?;
        let options =
            PgConnectOptions::from_str(&url).map_err(|error| failed("reading the database URL", error))?;
        let options = require_tls(options, &url);
        let options = options.application_name(&self.application_name).disable_statement_logging();
        if self.transaction_pooler {
            // PgBouncer refuses start-up parameters that it does not know.
            return Ok(options.extra_float_digits(None).statement_cache_capacity(0));
        }
        let statement = millis(self.statement_timeout);
        let limits = [
            ("statement_timeout", statement),
            ("idle_in_transaction_session_timeout", millis(self.idle_in_transaction_timeout)),
            // A client that has vanished must not keep a process, and its low-water lock, waiting for the network.
            ("tcp_user_timeout", statement),
        ];
        Ok(options.options(limits).options(PLANS))
    }
}

/// Requires TLS where certificates are named: with `sslmode=prefer`, the default, a server that says that it has no TLS would get
/// the password in clear.
fn require_tls(options: PgConnectOptions, url: &str) -> PgConnectOptions {
    let optional = matches!(options.get_ssl_mode(), PgSslMode::Allow | PgSslMode::Prefer);
    let query = url.split_once('?').map_or("", |(_, query)| query);
    let names = |keys: &[&str], variable: &str| {
        let keys_of = |parameter: &str| parameter.split('=').next().is_some_and(|key| keys.contains(&key));
        query.split('&').any(keys_of) || std::env::var_os(variable).is_some()
    };
    if optional && names(&["sslrootcert", "ssl-root-cert", "ssl-ca"], "PGSSLROOTCERT") {
        options.ssl_mode(PgSslMode::VerifyCa)
    } else if optional && names(&["sslcert", "ssl-cert"], "PGSSLCERT") {
        options.ssl_mode(PgSslMode::Require)
    } else {
        options
    }
}

/// For a setting of PostgreSQL, where 0 is never.
fn millis(time: Duration) -> i32 {
    i32::try_from(time.as_millis()).unwrap_or(i32::MAX)
}
