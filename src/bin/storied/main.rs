//! `storied`: inspects and operates an event store, its projections, processes and schedules, without
//! their types.
//!
//! It uses the stored data and the ports of the library only; see `docs/cli.md`.

#![warn(clippy::too_many_lines)]

mod command;
mod connect;
mod database;
mod decode;
mod failure;
mod filter;
#[path = "../../input_file.rs"]
mod input_file;
mod log;
mod migrate;
mod nats;
mod output;
mod parked;
mod process;
mod projection;
mod publisher;
mod redact;
mod schedule;
mod status;
mod store;
mod stream;
mod terminal;
mod timer;
mod verify;
mod wait;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use self::database::DatabaseArgs;
use self::failure::Failure;
use self::output::Output;

const EXIT_CODES: &str = "Exit codes:
  0  success: no problem found
  1  problem: undecodable data, a gap, a difference, or a request that a node refused
  2  usage: invalid command line
  3  unavailable: the database or NATS is unreachable or timed out
  4  refused: login, rights or tables of the database or NATS, or an unknown name
  5  pending: a request stands, but no live node took it in time, or it makes no progress
  6  output: writing to standard output failed, as on a full disk

Pass passwords in DATABASE_URL, NATS_URL or files: other users of the machine can read a command line.";

/// Inspects and operates an event store, its projections, processes and schedules.
#[derive(Debug, Parser)]
#[command(name = "storied", version, after_help = EXIT_CODES)]
struct Cli {
    #[command(flatten)]
    database: DatabaseArgs,

    /// Prints JSON; events one per line
    #[arg(long, global = true)]
    json: bool,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Creates or upgrades storied's tables
    Migrate(migrate::Args),
    /// Shows the status of the store, its publisher, projections and nodes
    Status(database::ReadModelArgs),
    /// Reads the log
    #[command(subcommand)]
    Log(log::Command),
    /// Reads one stream
    #[command(subcommand)]
    Stream(stream::Command),
    /// Lists and operates projections
    #[command(subcommand)]
    Projection(projection::Command),
    /// Lists and resolves parked events
    #[command(subcommand)]
    Parked(parked::Command),
    /// Lists and operates instances of processes
    #[command(subcommand)]
    Process(process::Command),
    /// Lists the timers of processes
    #[command(subcommand)]
    Timer(timer::Command),
    /// Lists and operates recurring schedules
    #[command(subcommand)]
    Schedule(schedule::Command),
    /// Lists, cancels and retries scheduled commands
    #[command(subcommand, name = "command")]
    Scheduled(command::Command),
    /// Shows the status of the publisher
    #[command(subcommand)]
    Publisher(publisher::Command),
    /// Operates the store itself
    #[command(subcommand)]
    Store(store::Command),
    /// Inspects NATS
    #[command(subcommand)]
    Nats(nats::Command),
    /// Checks the whole log: versions without gaps, decodable events, and an equal log stream
    Verify(verify::Args),
    /// Prints a script that completes this tool's commands in a shell
    Completions {
        /// Shell
        shell: clap_complete::Shell,
    },
}

impl Cli {
    /// Returns the secrets that must not be printed.
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
        secrets.extend(read_model.and_then(database::ReadModelArgs::secret));
        secrets
    }
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let json = cli.json;
    wait::set_json(json);
    redact::set(redact::Secrets::of(&cli.secrets()));
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(json),
    }
}

/// Prints a usage error of clap, without the URLs that it quotes.
fn usage(error: &clap::Error) -> ExitCode {
    let text = redact::urls(&error.to_string());
    if error.use_stderr() {
        terminal::print_error(&text);
        return ExitCode::from(failure::USAGE);
    }
    match Output::new(false).text(&text) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(false),
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
        .map_err(|error| Failure::Unavailable(format!("starting the runtime failed: {error}")))?;
    runtime.block_on(async {
        let database = &cli.database;
        match cli.command {
            Command::Migrate(args) => migrate::run(&args, database, &mut out).await,
            Command::Status(read_model) => status::run(&read_model, database, &mut out).await,
            Command::Log(command) => log::run(command, database, &mut out).await,
            Command::Stream(command) => stream::run(command, database, &mut out).await,
            Command::Projection(command) => projection::run(command, database, &mut out).await,
            Command::Parked(command) => parked::run(command, database, &mut out).await,
            Command::Process(command) => process::run(command, database, &mut out).await,
            Command::Timer(command) => timer::run(command, database, &mut out).await,
            Command::Schedule(command) => schedule::run(command, database, &mut out).await,
            Command::Scheduled(command) => command::run(command, database, &mut out).await,
            Command::Publisher(command) => publisher::run(command, database, &mut out).await,
            Command::Store(command) => store::run(command, database, &mut out).await,
            Command::Nats(command) => nats::run(command, database, &mut out).await,
            Command::Verify(args) => verify::run(args, database, &mut out).await,
            Command::Completions { .. } => Ok(()),
        }?;
        out.flush()
    })
}
