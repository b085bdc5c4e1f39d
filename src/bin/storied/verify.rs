//! `storied verify`.

mod mirror;

use std::collections::HashMap;

use serde_json::json;
use storied::{EventStore, Position, ReadLog, RecordedEvent, StoreError};
use uuid::Uuid;

use self::mirror::Mirror;
use crate::connect::NatsArgs;
use crate::decode;
use crate::failure::Failure;
use crate::open::DatabaseArgs;
use crate::output::{Output, counted};

/// Number of events per read.
const PAGE: usize = 1_000;

/// Maximum number of printed problems; the others are counted.
const SAID: usize = 100;

/// Namespace of the keys of streams here, which take less memory than their names.
const STREAMS: Uuid = Uuid::NAMESPACE_OID;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Also compares the mirror in JetStream, message by message
    #[arg(long)]
    mirror: bool,

    /// Time limit for the mirror to reach the current end of the log, 0 to 86400
    #[arg(long, default_value_t = 10, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(0..=86_400))]
    mirror_within: u64,

    #[command(flatten)]
    nats: NatsArgs,
}

impl Args {
    pub(crate) fn nats(&self) -> &NatsArgs {
        &self.nats
    }
}

/// The problems found.
#[derive(Debug, Default)]
pub(crate) struct Problems {
    said: Vec<String>,
    count: usize,
}

impl Problems {
    fn add(&mut self, problem: String) {
        self.count += 1;
        if self.said.len() < SAID {
            self.said.push(problem);
        }
    }
}

pub(crate) async fn run(args: Args, from: &DatabaseArgs, out: &mut Output) -> Result<(), Failure> {
    if args.mirror {
        args.nats.check_files()?;
    }
    let store = from.store().await?;
    let head = store.frontier().await?;
    let mut mirror = None;
    if args.mirror {
        let bus = args.nats.bus(None, from).await?;
        let within = std::time::Duration::from_secs(args.mirror_within);
        mirror = Some(Mirror::open(&bus, store.clone(), within).await?);
    }
    let mut walk =
        Walk { versions: HashMap::new(), last: Position::START, events: 0, problems: Problems::default() };
    walk.all(&*store, head, mirror.as_mut()).await?;
    let Walk { versions, events, mut problems, .. } = walk;
    if let Some(mirror) = &mut mirror {
        mirror.end(head, &mut problems).await?;
    }
    let told = tell(events, versions.len(), head, &problems, mirror.as_ref(), out);
    match problems.count {
        0 => told,
        // Fails also if the reader closes standard output early.
        count => Err(Failure::Problem(format!("{} found", counted(count, "problem")))),
    }
}

fn tell(
    events: u64,
    streams: usize,
    head: Position,
    problems: &Problems,
    mirror: Option<&Mirror>,
    out: &mut Output,
) -> Result<(), Failure> {
    if out.json {
        return out.value(&json!({
            "ok": problems.count == 0, "head": head.get(), "events": events, "streams": streams,
            "mirror": mirror.map(Mirror::value), "problems": problems.said, "problem_count": problems.count,
        }));
    }
    for problem in &problems.said {
        out.line(format!("PROBLEM  {problem}"))?;
    }
    if problems.count > problems.said.len() {
        out.line(format!("         … and {} more", problems.count - problems.said.len()))?;
    }
    out.line(format!("{events} events of {streams} streams were read, up to position {head}"))?;
    if let Some(mirror) = mirror {
        out.line(mirror.line())?;
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
        mut mirror: Option<&mut Mirror>,
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
                if let Some(mirror) = &mut mirror {
                    mirror.check(event, self.last, &mut self.problems).await?;
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
        if let Err(error) = decode::payload(event) {
            self.problems.add(format!(
                "position {position}: the payload of {name} in {stream} does not decode: {error}"
            ));
        }
        if let Err(error) = event.decode_metadata() {
            self.problems.add(format!("position {position}: {error}"));
        }
    }
}
