//! Orders, stock and payments, and the process that fulfils an order.
//!
//! The process `fulfilment` has an instance for each order. It accepts the order, reserves the stock
//! of each line, charges the customer, and ships. If a line is sold out, the payment is declined, or
//! the payment takes too long, it compensates: it refunds, releases the stock, and cancels the order.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use storied::command::{HandleError, Handler, HandlerContext};
use storied::process::{Input, Next, Process, ProcessContext, Routes};
use storied::{Aggregate, Context, Decided, Event, NeverRejects};
use tokio::time::sleep;
use uuid::Uuid;

/// Price of a piece.
const PRICE: u64 = 5;

/// A line of an order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Line {
    pub(crate) product: String,
    pub(crate) pieces: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum OrderEvent {
    Placed {
        lines: Vec<Line>,
        /// Maximum duration of the payment, in milliseconds.
        payment_timeout: u64,
    },
    Accepted,
    Shipped,
    Cancelled,
}

impl Event for OrderEvent {
    const CATEGORY: &'static str = "order";
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum OrderCommand {
    Place { lines: Vec<Line>, payment_timeout: u64 },
    Accept,
    Ship,
    Cancel,
}

#[derive(Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
pub(crate) enum OrderError {
    #[error("the order was placed before")]
    AlreadyPlaced,
    #[error("the order is cancelled")]
    Cancelled,
}

/// An order, as its customer sees it.
#[derive(Debug, Default)]
pub(crate) struct Order {
    placed: bool,
    cancelled: bool,
}

impl Aggregate for Order {
    type Event = OrderEvent;
    type Command = OrderCommand;
    type Reply = ();
    type Error = OrderError;

    fn handle(&self, command: &OrderCommand, _: &Context<'_>) -> Decided<Self> {
        Ok(match command {
            OrderCommand::Place { .. } if self.placed => return Err(OrderError::AlreadyPlaced),
            OrderCommand::Place { lines, payment_timeout } => {
                OrderEvent::Placed { lines: lines.clone(), payment_timeout: *payment_timeout }.into()
            }
            OrderCommand::Ship if self.cancelled => return Err(OrderError::Cancelled),
            OrderCommand::Accept => OrderEvent::Accepted.into(),
            OrderCommand::Ship => OrderEvent::Shipped.into(),
            OrderCommand::Cancel => OrderEvent::Cancelled.into(),
        })
    }

    fn apply(&mut self, event: &OrderEvent) {
        match event {
            OrderEvent::Placed { .. } => self.placed = true,
            OrderEvent::Cancelled => self.cancelled = true,
            OrderEvent::Accepted | OrderEvent::Shipped => {}
        }
    }
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum StockEvent {
    Received { pieces: u64 },
    Reserved { order: String, pieces: u64 },
    Released { order: String, pieces: u64 },
}

impl Event for StockEvent {
    const CATEGORY: &'static str = "stock";
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum StockCommand {
    Receive { pieces: u64 },
    Reserve { order: String, pieces: u64 },
    Release { order: String, pieces: u64 },
}

#[derive(Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[error("only {left} pieces are left")]
pub(crate) struct SoldOut {
    left: u64,
}

/// The stock of a product.
#[derive(Debug, Default)]
pub(crate) struct Stock {
    left: u64,
}

impl Aggregate for Stock {
    type Event = StockEvent;
    type Command = StockCommand;
    type Reply = ();
    type Error = SoldOut;

    fn handle(&self, command: &StockCommand, _: &Context<'_>) -> Decided<Self> {
        Ok(match command {
            StockCommand::Receive { pieces } => StockEvent::Received { pieces: *pieces }.into(),
            StockCommand::Reserve { pieces, .. } if *pieces > self.left => {
                return Err(SoldOut { left: self.left });
            }
            StockCommand::Reserve { order, pieces } => {
                StockEvent::Reserved { order: order.clone(), pieces: *pieces }.into()
            }
            StockCommand::Release { order, pieces } => {
                StockEvent::Released { order: order.clone(), pieces: *pieces }.into()
            }
        })
    }

    fn apply(&mut self, event: &StockEvent) {
        match event {
            StockEvent::Received { pieces } | StockEvent::Released { pieces, .. } => self.left += pieces,
            StockEvent::Reserved { pieces, .. } => self.left -= pieces,
        }
    }
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum PaymentEvent {
    Captured { amount: u64 },
    Refunded { amount: u64 },
}

impl Event for PaymentEvent {
    const CATEGORY: &'static str = "payment";
}

/// The books of the provider for an order. They do not prevent a second capture: the id of the
/// command does.
#[derive(Debug, Default)]
pub(crate) struct Payment;

impl Aggregate for Payment {
    type Event = PaymentEvent;
    type Command = PaymentCommand;
    type Reply = ();
    type Error = NeverRejects;

    fn handle(&self, command: &PaymentCommand, _: &Context<'_>) -> Decided<Self> {
        Ok(match *command {
            PaymentCommand::Charge { amount, .. } => PaymentEvent::Captured { amount }.into(),
            PaymentCommand::Refund { amount, .. } => PaymentEvent::Refunded { amount }.into(),
        })
    }

    fn apply(&mut self, _: &PaymentEvent) {}
}

/// The behaviour of the payment provider.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Provider {
    Fine,
    /// Takes up to 3 seconds.
    Slow,
    /// Declines every payment.
    Failing,
    /// Every second attempt fails, before or after the money has moved.
    Flaky,
}

/// A fake payment provider.
#[derive(Debug)]
pub(crate) struct Payments(pub(crate) Provider);

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum PaymentCommand {
    Charge { order: String, amount: u64 },
    Refund { order: String, amount: u64 },
}

#[derive(Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[error("the payment is declined")]
pub(crate) struct Declined;

impl Handler for Payments {
    const NAME: &'static str = "payment";
    type Command = PaymentCommand;
    type Reply = ();
    type Error = Declined;

    async fn handle(
        &self,
        command: &PaymentCommand,
        context: &HandlerContext,
    ) -> Result<(), HandleError<Declined>> {
        let dice = Uuid::new_v4().as_u128();
        let fails = (self.0 == Provider::Flaky).then_some(dice % 4);
        let charges = matches!(command, PaymentCommand::Charge { .. });
        if self.0 == Provider::Slow && charges {
            sleep(Duration::from_millis(u64::try_from(dice % 3_000).unwrap_or(0))).await;
        }
        if self.0 == Provider::Failing && charges {
            return Err(HandleError::Rejected(Declined));
        }
        if fails == Some(0) {
            return Err(HandleError::Failed("the provider did not answer".into()));
        }
        let (PaymentCommand::Charge { order, .. } | PaymentCommand::Refund { order, .. }) = command;
        // Repeated attempts give the same id, so the money moves once.
        context.execute::<Payment>(order, command.clone()).await?;
        if fails == Some(1) {
            return Err(HandleError::Failed("the answer of the provider was lost".into()));
        }
        Ok(())
    }
}

/// The fulfilment of an order.
#[derive(Debug, Default)]
pub(crate) struct Fulfilment {
    /// Number of steps that are open before the payment.
    open: usize,
    pieces: u64,
    payment_timeout: Duration,
}

impl Process for Fulfilment {
    const NAME: &'static str = "fulfilment";
    type Event = OrderEvent;

    fn routes() -> Routes<OrderEvent> {
        Routes::new().starts(["placed"], |_: &OrderEvent, recorded| recorded.stream.id().to_owned())
    }

    fn react(&self, input: Input<'_, OrderEvent>, context: &ProcessContext<'_>) -> Next {
        let order = context.id();
        match input {
            Input::Event(OrderEvent::Placed { lines, .. }) => {
                let accept = Next::new()
                    .execute::<Order>("accept", order, OrderCommand::Accept)
                    .undo::<Order>(order, OrderCommand::Cancel);
                lines.iter().fold(accept, |next, Line { product, pieces }| {
                    let (order, pieces) = (order.to_owned(), *pieces);
                    let reserve = StockCommand::Reserve { order: order.clone(), pieces };
                    next.execute::<Stock>(format!("reserve {product}"), product, reserve)
                        .undo::<Stock>(product, StockCommand::Release { order, pieces })
                })
            }
            Input::Done { effect: "charge", .. } => {
                Next::new().cancel("unpaid").execute::<Order>("ship", order, OrderCommand::Ship)
            }
            Input::Done { effect: "ship", .. } => Next::new().complete(),
            Input::Done { .. } if self.open == 1 => {
                let (order, amount) = (order.to_owned(), self.pieces * PRICE);
                let charge = PaymentCommand::Charge { order: order.clone(), amount };
                Next::new()
                    .execute_handler::<Payments>("charge", charge)
                    .undo_handler::<Payments>(PaymentCommand::Refund { order, amount })
                    .after("unpaid", self.payment_timeout)
            }
            Input::Rejected { .. } | Input::Due { timer: "unpaid" } => Next::compensate(),
            _ => Next::none(),
        }
    }

    fn apply(&mut self, input: Input<'_, OrderEvent>) {
        match input {
            Input::Event(OrderEvent::Placed { lines, payment_timeout }) => {
                self.open = 1 + lines.len();
                self.pieces = lines.iter().map(|line| line.pieces).sum();
                self.payment_timeout = Duration::from_millis(*payment_timeout);
            }
            Input::Done { effect: "charge" | "ship", .. } => {}
            Input::Done { .. } => self.open -= 1,
            _ => {}
        }
    }
}
