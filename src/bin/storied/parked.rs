//! `storied parked`.

use serde_json::{Value, json};
use storied::projection::Request;
use storied::store::ParkedEvent;
use storied::{EventStore, Position, ReadLog, RecordedEvent};

use crate::database::{DatabaseArgs, Models, ReadModelArgs};
use crate::decode;
use crate::failure::Failure;
use crate::output::Output;
use crate::projection::{WaitArgs, ask, known, take};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Lists the parked events of a projection, or of all projections
    List {
        #[command(flatten)]
        read_model: ReadModelArgs,
        /// Projection [default: all]
        name: Option<String>,
        /// Maximum number of events of each projection
        #[arg(long, default_value_t = 100, value_name = "EVENTS")]
        limit: usize,
    },
    /// Shows a parked event, and the reason
    Show(One),
    /// Requests that a node applies a parked event
    Retry {
        #[command(flatten)]
        one: One,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Deletes a parked event permanently
    Discard(One),
    /// Withdraws a retry that no node has taken
    Withdraw(One),
}

impl Command {
    pub(crate) fn read_model(&self) -> &ReadModelArgs {
        match self {
            Self::List { read_model, .. } => read_model,
            Self::Show(one) | Self::Retry { one, .. } | Self::Discard(one) | Self::Withdraw(one) => {
                &one.read_model
            }
        }
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct One {
    #[command(flatten)]
    read_model: ReadModelArgs,

    /// Projection
    name: String,

    /// Position of the event in the log
    position: u64,
}

pub(crate) async fn run(command: Command, from: &DatabaseArgs, out: &mut Output) -> Result<(), Failure> {
    match command {
        Command::List { read_model, name, limit } => {
            list(&read_model.open(from).await?, name, limit, out).await
        }
        Command::Show(one) => show(&one, from, out).await,
        Command::Retry { one, wait } => retry(&one, &wait, from, out).await,
        Command::Discard(one) => discard(&one, from, out).await,
        Command::Withdraw(one) => withdraw(&one, from, out).await,
    }
}

fn value(projection: &str, event: &ParkedEvent) -> Value {
    json!({
        "projection": projection, "position": event.position.get(), "event_id": event.event_id,
        "stream": event.stream.to_string(), "version": event.version.get(), "name": event.name.as_str(),
        "error": event.error, "attempts": event.attempts, "parked_at": event.parked_at,
    })
}

async fn list(models: &Models, name: Option<String>, limit: usize, out: &mut Output) -> Result<(), Failure> {
    let operator = &models.operator;
    let records = match name {
        Some(name) => vec![known(operator, &name).await?],
        None => operator.projections().await?,
    };
    let mut found = Vec::new();
    for record in records.into_iter().filter(|record| record.parked > 0) {
        for event in operator.parked(&record.name, limit).await? {
            found.push((record.name.clone(), event));
        }
    }
    if out.json {
        let found: Vec<_> = found.iter().map(|(name, event)| value(name, event)).collect();
        return out.value(&json!({ "parked": found }));
    }
    if found.is_empty() {
        return out.line("no parked events");
    }
    let rows: Vec<_> = found
        .into_iter()
        .map(|(name, event)| {
            let stream = format!("{} v{}", event.stream, event.version);
            [
                name,
                event.position.to_string(),
                event.name.to_string(),
                stream,
                event.attempts.to_string(),
                event.error,
            ]
        })
        .collect();
    out.table(["PROJECTION", "POSITION", "EVENT", "STREAM", "ATTEMPTS", "ERROR"], &rows)
}

impl One {
    fn missing(&self) -> Failure {
        Failure::Refused(format!(
            "projection {} has no parked event at position {}",
            self.name, self.position
        ))
    }

    async fn find(&self, models: &Models) -> Result<ParkedEvent, Failure> {
        known(&models.operator, &self.name).await?;
        let parked = models.operator.parked(&self.name, usize::MAX).await?;
        parked.into_iter().find(|event| event.position.get() == self.position).ok_or_else(|| self.missing())
    }
}

async fn at(store: &dyn EventStore, position: u64) -> Result<Option<RecordedEvent>, Failure> {
    let read =
        ReadLog::after(Position::new(position.saturating_sub(1))).upto(Position::new(position)).limit(1);
    Ok(store.read_log(read).await?.events.into_iter().find(|event| event.position.get() == position))
}

async fn show(one: &One, from: &DatabaseArgs, out: &mut Output) -> Result<(), Failure> {
    let models = one.read_model.open(from).await?;
    let parked = one.find(&models).await?;
    let event = at(&*models.store, one.position).await?;
    let shown = event.as_ref().map(decode::event).transpose()?;
    if out.json {
        let mut parked = value(&one.name, &parked);
        parked["event"] = shown.unwrap_or(Value::Null);
        return out.value(&parked);
    }
    out.line(format!("projection  {}", one.name))?;
    out.line(format!("event       {} at position {}", parked.name, parked.position))?;
    out.line(format!("stream      {} v{}", parked.stream, parked.version))?;
    out.line(format!(
        "parked      {} after {} attempts",
        parked.parked_at.format("%Y-%m-%d %H:%M:%SZ"),
        parked.attempts
    ))?;
    out.line(format!("error       {}", parked.error))?;
    match shown {
        Some(shown) => {
            out.line(format!("payload     {}", shown["payload"]))?;
            out.line(format!("metadata    {}", shown["metadata"]))
        }
        None => {
            out.line("payload     missing: this log has no such event; it is another log, or was restored")
        }
    }
}

async fn retry(one: &One, wait: &WaitArgs, from: &DatabaseArgs, out: &mut Output) -> Result<(), Failure> {
    let models = one.read_model.open(from).await?;
    one.find(&models).await?;
    let request = Request::Retry(Position::new(one.position));
    let asked = ask(&models.operator, &one.name, request).await?;
    take(&models.operator, &asked, request, &one.name, wait).await?;
    if out.json {
        return out.value(&json!({ "projection": one.name, "position": one.position, "applied": true }));
    }
    out.line(format!("{} has applied the event at position {}", one.name, one.position))
}

async fn discard(one: &One, from: &DatabaseArgs, out: &mut Output) -> Result<(), Failure> {
    let models = one.read_model.open(from).await?;
    known(&models.operator, &one.name).await?;
    if !models.operator.discard_parked(&one.name, Position::new(one.position)).await? {
        return Err(one.missing());
    }
    if out.json {
        return out.value(&json!({ "projection": one.name, "position": one.position, "discarded": true }));
    }
    out.line(format!("{} has discarded the event at position {}", one.name, one.position))
}

async fn withdraw(one: &One, from: &DatabaseArgs, out: &mut Output) -> Result<(), Failure> {
    let models = one.read_model.open(from).await?;
    let request = Request::Retry(Position::new(one.position));
    if !models.operator.withdraw(&one.name, request).await? {
        let (name, position) = (&one.name, one.position);
        return Err(Failure::Refused(format!(
            "no pending retry of {position} of {name}: none was requested, or a node has taken it"
        )));
    }
    if out.json {
        return out.value(&json!({ "projection": one.name, "position": one.position, "withdrawn": true }));
    }
    out.line(format!("withdrew the {request} of {}", one.name))
}
