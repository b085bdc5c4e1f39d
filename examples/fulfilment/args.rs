//! The command line, parsed by hand because it is small.

use std::ffi::OsString;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use crate::domain::Provider;

pub(crate) const USAGE: &str = "\
Fulfils orders with a process manager, and checks that every effect happened once.

Usage: fulfilment [OPTIONS]

  --nodes N      number of processes that fulfil orders, 0 to 64; 0: this process [default: 0]. They
                 need --store sqlite or postgres, and NATS
  --store KIND   memory [default], sqlite or postgres
  --db PATH      file of --store sqlite [default: fulfilment.db, in the current directory]
  --database-url URL
                 URL of PostgreSQL [default: $DATABASE_URL]; the schema is storied_fulfilment
  --nats-url URL URL of the NATS server [default: $NATS_URL, or nats://127.0.0.1:4222]
  --namespace NAME
                 prefix of all subjects, for systems that share a NATS server
                 [default: storied-fulfilment]
  --orders N     number of orders, up to 1000000; 0: as many as --seconds allows [default: 200]
  --seconds N    maximum time in which orders are placed, up to 604800; 0: no limit, --orders ends it
                 [default: 0]
  --callers N    number of concurrent callers, 1 to 1000 [default: 8]
  --provider P   payment provider: fine [default], slow (up to 3 s for a payment), failing (declines
                 every payment) or flaky (every second attempt fails)
  --payment-timeout N
                 maximum duration of a payment in milliseconds, 1 to 86400000 [default: 900000, which
                 is 15 minutes]
  --faults       kills and pauses node processes at random
  --json         prints the report as one JSON object
  --help         prints this help

A run continues on the stock of earlier runs in the database.

Exit codes: 0 success, 1 the run failed, 2 the command line is invalid.
";

/// Ranges of the numbers, as the help states them.
const NODES: RangeInclusive<u64> = 0..=64;
const ORDERS: RangeInclusive<u64> = 0..=1_000_000;
const SECONDS: RangeInclusive<u64> = 0..=604_800;
const CALLERS: RangeInclusive<u64> = 1..=1_000;
const PAYMENT_TIMEOUT: RangeInclusive<u64> = 1..=86_400_000;

/// The parsed options.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Args {
    pub(crate) nodes: u64,
    pub(crate) store: StoreKind,
    pub(crate) db: PathBuf,
    pub(crate) database_url: Option<String>,
    pub(crate) nats_url: Option<String>,
    pub(crate) namespace: String,
    pub(crate) orders: u64,
    pub(crate) seconds: Duration,
    pub(crate) callers: u64,
    pub(crate) provider: Provider,
    /// Maximum duration of a payment, in milliseconds.
    pub(crate) payment_timeout: u64,
    pub(crate) faults: bool,
    pub(crate) json: bool,
    pub(crate) help: bool,
    /// Name of the node, set in the processes that this program starts.
    pub(crate) node: Option<String>,
}

/// The store of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StoreKind {
    Memory,
    Sqlite,
    Postgres,
}

/// An error of the command line.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UsageError {
    #[error("unknown option {}", .0.display())]
    Unknown(OsString),
    #[error("{0} needs a value")]
    NoValue(String),
    #[error("{option} cannot be {found:?}")]
    BadValue { option: String, found: String },
    #[error("{option} cannot be {found:?}: it is a number from {} to {}", range.start(), range.end())]
    OutOfRange { option: String, found: String, range: RangeInclusive<u64> },
    #[error("{0}")]
    Contradiction(&'static str),
}

impl Args {
    pub(crate) fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Self, UsageError> {
        let mut parsed = Self {
            nodes: 0,
            store: StoreKind::Memory,
            db: "fulfilment.db".into(),
            database_url: None,
            nats_url: None,
            namespace: "storied-fulfilment".into(),
            orders: 200,
            seconds: Duration::ZERO,
            callers: 8,
            provider: Provider::Fine,
            payment_timeout: 900_000,
            faults: false,
            json: false,
            help: false,
            node: None,
        };
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            let Some(option) = arg.to_str() else { return Err(UsageError::Unknown(arg)) };
            match option {
                "--faults" => parsed.faults = true,
                "--json" => parsed.json = true,
                "--help" | "-h" => parsed.help = true,
                "--nodes" | "--store" | "--db" | "--database-url" | "--nats-url" | "--namespace"
                | "--orders" | "--seconds" | "--callers" | "--provider" | "--payment-timeout" | "--node" => {
                    let value = args.next().ok_or_else(|| UsageError::NoValue(option.to_owned()))?;
                    parsed.set(option, value)?;
                }
                _ => return Err(UsageError::Unknown(arg)),
            }
        }
        parsed.check()?;
        Ok(parsed)
    }

    fn set(&mut self, option: &str, value: OsString) -> Result<(), UsageError> {
        if option == "--db" {
            self.db = value.into();
            return Ok(());
        }
        let bad = |found: String| {
            // The error hides a URL, which may contain a password.
            let found = if option.ends_with("-url") { "such a text".to_owned() } else { found };
            UsageError::BadValue { option: option.to_owned(), found }
        };
        let text = value.into_string().map_err(|value| bad(value.to_string_lossy().into_owned()))?;
        let number = |range: RangeInclusive<u64>| {
            let number = text.parse().ok().filter(|number| range.contains(number));
            let (option, found) = (option.to_owned(), text.clone());
            number.ok_or(UsageError::OutOfRange { option, found, range })
        };
        match option {
            "--nodes" => self.nodes = number(NODES)?,
            "--orders" => self.orders = number(ORDERS)?,
            "--seconds" => self.seconds = Duration::from_secs(number(SECONDS)?),
            "--callers" => self.callers = number(CALLERS)?,
            "--payment-timeout" => self.payment_timeout = number(PAYMENT_TIMEOUT)?,
            "--store" => {
                self.store = match &*text {
                    "memory" => StoreKind::Memory,
                    "sqlite" => StoreKind::Sqlite,
                    "postgres" => StoreKind::Postgres,
                    _ => return Err(bad(text)),
                }
            }
            "--provider" => {
                self.provider = match &*text {
                    "fine" => Provider::Fine,
                    "slow" => Provider::Slow,
                    "failing" => Provider::Failing,
                    "flaky" => Provider::Flaky,
                    _ => return Err(bad(text)),
                }
            }
            "--database-url" => self.database_url = Some(text),
            "--nats-url" => self.nats_url = Some(text),
            "--namespace" => self.namespace = text,
            _ => self.node = Some(text),
        }
        Ok(())
    }

    fn check(&self) -> Result<(), UsageError> {
        let wrong = [
            (
                self.nodes > 0 && self.store == StoreKind::Memory,
                "several processes cannot share --store memory",
            ),
            (self.faults && self.nodes == 0, "--faults needs --nodes: other processes to kill and pause"),
            (self.orders == 0 && self.seconds.is_zero(), "--orders, --seconds or both must be above 0"),
        ];
        match wrong.into_iter().find(|(wrong, _)| *wrong && !self.help) {
            Some((_, why)) => Err(UsageError::Contradiction(why)),
            None => Ok(()),
        }
    }

    /// Returns the arguments of a node process.
    pub(crate) fn for_node(&self, name: &str) -> Vec<OsString> {
        let store = match self.store {
            StoreKind::Memory => "memory",
            StoreKind::Sqlite => "sqlite",
            StoreKind::Postgres => "postgres",
        };
        let provider = match self.provider {
            Provider::Fine => "fine",
            Provider::Slow => "slow",
            Provider::Failing => "failing",
            Provider::Flaky => "flaky",
        };
        let options = [
            "--node",
            name,
            "--store",
            store,
            "--provider",
            provider,
            "--namespace",
            &self.namespace,
            "--db",
        ];
        let mut args: Vec<OsString> = options.map(Into::into).into();
        args.push(self.db.clone().into());
        let urls = [("--database-url", &self.database_url), ("--nats-url", &self.nats_url)];
        for (option, url) in urls {
            if let Some(url) = url {
                args.extend([option.into(), url.into()]);
            }
        }
        args
    }
}
