//! The command line, by hand: there is too little of it for a library.

use std::ffi::OsString;
use std::path::PathBuf;

pub(crate) const USAGE: &str = "\
Replays the invoices of a real business through storied, and reports what they came to.

Usage: retail [OPTIONS]

  --db PATH      the event store, created if need be [default: retail.db, in the current directory];
                 the read models of shop.db are in shop-read.db beside it
  --store KIND   sqlite [default], or postgres: then the log is in PostgreSQL (schema storied_retail) and the
                 read models beside it (schema retail), in partitions
  --database-url URL
                 which PostgreSQL [default: the environment's DATABASE_URL]
  --input FILE   the invoice lines [default: online-retail-10k.csv, beside the source of this example]
  --bus BUS      what carries events to the read models: local, core or jetstream (NATS) [default: local]
  --nats-url URL the NATS server [default: $NATS_URL, or nats://127.0.0.1:4222]
  --nodes N      with --store postgres: N processes share the read models; kill any of them [default: 1]
  --reset        deletes the log and the read models first, and with --bus jetstream the old mirror
  --json         prints the report as one JSON object
  --help         prints this

Run it again on the same database and it changes nothing; kill it at any moment and run it again, and it goes on.
";

/// What was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Args {
    pub(crate) db: PathBuf,
    pub(crate) store: StoreKind,
    pub(crate) database_url: Option<String>,
    pub(crate) input: PathBuf,
    pub(crate) bus: Bus,
    pub(crate) nats_url: Option<String>,
    /// How many processes share the read models.
    pub(crate) nodes: u16,
    /// Whether this is one of those that the first one has started.
    pub(crate) node: bool,
    pub(crate) reset: bool,
    pub(crate) json: bool,
    pub(crate) help: bool,
}

/// What carries events to the read models.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bus {
    Local,
    Core,
    JetStream,
}

/// Where the log is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StoreKind {
    Sqlite,
    Postgres,
}

/// What is wrong with the command line.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UsageError {
    #[error("there is no option {}", .0.display())]
    Unknown(OsString),
    #[error("{0} needs a value")]
    NoValue(&'static str),
    #[error("--nodes needs --store postgres")]
    OneNode,
    #[error("{option} cannot be {}", found.display())]
    BadValue { option: &'static str, found: OsString },
}

impl Args {
    pub(crate) fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Self, UsageError> {
        let mut parsed = Self {
            db: "retail.db".into(),
            store: StoreKind::Sqlite,
            database_url: None,
            input: concat!(env!("CARGO_MANIFEST_DIR"), "/examples/retail/online-retail-10k.csv").into(),
            bus: Bus::Local,
            nats_url: None,
            nodes: 1,
            node: false,
            reset: false,
            json: false,
            help: false,
        };
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            let mut value = |option| args.next().ok_or(UsageError::NoValue(option));
            match arg.to_str() {
                Some("--db") => parsed.db = value("--db")?.into(),
                Some("--store") => {
                    let found = value("--store")?;
                    parsed.store = match found.to_str() {
                        Some("sqlite") => StoreKind::Sqlite,
                        Some("postgres") => StoreKind::Postgres,
                        _ => return Err(UsageError::BadValue { option: "--store", found }),
                    };
                }
                Some("--database-url") => {
                    let url = value("--database-url")?.into_string();
                    // Not shown: it may hold a password.
                    let option = "--database-url";
                    let url = url.map_err(|_| UsageError::BadValue { option, found: "no text".into() })?;
                    parsed.database_url = Some(url);
                }
                Some("--input") => parsed.input = value("--input")?.into(),
                Some("--bus") => {
                    let found = value("--bus")?;
                    parsed.bus = match found.to_str() {
                        Some("local") => Bus::Local,
                        Some("core") => Bus::Core,
                        Some("jetstream") => Bus::JetStream,
                        _ => return Err(UsageError::BadValue { option: "--bus", found }),
                    };
                }
                Some("--nats-url") => {
                    parsed.nats_url = Some(value("--nats-url")?.to_string_lossy().into_owned());
                }
                Some("--nodes") => {
                    let found = value("--nodes")?;
                    let nodes = found.to_str().and_then(|nodes| nodes.parse().ok());
                    let nodes = nodes.filter(|nodes| (1..=64).contains(nodes));
                    parsed.nodes = nodes.ok_or(UsageError::BadValue { option: "--nodes", found })?;
                }
                // Only from `nodes.rs`.
                Some("--node") => parsed.node = true,
                Some("--reset") => parsed.reset = true,
                Some("--json") => parsed.json = true,
                Some("--help" | "-h") => parsed.help = true,
                _ => return Err(UsageError::Unknown(arg)),
            }
        }
        if parsed.nodes > 1 && parsed.store == StoreKind::Sqlite {
            return Err(UsageError::OneNode);
        }
        Ok(parsed)
    }

    /// The file of the read models: `shop.db` has `shop-read.db` beside it.
    pub(crate) fn read_models(&self) -> PathBuf {
        let mut name = self.db.file_stem().unwrap_or_default().to_owned();
        name.push("-read.db");
        self.db.with_file_name(name)
    }
}
