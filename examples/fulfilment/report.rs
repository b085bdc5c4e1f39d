//! The report of a run: what the log says of orders, stock and payments.
//!
//! The check reads the streams of the process as any other program would, without its code: every
//! effect has taken effect once, or was rejected and has none.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::Value;
use storied::{EventStore, Filter, Position, ReadLog, RecordedEvent, Version};
use uuid::Uuid;

use crate::Failure;
use crate::domain::{OrderEvent, PaymentEvent, StockEvent};

/// The report of a run.
#[derive(Debug, Default)]
pub(crate) struct Report {
    orders: u64,
    completed: u64,
    compensated: u64,
    /// Orders whose payment took too long.
    timed_out: u64,
    /// Commands of the process, and those of them that were rejected.
    effects: u64,
    rejected: u64,
    /// Commands that took effect after their rejection was recorded.
    contradicted: u64,
    /// Amounts of money.
    captured: u64,
    refunded: u64,
    /// Pieces of all products.
    received: u64,
    shipped: u64,
    left: i128,
    per_second: f64,
    wrong: Vec<String>,
}

/// A command in the stream of an instance.
struct Effect {
    /// Stream of the instance.
    stream: String,
    key: String,
    /// Stream of the aggregate, or `None` for a handler.
    target: Option<String>,
    done: u64,
    rejected: u64,
    /// Position of its last answer.
    answered: Position,
    /// Events with its id.
    applied: Vec<Applied>,
}

/// An event that a command of the process has caused.
struct Applied {
    command: Uuid,
    stream: String,
    position: Position,
    version: Version,
    recorded_at: DateTime<Utc>,
}

impl fmt::Display for Applied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { command, stream, position, version, recorded_at } = self;
        let time = recorded_at.format("%T%.3f");
        write!(f, "position {position} at {time}: {stream} version {version} of command {command}")
    }
}

impl Applied {
    fn by(command: Uuid, event: &RecordedEvent) -> Self {
        let RecordedEvent { position, version, recorded_at, .. } = *event;
        Self { command, stream: event.stream.to_string(), position, version, recorded_at }
    }
}

/// An order and its instance.
#[derive(Debug, Default)]
struct Fulfilled {
    placed: u64,
    accepted: u64,
    shipped: u64,
    cancelled: u64,
    pieces: u64,
    reserved: u64,
    released: u64,
    captured: Vec<u64>,
    refunded: Vec<u64>,
    triggers: Vec<Uuid>,
    timed_out: bool,
    endings: Vec<String>,
    parked: Vec<String>,
    /// The events of its instance, to explain a violation.
    log: Vec<String>,
}

/// What the log says, event by event.
#[derive(Default)]
struct Log {
    orders: BTreeMap<String, Fulfilled>,
    effects: BTreeMap<Uuid, Effect>,
    applied: Vec<Applied>,
    /// Pieces that are left of each product.
    stock: BTreeMap<String, i128>,
    received: u64,
    wrong: Vec<String>,
}

impl Log {
    fn read(&mut self, event: &RecordedEvent) -> Result<(), Failure> {
        let (stream, id) = (event.stream.to_string(), event.stream.id().to_owned());
        match event.stream.category() {
            "order" => {
                let order = self.orders.entry(id).or_default();
                match event.decode::<OrderEvent>()? {
                    OrderEvent::Placed { lines, .. } => {
                        order.placed += 1;
                        order.pieces += lines.iter().map(|line| line.pieces).sum::<u64>();
                        return Ok(());
                    }
                    OrderEvent::Accepted => order.accepted += 1,
                    OrderEvent::Shipped => order.shipped += 1,
                    OrderEvent::Cancelled => order.cancelled += 1,
                }
                self.applied.push(Applied::by(event.command_id, event));
            }
            "stock" => self.read_stock(event, stream)?,
            "payment" => {
                let order = self.orders.entry(id).or_default();
                match event.decode::<PaymentEvent>()? {
                    PaymentEvent::Captured { amount } => order.captured.push(amount),
                    PaymentEvent::Refunded { amount } => order.refunded.push(amount),
                }
                // The command of the process went to the handler, which has caused this event.
                let cause = event.decode_metadata()?.causation_id;
                self.applied.push(Applied::by(cause.unwrap_or(event.command_id), event));
            }
            "fulfilment" => self.read_instance(event, stream, id)?,
            _ => {}
        }
        Ok(())
    }

    fn read_stock(&mut self, event: &RecordedEvent, stream: String) -> Result<(), Failure> {
        let left = self.stock.entry(stream.clone()).or_default();
        match event.decode::<StockEvent>()? {
            StockEvent::Received { pieces } => {
                *left += i128::from(pieces);
                self.received += pieces;
                return Ok(());
            }
            StockEvent::Reserved { order, pieces } => {
                *left -= i128::from(pieces);
                if *left < 0 {
                    self.wrong.push(format!("{stream} has {left} pieces at position {}", event.position));
                }
                self.orders.entry(order).or_default().reserved += pieces;
            }
            StockEvent::Released { order, pieces } => {
                *left += i128::from(pieces);
                self.orders.entry(order).or_default().released += pieces;
            }
        }
        self.applied.push(Applied::by(event.command_id, event));
        Ok(())
    }

    fn read_instance(&mut self, event: &RecordedEvent, stream: String, id: String) -> Result<(), Failure> {
        let payload = serde_json::to_value(event).map_err(std::io::Error::other)?["payload"].take();
        let order = self.orders.entry(id).or_default();
        let name = event.name.as_str().trim_start_matches("fulfilment.");
        let time = event.recorded_at.format("%T%.3f");
        order.log.push(format!("{} {time} {name} {}", event.position, outline(&payload)));
        match name {
            "effect" => {
                let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
                let command = &payload["command"];
                let target = (command["kind"] == "aggregate")
                    .then(|| format!("{}/{}", text(&command["name"]), text(&command["target"])));
                let key = text(&payload["key"]);
                let effect = Effect {
                    stream,
                    key,
                    target,
                    done: 0,
                    rejected: 0,
                    answered: Position::START,
                    applied: Vec::new(),
                };
                let id = uuid(&payload["id"])?;
                if let Some(Effect { stream, key, .. }) = self.effects.insert(id, effect) {
                    self.wrong.push(format!("{stream} has {key:?} ({id}) twice"));
                }
            }
            "input" => {
                let (source, id) = (&payload["source"], uuid(&payload["id"])?);
                order.timed_out |= source.get("due").is_some();
                if source.get("event").is_some() {
                    order.triggers.push(id);
                } else if let Some(effect) = self.effects.get_mut(&id) {
                    effect.answered = event.position;
                    effect.done += u64::from(source.get("done").is_some());
                    effect.rejected += u64::from(source.get("rejected").is_some());
                } else if source.get("due").is_none() {
                    self.wrong.push(format!("{stream} has an answer to an unknown command {id}"));
                }
            }
            "ended" => order.endings.push(payload["ending"].as_str().unwrap_or_default().to_owned()),
            "parked" => order.parked.push(payload["reason"].as_str().unwrap_or_default().to_owned()),
            _ => {}
        }
        Ok(())
    }
}

/// Returns the important part of an event of an instance.
fn outline(payload: &Value) -> String {
    let id = uuid(&payload["id"]).map(|id| id.to_string()).unwrap_or_default();
    let source = payload["source"].as_object().and_then(|source| source.iter().next());
    let source = source.map_or(String::new(), |(kind, source)| {
        let texts = ["effect", "timer", "message"].map(|field| source[field].as_str());
        format!("{kind} {}", texts.into_iter().flatten().collect::<Vec<_>>().join(" "))
    });
    let texts = ["key", "ending", "reason", "name", "verb"].map(|field| payload[field].as_str());
    format!("{id} {source} {}", texts.into_iter().flatten().collect::<Vec<_>>().join(" "))
}

/// Returns a UUID, which is bytes in CBOR and a text in JSON.
fn uuid(value: &Value) -> Result<Uuid, Failure> {
    let text = value.get("$bytes").unwrap_or(value).as_str().unwrap_or_default();
    Uuid::parse_str(text).map_err(|_| Failure::Bug("an event of the process has no id"))
}

impl Effect {
    /// Returns why the effect is wrong.
    fn problem(&self) -> Option<&'static str> {
        let done = self.done > 0;
        match (self.applied.len(), &self.target) {
            _ if self.done > 1 || self.rejected > 1 => Some("has two answers"),
            _ if self.done + self.rejected == 0 => Some("has no answer"),
            (2.., _) => Some("happened twice"),
            (0, _) if done => Some("did not happen, and its answer says so"),
            (1, _) if !done && self.applied[0].position < self.answered => {
                Some("happened, and was rejected after that")
            }
            (1, _) if !done => Some("happened after its rejection, and its instance does not know"),
            (1, Some(target)) if self.applied[0].stream != *target => Some("happened in another stream"),
            _ => None,
        }
    }
}

impl Fulfilled {
    /// Returns what is wrong with an order.
    fn problems(&self) -> Vec<String> {
        let mut problems: Vec<String> = self.parked.iter().map(|why| format!("is parked: {why}")).collect();
        let mut check = |holds: bool, problem: &str| {
            if !holds {
                problems.push(problem.to_owned());
            }
        };
        let (captured, refunded) = (self.captured.iter().sum::<u64>(), self.refunded.iter().sum::<u64>());
        check(self.placed == 1, "was not placed once");
        check(self.triggers.len() == 1, "has no instance, or consumed an event twice");
        check(self.captured.len() <= 1, "is captured twice");
        check(self.refunded.len() <= 1, "is refunded twice");
        match &*self.endings {
            [ending] if ending == "completed" => {
                check(self.accepted == 1 && self.shipped == 1 && self.cancelled == 0, "is not shipped once");
                check(
                    self.reserved == self.pieces && self.released == 0,
                    "has other pieces than it reserved",
                );
                check(self.captured.len() == 1 && refunded == 0, "is shipped without its payment");
            }
            [ending] if ending == "compensated" => {
                check(self.shipped == 0, "is compensated and shipped");
                check(self.cancelled == self.accepted, "is compensated and not cancelled");
                check(self.reserved == self.released, "is compensated and keeps stock");
                check(captured == refunded, "is compensated and not refunded");
            }
            _ => check(false, "has not ended once"),
        }
        problems
    }
}

impl Report {
    /// Reads and checks the log.
    pub(crate) async fn of(store: &dyn EventStore, took: Duration) -> Result<Self, Failure> {
        let mut log = Log::default();
        let mut after = Position::START;
        loop {
            let page = store.read_log(ReadLog::after(after).filter(Filter::all())).await?;
            page.events.iter().try_for_each(|event| log.read(event))?;
            if !page.has_more() {
                break;
            }
            after = page.scanned_to;
        }
        let Log { orders, mut effects, applied, stock, received, mut wrong } = log;
        for event in applied {
            match effects.get_mut(&event.command) {
                Some(effect) => effect.applied.push(event),
                None => wrong.push(format!("an event of an unknown command: {event}")),
            }
        }
        let mut report = Self { received, left: stock.values().sum(), ..Self::default() };
        let mut strange: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (id, effect) in &effects {
            report.effects += 1;
            report.rejected += u64::from(effect.done == 0 && effect.rejected > 0);
            report.contradicted += u64::from(effect.done > 0 && effect.rejected > 0);
            if let Some(problem) = effect.problem() {
                let events: Vec<_> = effect.applied.iter().map(ToString::to_string).collect();
                let events = events.join(", ");
                let problem = format!("{:?} ({id}) {problem}: [{events}]", effect.key);
                strange.entry(effect.stream.clone()).or_default().push(problem);
            }
        }
        for (id, order) in &orders {
            let is = |ending: &str| u64::from(order.endings.iter().any(|found| found == ending));
            report.orders += order.placed;
            report.completed += is("completed");
            report.compensated += is("compensated");
            report.timed_out += u64::from(order.timed_out);
            report.captured += order.captured.iter().sum::<u64>();
            report.refunded += order.refunded.iter().sum::<u64>();
            report.shipped +=
                if order.shipped > 0 { order.reserved - order.released.min(order.reserved) } else { 0 };
            let mut problems = order.problems();
            problems.extend(strange.remove(&format!("fulfilment/{id}")).unwrap_or_default());
            if !problems.is_empty() {
                wrong.push(format!("order {id} {}", problems.join(", ")));
                tracing::error!(order = id, log = %order.log.join("\n  "), "the events of the instance");
            }
        }
        if i128::from(report.received) != report.left + i128::from(report.shipped) {
            let Self { received, shipped, left, .. } = &report;
            wrong.push(format!("{received} pieces received, {shipped} shipped, {left} left"));
        }
        report.per_second = report.orders as f64 / took.as_secs_f64().max(0.001);
        report.wrong = wrong;
        Ok(report)
    }

    /// Checks the report.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        if self.wrong.is_empty() { Ok(()) } else { Err(Failure::Wrong { wrong: self.wrong.clone() }) }
    }

    pub(crate) fn json(&self) -> String {
        serde_json::json!({
            "orders": self.orders,
            "completed": self.completed,
            "compensated": self.compensated,
            "timed_out": self.timed_out,
            "effects": self.effects,
            "rejected": self.rejected,
            "contradicted": self.contradicted,
            "captured": self.captured,
            "refunded": self.refunded,
            "received": self.received,
            "shipped": self.shipped,
            "left": i64::try_from(self.left).unwrap_or(i64::MIN),
            "per_second": (self.per_second * 10.0).round() / 10.0,
            "wrong": self.wrong,
        })
        .to_string()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} orders, {:.0} a second", self.orders, self.per_second)?;
        writeln!(
            f,
            "{} completed, {} compensated, {} payments timed out",
            self.completed, self.compensated, self.timed_out
        )?;
        writeln!(
            f,
            "{} commands of the process, {} rejected, {} took effect after a rejection",
            self.effects, self.rejected, self.contradicted
        )?;
        writeln!(f, "{} captured, {} refunded", self.captured, self.refunded)?;
        writeln!(f, "{} pieces received, {} shipped, {} left", self.received, self.shipped, self.left)?;
        write!(f, "{} violations", self.wrong.len())
    }
}
