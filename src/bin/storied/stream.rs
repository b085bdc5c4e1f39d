//! `storied stream`.

use storied::{StreamId, Version};

use crate::failure::Failure;
use crate::filter::stream;
use crate::log::{EventArgs, Printer};
use crate::open::DatabaseArgs;
use crate::output::Output;

/// How many events are read at a time.
const PAGE: usize = 500;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Prints the events of a stream, by version
    Show(Show),
}

#[derive(Debug, clap::Args)]
pub(crate) struct Show {
    /// Which one
    #[arg(value_name = "CATEGORY/ID", value_parser = stream)]
    stream: StreamId,

    /// From this version on
    #[arg(long, default_value_t = 1, value_name = "VERSION")]
    from: u64,

    #[command(flatten)]
    events: EventArgs,
}

pub(crate) async fn run(command: Command, from: &DatabaseArgs, out: &mut Output) -> Result<(), Failure> {
    let Command::Show(args) = command;
    let store = from.store().await?;
    let mut printer = Printer::new(args.events.metadata);
    let limit = if args.events.limit == 0 { usize::MAX } else { args.events.limit };
    let mut after = Version::new(args.from.saturating_sub(1));
    let mut more = true;
    while more && printer.printed < limit {
        let page = PAGE.min(limit - printer.printed);
        let events = store.read_stream(&args.stream, after, page).await?;
        for event in &events {
            printer.print(event, out)?;
            after = event.version;
        }
        more = events.len() == page;
    }
    if printer.printed == 0 && args.from <= 1 {
        return Err(Failure::Refused(format!("there is no stream {}", args.stream)));
    }
    if more && !out.json {
        let rest = store.read_stream(&args.stream, after, 1).await?;
        if !rest.is_empty() {
            out.line(format!(
                "… the limit of {limit} events; the stream goes on: --from {}",
                after.get() + 1
            ))?;
        }
    }
    printer.end()
}
