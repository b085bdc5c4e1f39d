//! The command line, by hand: there is too little of it for a library.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

pub(crate) const USAGE: &str = "\
Moves money between accounts on several nodes, and reports whether all of it is still there.

Usage: bank [OPTIONS]

  --nodes N      how many processes keep accounts and make transfers [default: 1, which with --bus local is
                 this process itself]
  --store KIND   memory [default], sqlite or postgres; several processes cannot share a memory
  --db PATH      the file of --store sqlite [default: bank.db, in the current directory]
  --database-url URL
                 which PostgreSQL [default: the environment's DATABASE_URL]; the schema is storied_bank
  --bus BUS      what carries commands and events: local, core or jetstream (NATS) [default: local];
                 several processes need NATS, where commands always travel over NATS Core
  --nats-url URL the NATS server [default: $NATS_URL, or nats://127.0.0.1:4222]
  --namespace NAME
                 what subjects begin with, for systems that share a NATS server [default: storied-bank]
  --accounts N   how many accounts there are [default: 100]
  --transfers N  how many transfers to make; 0: as many as there is time for [default: 1000]
  --seconds N    how long to begin transfers at most; 0: no limit, --transfers ends it [default: 0]
  --callers N    how many transfers are under way at a time [default: 32]
  --faults       kills and pauses node processes at random meanwhile
  --journal FILE writes a line for every transfer: its id, and whether it was committed or refused
  --json         prints the report as one JSON object
  --help         prints this

A run adds to what earlier runs left in a database.
";

/// What was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Args {
    pub(crate) nodes: usize,
    pub(crate) store: StoreKind,
    pub(crate) db: PathBuf,
    pub(crate) database_url: Option<String>,
    pub(crate) bus: Bus,
    pub(crate) nats_url: Option<String>,
    pub(crate) namespace: String,
    pub(crate) accounts: u64,
    pub(crate) transfers: u64,
    pub(crate) seconds: Duration,
    pub(crate) callers: usize,
    pub(crate) faults: bool,
    pub(crate) journal: Option<PathBuf>,
    pub(crate) json: bool,
    pub(crate) help: bool,
    /// Set in the processes that this program starts: what the node is called.
    pub(crate) node: Option<String>,
}

/// Where the log is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StoreKind {
    Memory,
    Sqlite,
    Postgres,
}

/// What carries commands and events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bus {
    Local,
    Core,
    JetStream,
}

/// What is wrong with the command line.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UsageError {
    #[error("there is no option {}", .0.display())]
    Unknown(OsString),
    #[error("{0} needs a value")]
    NoValue(String),
    #[error("{option} cannot be {found:?}")]
    BadValue { option: String, found: String },
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
            // A URL is not shown: it may hold a password.
            let found = if option.ends_with("-url") { "such a text".to_owned() } else { found };
            UsageError::BadValue { option: option.to_owned(), found }
        };
        let text = value.into_string().map_err(|value| bad(value.to_string_lossy().into_owned()))?;
        let number = |text: &str| text.parse::<u64>().map_err(|_| bad(text.to_owned()));
        let count = |text: &str| usize::try_from(number(text)?).map_err(|_| bad(text.to_owned()));
        match option {
            "--nodes" => self.nodes = count(&text)?,
            "--accounts" => self.accounts = number(&text)?,
            "--transfers" => self.transfers = number(&text)?,
            "--seconds" => self.seconds = Duration::from_secs(number(&text)?),
            "--callers" => self.callers = count(&text)?,
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
            (self.nodes == 0, "nobody would do it without --nodes"),
            (
                self.nodes > 1 && self.bus == Bus::Local,
                "several processes need --bus core or --bus jetstream",
            ),
            (
                self.bus != Bus::Local && self.store == StoreKind::Memory,
                "several processes cannot share --store memory",
            ),
            (self.faults && self.bus == Bus::Local, "--faults needs other processes to kill and pause"),
            (self.accounts < 2, "a transfer needs two --accounts"),
            (self.callers == 0, "without --callers nothing happens"),
            (self.transfers == 0 && self.seconds.is_zero(), "say how long: --transfers, --seconds, or both"),
        ];
        match wrong.into_iter().find(|(wrong, _)| *wrong && !self.help) {
            Some((_, why)) => Err(UsageError::Contradiction(why)),
            None => Ok(()),
        }
    }

    /// What a node process is started with.
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
