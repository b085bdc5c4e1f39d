//! Orders, stock, and the process between them, for tests of processes.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use storied::process::{Input, Next, Process, ProcessContext, Routes};
use storied::{Aggregate, Context, Decided, Decision, Event, NeverRejects, Runtime};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::wait::PATIENCE;

#[derive(Default)]
pub struct Order;

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OrderEvent {
    Placed { lines: Vec<String> },
    Noted { text: String },
}

impl Event for OrderEvent {
    const CATEGORY: &'static str = "order";
}

impl Aggregate for Order {
    type Event = OrderEvent;
    type Command = OrderEvent;
    type Reply = ();
    type Error = NeverRejects;

    fn handle(&self, command: &OrderEvent, _: &Context<'_>) -> Decided<Self> {
        Ok(command.clone().into())
    }

    fn apply(&mut self, _: &OrderEvent) {}
}

#[derive(Default)]
pub struct Stock {
    pub reserved: u32,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StockEvent {
    Reserved { order: String },
    Released { order: String },
}

impl Event for StockEvent {
    const CATEGORY: &'static str = "stock";
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub enum StockCommand {
    Reserve { order: String },
    Release { order: String },
}

#[derive(Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[error("{0} pieces are reserved, no more are left")]
pub struct SoldOut(pub u32);

impl Aggregate for Stock {
    type Event = StockEvent;
    type Command = StockCommand;
    type Reply = u32;
    type Error = SoldOut;

    fn handle(&self, command: &StockCommand, _: &Context<'_>) -> Decided<Self> {
        match command {
            StockCommand::Reserve { order } if self.reserved < 2 => {
                Ok(Decision::event(StockEvent::Reserved { order: order.clone() }).reply(self.reserved + 1))
            }
            StockCommand::Reserve { .. } => Err(SoldOut(self.reserved)),
            StockCommand::Release { order } => {
                Ok(Decision::event(StockEvent::Released { order: order.clone() }).reply(self.reserved - 1))
            }
        }
    }

    fn apply(&mut self, event: &StockEvent) {
        match event {
            StockEvent::Reserved { .. } => self.reserved += 1,
            StockEvent::Released { .. } => self.reserved -= 1,
        }
    }
}

/// Reserves every line; completes if all are reserved, compensates if one is refused.
#[derive(Default)]
pub struct Fulfilment {
    pub lines: usize,
    pub reserved: usize,
}

impl Process for Fulfilment {
    const NAME: &'static str = "fulfilment";
    type Event = OrderEvent;

    fn routes() -> Routes<OrderEvent> {
        Routes::new()
            .starts(["placed"], |_: &OrderEvent, recorded| recorded.stream.id().to_owned())
            .continues(["noted"], |_: &OrderEvent, recorded| recorded.stream.id().to_owned())
    }

    fn react(&self, input: Input<'_, OrderEvent>, context: &ProcessContext<'_>) -> Next {
        match input {
            Input::Event(OrderEvent::Placed { lines }) => {
                let order = context.id().to_owned();
                assert_eq!(context.event().unwrap().stream.id(), order);
                let reserve = |next: Next, line: &String| {
                    next.execute::<Stock>(
                        format!("reserve {line}"),
                        line,
                        StockCommand::Reserve { order: order.clone() },
                    )
                    .undo::<Stock>(line, StockCommand::Release { order: order.clone() })
                };
                lines.iter().fold(Next::new(), reserve)
            }
            Input::Event(OrderEvent::Noted { text }) if text == "panic" => panic!("as noted"),
            Input::Event(OrderEvent::Noted { text }) if text == "soon" => {
                Next::new().after("soon", Duration::from_millis(30))
            }
            Input::Event(OrderEvent::Noted { text }) if text == "second" => {
                Next::new().after("soon", Duration::from_secs(1))
            }
            Input::Event(OrderEvent::Noted { text }) if text == "later" => {
                Next::new().after("soon", Duration::from_secs(3_600))
            }
            Input::Event(OrderEvent::Noted { text }) if text == "never" => Next::new().cancel("soon"),
            Input::Due { timer: "soon" } => Next::new().complete(),
            Input::Done { effect, reply } => {
                assert!(effect.starts_with("reserve ") && (1..=2).contains(&reply.decode::<u32>().unwrap()));
                match self.reserved + 1 == self.lines {
                    true => Next::new().complete(),
                    false => Next::none(),
                }
            }
            Input::Rejected { rejection, .. } => {
                assert_eq!(rejection.decode(), Ok(SoldOut(2)));
                assert_eq!(rejection.to_string(), "2 pieces are reserved, no more are left");
                Next::compensate()
            }
            _ => Next::none(),
        }
    }

    fn apply(&mut self, input: Input<'_, OrderEvent>) {
        match input {
            Input::Event(OrderEvent::Placed { lines }) => self.lines = lines.len(),
            Input::Done { .. } => self.reserved += 1,
            _ => {}
        }
    }
}

/// Executes a command on an order until it is durable, under one id.
pub async fn record(runtime: &Runtime, order: &str, event: OrderEvent) {
    let id = Uuid::now_v7();
    let deadline = Instant::now() + PATIENCE;
    while let Err(error) = runtime.execute::<Order>(order, event.clone()).command_id(id).await {
        assert!(error.is_transient() && Instant::now() < deadline, "{error}");
        sleep(Duration::from_millis(5)).await;
    }
}
