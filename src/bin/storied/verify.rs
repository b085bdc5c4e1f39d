//! `storied verify`.

mod log_stream;
mod problems;

use std::collections::HashMap;

use serde_json::json;
use storied::{EventStore, Position, ReadLog, RecordedEvent, StoreError};
use uuid::Uuid;

use self::log_stream::LogStream;
use self::problems::Problems;
use crate::connect::NatsArgs;
use crate::database::DatabaseArgs;
use crate::failure::Failure;
use crate::output::{Output, counted};

/// Number of events per read.
const PAGE: usize = 1_000;

/// Namespace of the keys of streams here, which take less memory than their names.
const STREAMS: Uuid = Uuid::NAMESPACE_OID;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Also compares the log stream in JetStream, message by message
    #[arg(long)]
    log_stream: bool,

    /// Time limit for the log stream to reach the current end of the log, 0 to 86400
    #[arg(long, default_value_t = 10, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(0..=86_400))]
    log_stream_within: u64,

    #[command(flatten)]
    nats: NatsArgs,
}

impl Args {
    pub(crate) fn nats(&self) -> &NatsArgs {
        &self.nats
    }
}

pub(crate) async fn run(args: Args, from: &DatabaseArgs, out: &mut Output) -> Result<(), Failure> {
    if args.log_stream {
        args.nats.check_files()?;
    }
    let store = from.store().await?;
    let head = store.high_water_mark().await?;
    let mut log_stream = None;
    if args.log_stream {
        let bus = args.nats.bus(None, from).await?;
        let within = std::time::Duration::from_secs(args.log_stream_within);
        log_stream = Some(LogStream::open(&bus, store.clone(), within).await?);
    }
    let mut walk =
        Walk { versions: HashMap::new(), last: Position::START, events: 0, problems: Problems::default() };
    walk.all(&*store, head, log_stream.as_mut()).await?;
    let Walk { versions, events, mut problems, .. } = walk;
    if let Some(log_stream) = &mut log_stream {
        log_stream.end(head, &mut problems).await?;
    }
    let printed = report(events, versions.len(), head, &problems, log_stream.as_ref(), out);
    match problems.count {
        0 => printed,
        // Fails also if the reader closes standard output early.
        count => Err(Failure::Problem(format!("{} found", counted(count, "problem")))),
    }
}

fn report(
    events: u64,
    streams: usize,
    head: Position,
    problems: &Problems,
    log_stream: Option<&LogStream>,
    out: &mut Output,
) -> Result<(), Failure> {
    if out.json {
        return out.value(&json!({
            "ok": problems.count == 0, "head": head.get(), "events": events, "streams": streams,
            "log_stream": log_stream.map(LogStream::value), "problems": problems.shown, "problem_count": problems.count,
        }));
    }
    for problem in &problems.shown {
        out.line(format!("PROBLEM  {problem}"))?;
    }
    if problems.count > problems.shown.len() {
        out.line(format!("         … and {} more", problems.count - problems.shown.len()))?;
    }
    out.line(format!("{events} events of {streams} streams were read, up to position {head}"))?;
    if let Some(log_stream) = log_stream {
        out.line(log_stream.line())?;
    }
    if problems.count == 0 {
        out.line("no problem was found")?;
    }
    Ok(())
}

/// One pass over the log.
struct Walk {
    /// The last version of every stream: 24 bytes each, plus the overhead of the table.
    versions: HashMap<Uuid, u64>,
    last: Position,
    events: u64,
    problems: Problems,
}

impl Walk {
    async fn all(
        &mut self,
        store: &dyn EventStore,
        head: Position,
        mut log_stream: Option<&mut LogStream>,
    ) -> Result<(), Failure> {
        let mut after = Position::START;
        let mut limit = PAGE;
        while after < head {
            let page = match store.read_log(ReadLog::after(after).upto(head).limit(limit)).await {
                Ok(page) => page,
                // Reads single events up to the unreadable row.
                Err(StoreError::Corrupt { .. }) if limit > 1 => {
                    limit = 1;
                    continue;
                }
                Err(error @ StoreError::Corrupt { .. }) => {
                    self.problems.add(format!("reading the log after position {after} failed: {error}"));
                    return Ok(());
                }
                Err(error) => return Err(error.into()),
            };
            for event in &page.events {
                self.check(event);
                if let Some(log_stream) = &mut log_stream {
                    log_stream.check(event, self.last, &mut self.problems).await?;
                }
                self.last = event.position;
            }
            if page.scanned_to == after {
                break;
            }
            after = page.scanned_to;
        }
        Ok(())
    }

    fn check(&mut self, event: &RecordedEvent) {
        self.events += 1;
        let RecordedEvent { position, stream, version, name, .. } = event;
        let key = Uuid::new_v5(&STREAMS, stream.to_string().as_bytes());
        let known = self.versions.insert(key, version.get()).unwrap_or(0);
        if version.get() != known + 1 {
            self.problems
                .add(format!("position {position}: version {version} of {stream} follows version {known}"));
        }
        if *position <= self.last {
            self.problems.add(format!("position {position} follows position {}", self.last));
        }
        if let Err(error) = event.codec.decode_value(&event.payload) {
            self.problems.add(format!(
                "position {position}: the payload of {name} in {stream} does not decode: {error}"
            ));
        }
        if let Err(error) = event.decode_metadata() {
            self.problems.add(format!("position {position}: {error}"));
        }
    }
}
