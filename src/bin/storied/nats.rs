//! `storied nats`.

use serde_json::{Value, json};
use storied::bus::{Field, NatsReport};

use crate::connect::{NatsArgs, StreamArgs};
use crate::database::DatabaseArgs;
use crate::failure::Failure;
use crate::output::{Output, counted};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Compares streams and consumers with the options of the code, field by field; changes nothing
    Check(Check),
}

#[derive(Debug, clap::Args)]
pub(crate) struct Check {
    #[command(flatten)]
    nats: NatsArgs,

    #[command(flatten)]
    stream: StreamArgs,
}

impl Command {
    pub(crate) fn nats(&self) -> &NatsArgs {
        let Self::Check(args) = self;
        &args.nats
    }
}

pub(crate) async fn run(command: Command, from: &DatabaseArgs, out: &mut Output) -> Result<(), Failure> {
    let Command::Check(args) = command;
    args.nats.check_files()?;
    let store = from.store().await?;
    let bus = args.nats.bus(Some(&args.stream), from).await?;
    let report = bus.inspect(store.info().id).await?;
    let problems = problems(&report);
    let printed = if out.json { out.value(&value(&report, &problems)) } else { print(&report, out) };
    match problems.len() {
        0 => printed,
        // Fails also if the reader closes standard output early.
        count => Err(Failure::Problem(format!("{}: {}", counted(count, "difference"), problems.join("; ")))),
    }
}

fn problems(report: &NatsReport) -> Vec<String> {
    let mut problems = Vec::new();
    let mut compare = |what: String, fields: &[Field]| {
        problems.extend(fields.iter().filter(|field| !field.same).map(|field| format!("{what}: {field}")));
    };
    for consumer in &report.consumers {
        compare(format!("consumer {}", consumer.name), &consumer.fields);
    }
    for stream in &report.streams {
        if let Some(found) = &stream.found {
            compare(format!("stream {}", stream.name), &found.fields);
        }
    }
    let missing = report.streams.iter().filter(|stream| stream.required && stream.found.is_none());
    problems.extend(missing.map(|stream| format!("stream {}: missing", stream.name)));
    problems
}

fn value(report: &NatsReport, problems: &[String]) -> Value {
    let fields = |fields: &[Field]| -> Vec<Value> {
        let field = |field: &Field| json!({ "field": field.name, "is": field.is, "should_be": field.should_be, "same": field.same });
        fields.iter().map(field).collect()
    };
    let streams: Vec<_> = report
        .streams
        .iter()
        .map(|stream| {
            let found = stream.found.as_ref().map(|found| {
                json!({ "fields": fields(&found.fields), "messages": found.messages, "bytes": found.bytes,
                    "first_sequence": found.first_sequence, "last_sequence": found.last_sequence })
            });
            json!({ "name": stream.name, "required": stream.required, "found": found })
        })
        .collect();
    let consumers: Vec<_> = report
        .consumers
        .iter()
        .map(|consumer| {
            json!({ "name": consumer.name, "follower": consumer.follower, "fields": fields(&consumer.fields),
                "filters": consumer.filters, "pending": consumer.pending, "ack_pending": consumer.ack_pending,
                "redelivered": consumer.redelivered })
        })
        .collect();
    json!({ "ok": problems.is_empty(), "server": report.version, "streams": streams, "consumers": consumers })
}

fn print(report: &NatsReport, out: &mut Output) -> Result<(), Failure> {
    let compare = |fields: &[Field], out: &mut Output| -> Result<(), Failure> {
        for field in fields {
            match field.same {
                true => out.line(format!("  ok         {} {}", field.name, field.is))?,
                false => out.line(format!("  DIFFERENT  {field}"))?,
            }
        }
        Ok(())
    };
    out.line(format!("nats-server {}", report.version))?;
    for stream in &report.streams {
        match &stream.found {
            None if stream.required => out.line(format!("stream {}: MISSING", stream.name))?,
            None => out.line(format!("stream {}: missing, and not needed yet", stream.name))?,
            Some(found) => {
                let (first, last) = (found.first_sequence, found.last_sequence);
                out.line(format!("stream {}: {} messages, {first} to {last}", stream.name, found.messages))?;
                compare(&found.fields, out)?;
            }
        }
    }
    for consumer in &report.consumers {
        let whose = if consumer.follower { "of a projection" } else { "of a program, not compared" };
        out.line(format!(
            "consumer {} {whose}: {} pending, {} unsettled, {} redelivered; {}",
            consumer.name,
            consumer.pending,
            consumer.ack_pending,
            consumer.redelivered,
            consumer.filters.join(" ")
        ))?;
        compare(&consumer.fields, out)?;
    }
    Ok(())
}
