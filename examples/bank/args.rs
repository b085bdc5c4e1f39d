//! The command line, parsed by hand because it is small.

use std::ffi::OsString;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

pub(crate) const USAGE: &str = "\
Moves money between accounts on several nodes, and checks that none is lost.

Usage: bank [OPTIONS]

  --nodes N      number of processes that run accounts and transfers, 1 to 64 [default: 1; with
                 --bus local, this process]
  --store KIND   memory [default], sqlite or postgres; several processes need sqlite or postgres
  --db PATH      file of --store sqlite [default: bank.db, in the current directory]
  --database-url URL
                 URL of PostgreSQL [default: $DATABASE_URL]; the schema is storied_bank
  --bus BUS      bus of commands and events: local, core or jetstream (NATS) [default: local];
                 several processes need NATS, where commands always travel over NATS Core
  --nats-url URL URL of the NATS server [default: $NATS_URL, or nats://127.0.0.1:4222]
  --namespace NAME
                 prefix of all subjects, for systems that share a NATS server [default: storied-bank]
  --accounts N   number of accounts, 2 to 100000 [default: 100]
  --transfers N  number of transfers, up to 10000000; 0: as many as --seconds allows [default: 1000]
  --seconds N    maximum time in which transfers begin, up to 604800; 0: no limit, --transfers ends it
                 [default: 0]
  --callers N    number of concurrent transfers, 1 to 10000 [default: 32]
  --faults       kills and pauses node processes at random
  --journal FILE writes a line for every transfer: its id, and whether it was committed or refused
  --json         prints the report as one JSON object
  --help         prints this help

A run continues on the accounts of earlier runs in the database.

Exit codes: 0 success, 1 the run failed, 2 the command line is invalid.
";

/// Ranges of the numbers, as the help states them.
const NODES: RangeInclusive<u64> = 1..=64;
const ACCOUNTS: RangeInclusive<u64> = 2..=100_000;
const TRANSFERS: RangeInclusive<u64> = 0..=10_000_000;
const SECONDS: RangeInclusive<u64> = 0..=604_800;
const CALLERS: RangeInclusive<u64> = 1..=10_000;

/// The parsed options.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Args {
    pub(crate) nodes: u64,
    pub(crate) store: StoreKind,
    pub(crate) db: PathBuf,
    pub(crate) database_url: Option<String>,
    pub(crate) bus: Bus,
    pub(crate) nats_url: Option<String>,
    pub(crate) namespace: String,
    pub(crate) accounts: u64,
    pub(crate) transfers: u64,
    pub(crate) seconds: Duration,
    pub(crate) callers: u64,
    pub(crate) faults: bool,
    pub(crate) journal: Option<PathBuf>,
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

/// The bus of commands and events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bus {
    Local,
    Core,
    JetStream,
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
            nodes: 1,
            store: StoreKind::Memory,
            db: "bank.db".into(),
            database_url: None,
            bus: Bus::Local,
            nats_url: None,
            namespace: "storied-bank".into(),
            accounts: 100,
            transfers: 1_000,
            seconds: Duration::ZERO,
            callers: 32,
            faults: false,
            journal: None,
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
                "--nodes" | "--store" | "--db" | "--database-url" | "--bus" | "--nats-url"
                | "--namespace" | "--accounts" | "--transfers" | "--seconds" | "--callers" | "--journal"
                | "--node" => {
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
        if option == "--journal" {
            self.journal = Some(value.into());
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
            "--accounts" => self.accounts = number(ACCOUNTS)?,
            "--transfers" => self.transfers = number(TRANSFERS)?,
            "--seconds" => self.seconds = Duration::from_secs(number(SECONDS)?),
            "--callers" => self.callers = number(CALLERS)?,
            "--store" => {
                self.store = match &*text {
                    "memory" => StoreKind::Memory,
                    "sqlite" => StoreKind::Sqlite,
                    "postgres" => StoreKind::Postgres,
                    _ => return Err(bad(text)),
                }
            }
            "--bus" => {
                self.bus = match &*text {
                    "local" => Bus::Local,
                    "core" => Bus::Core,
                    "jetstream" => Bus::JetStream,
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
                self.nodes > 1 && self.bus == Bus::Local,
                "several processes need --bus core or --bus jetstream",
            ),
            (
                self.bus != Bus::Local && self.store == StoreKind::Memory,
                "several processes cannot share --store memory",
            ),
            (self.faults && self.bus == Bus::Local, "--faults needs other processes to kill and pause"),
            (self.transfers == 0 && self.seconds.is_zero(), "--transfers, --seconds or both must be above 0"),
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
        let bus = match self.bus {
            Bus::Local => "local",
            Bus::Core => "core",
            Bus::JetStream => "jetstream",
        };
        let mut args: Vec<OsString> =
            ["--node", name, "--store", store, "--bus", bus, "--namespace", &self.namespace, "--db"]
                .map(Into::into)
                .into();
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
