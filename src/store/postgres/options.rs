//! The options for connecting to a store.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions, PgSslMode};
use sqlx::{AssertSqlSafe, ConnectOptions, SqlSafeStr};

use super::super::StoreError;
use super::connection::{Connections, Patience, Source};
use super::error::failed;
use super::notify::Hints;
use super::statements::Schema;
use crate::codec::Codec;
use crate::input_file;
use crate::invalid_option::{DAY, InvalidOption, within};
use crate::startup::START_TIMEOUT;

/// Settings for every statement of the store.
///
/// Each statement is written for one index. With these settings the planner uses that index
/// whatever the statistics say, also in a plan made while the table was empty. JIT compilation of
/// such a statement takes longer than its execution.
const PLANS: [(&str, &str); 3] = [("enable_bitmapscan", "off"), ("enable_seqscan", "off"), ("jit", "off")];

/// Time after which the server ends an idle transaction of the store.
///
/// So a machine that was cut off does not hold back the readers of the log.
const IDLE_IN_TRANSACTION: Duration = Duration::from_secs(30);

/// Options for connecting to a [`PostgresStore`](super::PostgresStore). Build them, then
/// [`connect`](Self::connect).
#[derive(Clone)]
pub struct PostgresOptions {
    url: Option<String>,
    pool: Option<PgPool>,
    pub(super) schema: String,
    max_connections: u32,
    application_name: String,
    pub(super) migrate: bool,
    pub(super) index_by_name: bool,
    pub(super) codec: Codec,
    statement_timeout: Duration,
    acquire_timeout: Duration,
    pub(super) connect_timeout: Duration,
    transaction_pooler: bool,
    pub(super) notify: bool,
}

impl fmt::Debug for PostgresOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The URL may contain a password.
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
    /// Describes the store in the schema `storied` of the database in `DATABASE_URL`.
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
            acquire_timeout: Duration::from_secs(10),
            connect_timeout: START_TIMEOUT,
            transaction_pooler: false,
            notify: false,
        }
    }

    /// Sets the URL of the database: `postgres://user:password@host:port/database`.
    ///
    /// The parameters of sqlx apply (`sslmode`, `sslrootcert`, …). `sslrootcert` without `sslmode`,
    /// or with `prefer`, means `verify-ca`, and `sslcert` means `require`: TLS is not optional
    /// then. An empty text means no URL. Default: the environment variable `DATABASE_URL`.
    #[must_use]
    pub fn url(mut self, url: impl Into<String>) -> Self {
        self.url = Some(url.into()).filter(|url| !url.trim().is_empty());
        self
    }

    /// Sets the pool of the application, from which each call borrows a connection.
    ///
    /// The store then opens no connections of its own. The limits and the application name of the
    /// pool apply. Each call is a transaction with this store's timeouts, which costs two more
    /// round trips.
    ///
    /// Default: none.
    #[must_use]
    pub fn pool(mut self, pool: PgPool) -> Self {
        self.pool = Some(pool);
        self
    }

    /// Sets the schema of the tables: lower-case ASCII letters, digits and `_`.
    ///
    /// Several stores can share a database, each in its own schema.
    ///
    /// Default: `storied`.
    #[must_use]
    pub fn schema(mut self, schema: impl Into<String>) -> Self {
        self.schema = schema.into();
        self
    }

    /// Sets the maximum number of connections of the store in total.
    ///
    /// Default: 10. Range: 1 to 10,000.
    #[must_use]
    pub fn max_connections(mut self, connections: u32) -> Self {
        self.max_connections = connections;
        self
    }

    /// Sets the name of the connections in `pg_stat_activity`.
    ///
    /// Default: `storied`. Range: at most 63 bytes, no control characters.
    #[must_use]
    pub fn application_name(mut self, name: impl Into<String>) -> Self {
        self.application_name = name.into();
        self
    }

    /// Sets whether to create and migrate the tables when connecting.
    ///
    /// If not, the login needs no right to do so, and missing tables and tables older than the
    /// program are an error.
    ///
    /// Default: yes.
    #[must_use]
    pub fn migrate(mut self, migrate: bool) -> Self {
        self.migrate = migrate;
        self
    }

    /// Sets whether the log must have an index by event name.
    ///
    /// It serves projections and readers of few events among many. They look events up by name
    /// ([`Filter::names`](super::super::Filter::names), up to 16 names) instead of scanning the
    /// log. The index costs about 40 bytes for each event, and appends maintain a third index.
    ///
    /// An existing index is used whatever this option says. A missing one is created with
    /// [`migrate`](Self::migrate). Appends wait meanwhile, for some seconds per million events. For
    /// a log in use, create the index in advance:
    /// `CREATE INDEX CONCURRENTLY events_by_name ON storied.events (name, position)`.
    ///
    /// Default: no.
    #[must_use]
    pub fn index_by_name(mut self, index: bool) -> Self {
        self.index_by_name = index;
        self
    }

    /// Sets the encoding of the payloads.
    ///
    /// The store keeps the codec of its creation and cannot be opened with another.
    ///
    /// Default: CBOR.
    #[must_use]
    pub fn codec(mut self, codec: Codec) -> Self {
        self.codec = codec;
        self
    }

    /// Sets the time after which the server cancels a statement.
    ///
    /// The connection counts as lost 5 s later. With zero there is no limit, and a server that
    /// hangs blocks its callers. Default: 30 s. Range: 0, or 1 ms to 1 day.
    #[must_use]
    pub fn statement_timeout(mut self, timeout: Duration) -> Self {
        self.statement_timeout = timeout;
        self
    }

    /// Sets the maximum wait of a call for a connection.
    ///
    /// A call waits for a free connection, or for a new one while the server is down. The look-up
    /// of an append without an answer may take twice as long. Default: 10 s. Range: 1 ms to 1 day.
    #[must_use]
    pub fn acquire_timeout(mut self, timeout: Duration) -> Self {
        self.acquire_timeout = timeout;
        self
    }

    /// Sets the maximum wait of [`connect`](Self::connect) for a server that is down or starting.
    ///
    /// Each failed attempt is logged. A permanent error, such as a wrong password, ends the wait at
    /// once. Default: 30 s. Maximum: 1 day. Zero means one attempt, with
    /// [`acquire_timeout`](Self::acquire_timeout).
    #[must_use]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// Sets whether connections go through a pooler in transaction mode, such as PgBouncer.
    ///
    /// No statement is prepared under a name, and no parameter is used that a pooler does not pass
    /// on. Each call is an explicit transaction, which costs two to three more round trips.
    ///
    /// Default: no.
    #[must_use]
    pub fn transaction_pooler(mut self, pooler: bool) -> Self {
        self.transaction_pooler = pooler;
        self
    }

    /// Sets whether processes notify each other of appends (LISTEN and NOTIFY).
    ///
    /// They do so at most every 10 ms. Idle readers see an append at once instead of within 100 ms.
    /// It takes one more connection and does not work through a pooler in transaction mode.
    ///
    /// Default: no.
    #[must_use]
    pub fn notify(mut self, notify: bool) -> Self {
        self.notify = notify;
        self
    }

    pub(super) fn validate(&self) -> Result<(), InvalidOption> {
        within("PostgresOptions::max_connections", self.max_connections, 1..=10_000)?;
        let least = Duration::from_millis(1);
        within("PostgresOptions::acquire_timeout", self.acquire_timeout, least..=DAY)?;
        within("PostgresOptions::connect_timeout", self.connect_timeout, Duration::ZERO..=DAY)?;
        if !self.statement_timeout.is_zero() {
            within("PostgresOptions::statement_timeout", self.statement_timeout, least..=DAY)?;
        }
        let name = &self.application_name;
        if name.len() > 63 || name.chars().any(char::is_control) {
            let range = "at most 63 bytes, no control characters";
            return Err(InvalidOption::new("PostgresOptions::application_name", name, range));
        }
        Ok(())
    }

    pub(super) fn hints(&self, schema: &Schema) -> Result<Hints, StoreError> {
        if self.transaction_pooler {
            return Err(StoreError::Invalid {
                reason: "PostgresOptions::notify needs a session of its own, which a transaction pooler does not provide: remove one of the two options".into(),
            });
        }
        let pool = match &self.pool {
            Some(pool) => pool.clone(),
            None => PgPoolOptions::new().max_connections(1).connect_lazy_with(self.connect_options()?),
        };
        Ok(Hints::new(schema, pool))
    }

    pub(super) fn connections(&self) -> Result<Connections, StoreError> {
        let source = match &self.pool {
            Some(pool) => Source::Pool(pool.clone()),
            None => Source::Own(Box::new(self.connect_options()?)),
        };
        let call =
            (!self.statement_timeout.is_zero()).then(|| self.statement_timeout + Duration::from_secs(5));
        let patience = Patience { acquire: self.acquire_timeout, call };
        // Set in the transaction instead of the session, which a pooler shares. A standby rejects
        // READ WRITE.
        let begin = format!(
            "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; SET LOCAL statement_timeout = {}; SET LOCAL idle_in_transaction_session_timeout = {}; {}",
            millis(self.statement_timeout),
            millis(IDLE_IN_TRANSACTION),
            PLANS.map(|(name, value)| format!("SET LOCAL {name} = {value}")).join("; "),
        );
        let begin = AssertSqlSafe(begin).into_sql_str();
        Ok(Connections::new(source, patience, self.transaction_pooler, begin, self.max_connections as usize))
    }

    fn connect_options(&self) -> Result<PgConnectOptions, StoreError> {
        let from_environment = || std::env::var("DATABASE_URL").ok().filter(|url| !url.trim().is_empty());
        let url = self.url.clone().or_else(from_environment).ok_or_else(|| StoreError::Invalid {
            reason: "no database URL; pass one, or set DATABASE_URL".into(),
        })?;
        if let Some(reason) = input_file::postgres_problem(&url) {
            return Err(StoreError::Invalid { reason });
        }
        let options =
            PgConnectOptions::from_str(&url).map_err(|error| failed("reading the database URL", error))?;
        let options = require_tls(options, &url);
        let options = options.application_name(&self.application_name).disable_statement_logging();
        if self.transaction_pooler {
            // PgBouncer rejects start-up parameters that it does not know.
            return Ok(options.extra_float_digits(None).statement_cache_capacity(0));
        }
        let statement = millis(self.statement_timeout);
        let limits = [
            ("statement_timeout", statement),
            ("idle_in_transaction_session_timeout", millis(IDLE_IN_TRANSACTION)),
            // The server process of a client that vanished must not wait for the network: it keeps
            // its low-water lock.
            ("tcp_user_timeout", statement),
        ];
        Ok(options.options(limits).options(PLANS))
    }
}

/// Requires TLS if certificates are configured.
///
/// With `sslmode=prefer`, the default, a server that claims to have no TLS would get the password
/// in clear text.
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

/// Converts a duration for a setting of PostgreSQL, in which 0 means never.
fn millis(time: Duration) -> i32 {
    i32::try_from(time.as_millis()).unwrap_or(i32::MAX)
}
