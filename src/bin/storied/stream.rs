//! `storied stream`.

use storied::{StreamId, Version};

use crate::database::DatabaseArgs;
use crate::failure::Failure;
use crate::filter::stream;
use crate::log::{EventArgs, Printer};
use crate::output::Output;
use crate::terminal;

/// Number of events per read.
const PAGE: usize = 500;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Prints the events of a stream, by version
    Show(Show),
}

#[derive(Debug, clap::Args)]
pub(crate) struct Show {
    /// Stream
    #[arg(value_name = "CATEGORY/ID", value_parser = stream)]
    stream: StreamId,

    /// First version
    #[arg(long, default_value_t = 1, value_name = "VERSION")]
    from: u64,

    /// Last version
    #[arg(long, value_name = "VERSION")]
    to: Option<u64>,

    #[command(flatten)]
    events: EventArgs,
}

pub(crate) async fn run(command: Command, from: &DatabaseArgs, out: &mut Output) -> Result<(), Failure> {
    let Command::Show(args) = command;
    let store = from.store().await?;
    let mut printer = Printer::new(args.events.metadata);
    let limit = if args.events.limit == 0 { usize::MAX } else { args.events.limit };
    let mut after = Version::new(args.from.saturating_sub(1));
    let to = Version::new(args.to.unwrap_or(u64::MAX));
    let mut more = true;
    while more && printer.printed < limit && after < to {
        let page = PAGE.min(limit - printer.printed);
        let events = store.read_stream(&args.stream, after, page).await?;
        for event in events.iter().take_while(|event| event.version <= to) {
            printer.print(event, out)?;
        }
        more = events.len() == page;
        after = events.last().map_or(after, |event| event.version);
    }
    if printer.printed == 0 {
        let first = store.read_stream(&args.stream, Version::NONE, 1).await?;
        if first.is_empty() {
            return Err(Failure::Refused(format!("no stream {}", args.stream)));
        }
        terminal::print_error(&format!("{} has no event in this range of versions\n", args.stream));
    }
    if more && after < to && !out.json {
        let rest = store.read_stream(&args.stream, after, 1).await?;
        if !rest.is_empty() {
            out.line(format!(
                "… the limit of {limit} events; the stream continues: --from {}",
                after.get() + 1
            ))?;
        }
    }
    printer.end()
}
