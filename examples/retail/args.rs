//! The command line, parsed by hand because it is small.

use std::ffi::OsString;
use std::path::PathBuf;

pub(crate) const USAGE: &str = "\
Replays the invoices of a real business through storied, and reports the totals.

Usage: retail [OPTIONS]

  --db PATH      event store, created if missing [default: retail.db, in the current directory];
                 the read models of shop.db are in shop-read.db beside it
  --store KIND   sqlite [default], or postgres: then the log is in PostgreSQL (schema storied_retail) and the
                 read models in the same database (schema retail), in partitions
  --database-url URL
                 URL of PostgreSQL [default: $DATABASE_URL]
  --input FILE   invoice lines, a regular file [default: online-retail-10k.csv, next to the source of this example]
  --bus BUS      bus of the events for the read models: local, core or jetstream (NATS) [default: local]
  --nats-url URL URL of the NATS server [default: $NATS_URL, or nats://127.0.0.1:4222]
  --nodes N      with --store postgres: N processes, 1 to 64, share the read models; kill any of them
                 [default: 1]
  --reset        deletes the log and the read models first, and with --bus jetstream the old log stream
  --json         prints the report as one JSON object
  --help         prints this help

A second run on the same database changes nothing. After a kill at any moment, the next run continues.

Exit codes: 0 success, 1 the run failed, 2 the command line is invalid.
";

/// The parsed options.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Args {
    pub(crate) db: PathBuf,
    pub(crate) store: StoreKind,
    pub(crate) database_url: Option<String>,
    pub(crate) input: PathBuf,
    pub(crate) bus: Bus,
    pub(crate) nats_url: Option<String>,
    /// Number of processes that share the read models.
    pub(crate) nodes: u16,
    /// Set in the processes that the first one starts.
    pub(crate) node: bool,
    pub(crate) reset: bool,
    pub(crate) json: bool,
    pub(crate) help: bool,
}

/// The bus of the events for the read models.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bus {
    Local,
    Core,
    JetStream,
}

/// The store of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StoreKind {
    Sqlite,
    Postgres,
}

/// An error of the command line.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UsageError {
    #[error("unknown option {}", .0.display())]
    Unknown(OsString),
    #[error("{0} needs a value")]
    NoValue(&'static str),
    #[error("--nodes needs --store postgres")]
    OneNode,
    #[error("--nodes cannot be {}: it is a number from 1 to 64", .0.display())]
    Nodes(OsString),
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
                    // The error hides the value, which may contain a password.
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
                    parsed.nodes = nodes.ok_or(UsageError::Nodes(found))?;
                }
                // Passed by `nodes.rs` only.
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

    /// Returns the file of the read models: `shop-read.db` for `shop.db`.
    pub(crate) fn read_models(&self) -> PathBuf {
        let mut name = self.db.file_stem().unwrap_or_default().to_owned();
        name.push("-read.db");
        self.db.with_file_name(name)
    }
}
