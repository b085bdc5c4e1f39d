//! `storied log`.

use std::collections::VecDeque;
use std::time::Duration;

use storied::store::LogPage;
use storied::{EventStore, Filter, Position, ReadLog, RecordedEvent};
use tokio::time::sleep;
use uuid::Uuid;

use crate::database::DatabaseArgs;
use crate::decode;
use crate::failure::Failure;
use crate::filter::FilterArgs;
use crate::output::Output;
use crate::terminal;

/// Number of events per read.
const PAGE: usize = 500;

/// Poll interval for events of other processes.
const POLL: Duration = Duration::from_millis(200);

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Prints events in log order
    Show(Show),
    /// Prints the last events, and then new ones
    Tail(Tail),
}

#[derive(Debug, clap::Args)]
pub(crate) struct Show {
    #[command(flatten)]
    filter: FilterArgs,

    /// Only events with this correlation id: those of a command and its nested commands
    #[arg(long, value_name = "ID")]
    correlation: Option<Uuid>,

    /// First position
    #[arg(long, default_value_t = 1, value_name = "POSITION")]
    from: u64,

    /// Last position
    #[arg(long, value_name = "POSITION")]
    to: Option<u64>,

    #[command(flatten)]
    events: EventArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Tail {
    #[command(flatten)]
    filter: FilterArgs,

    /// Number of existing events, up to 100000; to begin earlier, pass --from
    #[arg(long, short = 'n', default_value_t = 10, value_name = "EVENTS", conflicts_with = "from", value_parser = clap::value_parser!(u32).range(0..=100_000))]
    last: u32,

    /// First position, instead of the last events
    #[arg(long, value_name = "POSITION")]
    from: Option<u64>,

    /// Maximum number of events, existing ones included
    #[arg(long, value_name = "EVENTS")]
    limit: Option<usize>,

    /// Also prints metadata and ids
    #[arg(long)]
    metadata: bool,
}

/// Options of printing events.
#[derive(Debug, clap::Args)]
pub(crate) struct EventArgs {
    /// Maximum number of events; 0 is all
    #[arg(long, default_value_t = 100, value_name = "EVENTS")]
    pub(crate) limit: usize,

    /// Also prints metadata and ids
    #[arg(long)]
    pub(crate) metadata: bool,
}

pub(crate) async fn run(command: Command, from: &DatabaseArgs, out: &mut Output) -> Result<(), Failure> {
    let store = from.store().await?;
    match command {
        Command::Show(args) => show(&*store, args, out).await,
        Command::Tail(args) => tail(&*store, args, out).await,
    }
}

async fn show(store: &dyn EventStore, args: Show, out: &mut Output) -> Result<(), Failure> {
    let end = store.high_water_mark().await?;
    let end = args.to.map_or(end, |to| end.min(Position::new(to)));
    let filter = args.filter.filter();
    let mut printer = Printer::new(args.events.metadata);
    let limit = if args.events.limit == 0 { usize::MAX } else { args.events.limit };
    let mut after = Position::new(args.from.saturating_sub(1));
    while after < end && printer.printed < limit {
        let size = PAGE.min(limit - printer.printed);
        let page = match args.correlation {
            Some(id) => correlated(store, id, after, end, size).await?,
            None => {
                store.read_log(ReadLog::after(after).upto(end).filter(filter.clone()).limit(size)).await?
            }
        };
        for event in page.events.iter().filter(|event| filter.matches(event)) {
            printer.print(event, out)?;
        }
        // The log may end with a gap after the last event.
        if page.scanned_to == after {
            break;
        }
        after = page.scanned_to;
    }
    if printer.printed == limit && after < end && !out.json {
        out.line(format!(
            "… the limit of {limit} events; the log continues up to {end}: --from {}",
            after.get() + 1
        ))?;
    }
    if printer.printed == 0 {
        note_no_match(args.filter.is_empty() && args.correlation.is_none(), end);
    }
    printer.end()
}

/// Reads a page of the events with a correlation id.
async fn correlated(
    store: &dyn EventStore,
    id: Uuid,
    after: Position,
    end: Position,
    size: usize,
) -> Result<LogPage, Failure> {
    let mut events = store.correlated(id, after, size).await?;
    let scanned_to = events.last().map_or(end, |last| last.position);
    events.retain(|event| event.position <= end);
    Ok(LogPage { events, scanned_to, head: end })
}

/// Reports on standard error why no event is printed.
fn note_no_match(everything: bool, end: Position) {
    match everything {
        true => terminal::print_error("no event in that part of the log\n"),
        false => terminal::print_error(&format!("no event up to position {end} matches the filter\n")),
    }
}

async fn tail(store: &dyn EventStore, args: Tail, out: &mut Output) -> Result<(), Failure> {
    let mut appended = store.appended();
    let filter = args.filter.filter();
    let mut printer = Printer::new(args.metadata);
    let limit = args.limit.unwrap_or(usize::MAX);
    let head = store.high_water_mark().await?;
    let mut after = match args.from {
        Some(from) => Position::new(from.saturating_sub(1)),
        None => {
            for event in last(store, &filter, head, args.last as usize).await? {
                if printer.printed < limit {
                    printer.print(&event, out)?;
                }
            }
            head
        }
    };
    if printer.printed == 0 && args.from.is_none() && args.last > 0 && !args.filter.is_empty() {
        note_no_match(false, head);
    }
    out.flush()?;
    while printer.printed < limit {
        let read = ReadLog::after(after).filter(filter.clone()).limit(PAGE.min(limit - printer.printed));
        let page = store.read_log(read).await?;
        for event in &page.events {
            printer.print(event, out)?;
        }
        out.flush()?;
        let moved = page.scanned_to > after;
        after = page.scanned_to;
        if moved && page.has_more() {
            continue;
        }
        tokio::select! {
            Ok(()) = appended.changed() => {}
            () = sleep(POLL) => {}
        }
    }
    printer.end()
}

/// Returns the last `count` matching events up to `head`; scans from the end in ranges that double.
async fn last(
    store: &dyn EventStore,
    filter: &Filter,
    head: Position,
    count: usize,
) -> Result<VecDeque<RecordedEvent>, Failure> {
    let mut stretch = u64::try_from(count.max(PAGE)).unwrap_or(u64::MAX);
    loop {
        let start = Position::new(if count == 0 { head.get() } else { head.get().saturating_sub(stretch) });
        let mut found = VecDeque::new();
        let mut after = start;
        while after < head {
            let page =
                store.read_log(ReadLog::after(after).upto(head).filter(filter.clone()).limit(PAGE)).await?;
            for event in page.events {
                if found.len() == count {
                    found.pop_front();
                }
                found.push_back(event);
            }
            if page.scanned_to == after {
                break;
            }
            after = page.scanned_to;
        }
        if found.len() >= count || start == Position::START {
            return Ok(found);
        }
        stretch = stretch.saturating_mul(2);
    }
}

/// Prints events, and counts those that do not decode.
pub(crate) struct Printer {
    metadata: bool,
    pub(crate) printed: usize,
    unreadable: usize,
}

impl Printer {
    pub(crate) fn new(metadata: bool) -> Self {
        Self { metadata, printed: 0, unreadable: 0 }
    }

    pub(crate) fn print(&mut self, event: &RecordedEvent, out: &mut Output) -> Result<(), Failure> {
        self.printed += 1;
        let shown = decode::event(event)?;
        self.unreadable += usize::from(!decode::is_readable(event));
        if out.json {
            return out.value(&shown);
        }
        let time = event.recorded_at.format("%Y-%m-%d %H:%M:%S%.3fZ");
        out.line(format!(
            "{:>8}  {time}  {} v{}  {}  {}",
            event.position, event.stream, event.version, event.name, shown["payload"]
        ))?;
        if self.metadata {
            out.line(format!(
                "{:8}  event {}  command {}  metadata {}",
                "", event.id, event.command_id, shown["metadata"]
            ))?;
        }
        Ok(())
    }

    /// Reports the undecodable events.
    ///
    /// # Errors
    /// If an event did not decode.
    pub(crate) fn end(self) -> Result<(), Failure> {
        match self.unreadable {
            0 => Ok(()),
            count => Err(Failure::Problem(format!("{count} of {} events do not decode", self.printed))),
        }
    }
}
