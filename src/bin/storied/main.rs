//! `storied`: looks at an event store and its projections, and acts on them, without knowing anybody's event types.
//!
//! Everything goes through what is stored and through the library's own ports; see `docs/cli.md`.

mod connect;
mod decode;
mod failure;
mod filter;
mod log;
mod migrate;
mod nats;
mod open;
mod output;
mod parked;
mod projection;
mod publisher;
mod redact;
mod status;
mod store;
mod stream;
mod verify;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use self::failure::Failure;
use self::open::DatabaseArgs;
use self::output::Output;

const EXIT_CODES: &str = "Exit codes:
  0  done, and nothing is wrong
  1  a problem was found: something does not decode, has a hole or differs, or a node refused
  2  the command line is wrong
  3  the database or NATS cannot be reached, or did not answer in time
  4  the database or NATS refuses, or is not as needed: login, rights, tables, a name that is not there
  5  an order stands, and no live node has taken it in time, or it does not get on
  6  standard output cannot be written, as on a full disk

Passwords belong into DATABASE_URL, NATS_URL or files: others on the machine can read a command line.";

/// Looks at an event store and its projections, and acts on them.
#[derive(Debug, Parser)]
#[command(name = "storied", version, after_help = EXIT_CODES)]
struct Cli {
    #[command(flatten)]
    database: DatabaseArgs,

    /// Prints JSON for programs; events one on a line
    #[arg(long, global = true)]
    json: bool,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Creates storied's tables, or brings them up to date
    Migrate(migrate::Args),
    /// Tells how the store, its publisher, projections and nodes are doing
    Status(open::ReadModelArgs),
    /// Reads the log
    #[command(subcommand)]
    Log(log::Command),
    /// Reads one stream
    #[command(subcommand)]
    Stream(stream::Command),
    /// Looks at projections, and tells them what to do
    #[command(subcommand)]
    Projection(projection::Command),
    /// Looks at the events that projections have put aside, and settles them
    #[command(subcommand)]
    Parked(parked::Command),
    /// Looks at the publisher
    #[command(subcommand)]
    Publisher(publisher::Command),
    /// Acts on the store itself
    #[command(subcommand)]
    Store(store::Command),
    /// Looks at NATS
    #[command(subcommand)]
    Nats(nats::Command),
    /// Walks the whole log: versions without holes, everything decodes, and the mirror is equal
    Verify(verify::Args),
    /// Prints a script that completes this tool's commands in a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

impl Cli {
    /// What must not be printed.
    fn secrets(&self) -> Vec<redact::Given<'_>> {
        let read_model = match &self.command {
            Command::Status(args) => Some(args),
            Command::Projection(command) => Some(command.read_model()),
            Command::Parked(command) => Some(command.read_model()),
            _ => None,
        };
        let nats = match &self.command {
            Command::Nats(command) => Some(command.nats()),
            Command::Verify(args) => Some(args.nats()),
            _ => None,
        };
        let mut secrets = self.database.secrets();
        secrets.extend(nats.into_iter().flat_map(connect::NatsArgs::secrets));
        secrets.extend(read_model.and_then(open::ReadModelArgs::secret));
        secrets
    }
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let json = cli.json;
    redact::set(redact::Secrets::of(&cli.secrets()));
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.tell(json),
    }
}

/// What clap has to say. It repeats what was typed, in which there may be a URL.
fn usage(error: &clap::Error) -> ExitCode {
    let text = redact::urls(&error.to_string());
    if error.use_stderr() {
        output::complain(&text);
        return ExitCode::from(failure::USAGE);
    }
    match Output::new(false).text(&text) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.tell(false),
    }
}

fn run(cli: Cli) -> Result<(), Failure> {
    let mut out = Output::new(cli.json);
    if let Command::Completions { shell } = cli.command {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut Cli::command(), "storied", &mut script);
        return out.text(&String::from_utf8_lossy(&script));
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::Unavailable(format!("the runtime cannot be started: {error}")))?;
    runtime.block_on(async {
        let database = &cli.database;
        match cli.command {
            Command::Migrate(args) => migrate::run(&args, database, &mut out).await,
            Command::Status(read_model) => status::run(&read_model, database, &mut out).await,
            Command::Log(command) => log::run(command, database, &mut out).await,
            Command::Stream(command) => stream::run(command, database, &mut out).await,
            Command::Projection(command) => projection::run(command, database, &mut out).await,
            Command::Parked(command) => parked::run(command, database, &mut out).await,
            Command::Publisher(command) => publisher::run(command, database, &mut out).await,
            Command::Store(command) => store::run(command, database, &mut out).await,
            Command::Nats(command) => nats::run(command, database, &mut out).await,
            Command::Verify(args) => verify::run(args, database, &mut out).await,
            Command::Completions { .. } => Ok(()),
        }?;
        out.flush()
    })
}
