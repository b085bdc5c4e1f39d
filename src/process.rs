//! Process managers: react to events with commands and timers, over several aggregates.
//!
//! A [`Process`] is plain, synchronous user code. Each instance has a stream in the category of the
//! process. The stream holds its inputs and its effects. One reaction is one append: the input, and
//! the effects that it causes. After the append, the node that owns the process sends the commands.
//! The answer to a command is a further input.
//!
//! ```text
//!  log ─► follower ─► instance (input + effects, one append) ─► command ─► aggregate or handler
//!            ▲            ▲        │                               │
//!         owned by        │        └─► timers ─► due ──► input     └─► answer: done or refused ─► input
//!         one node        └──────────────────────────────────────────────────┘
//! ```
//!
//! Guarantee (I12): an instance consumes each input once, and each of its effects takes effect once.
//! The stream of the instance records each input, so a repeated delivery has no effect. The id of a
//! command is a function of the process, the instance, the input and the effect's key, so a repeated
//! command has no effect either. A reset of the follower adds no command and no timer.
//!
//! If the user's code panics, an input does not decode, or an effect fails permanently, this
//! instance alone is parked: it records further inputs, and reacts to them after a
//! [retry](InstanceHandle::retry).

mod attempt;
mod batch;
mod command;
mod context;
mod counters;
mod driver;
mod drivers;
mod error;
mod event;
mod firing;
mod follower;
mod handle;
mod history;
mod input;
mod instance;
mod instance_event;
mod instance_page;
mod next;
mod operator;
mod options;
mod reaction;
mod record;
mod request;
mod resumption;
mod routes;
mod start;
mod status;
mod timer_writer;
#[cfg(feature = "testing")]
pub(crate) mod trial;
mod unresolved;
mod work;

pub use self::context::ProcessContext;
pub use self::error::{AnswerError, RequestError};
pub(crate) use self::follower::{ProcessFollower, follower_name};
pub use self::handle::InstanceHandle;
pub use self::input::{Input, Rejection, Reply};
pub use self::instance_page::{InstancePage, ReadInstances};
pub use self::next::Next;
pub use self::operator::{ProcessOperator, ProcessRecord};
pub use self::options::ProcessOptions;
pub use self::routes::{InstanceIds, Routes};
pub use self::start::ProcessStatus;
pub(crate) use self::start::{ProcessServices, RunningProcess, record_process_start, spawn};
pub use self::status::{InstanceState, InstanceStatus, OpenEffect, OpenTimer};

use crate::event::EventSet;

/// A process manager: its routes, its reactions and its state.
///
/// `react` must do no I/O. It runs until its outcome is stored, and never after that, so it may use
/// clocks and random numbers. `apply` runs at each load of the instance, so it depends on its input
/// alone. A new version of the program continues running instances from their next input.
///
/// ```
/// # use serde::{Deserialize, Serialize};
/// # use std::time::Duration;
/// # use storied::{Aggregate, Context, Decided, Decision, Event, NeverRejects};
/// use storied::event::{EventDecoder, EventSet};
/// use storied::process::{Input, Next, Process, ProcessContext, Routes};
///
/// # #[derive(Serialize, Deserialize)] #[serde(rename_all = "snake_case")]
/// # enum OrderEvent { Placed { amount: u64 }, Cancelled }
/// # impl Event for OrderEvent { const CATEGORY: &'static str = "order"; }
/// # #[derive(Serialize, Deserialize)] #[serde(rename_all = "snake_case")]
/// # enum PaymentEvent { Received { order: String } }
/// # impl Event for PaymentEvent { const CATEGORY: &'static str = "payment"; }
/// # #[derive(Default)] struct Parcel;
/// # #[derive(Serialize, Deserialize)] enum ParcelEvent { Sent }
/// # impl Event for ParcelEvent { const CATEGORY: &'static str = "parcel"; }
/// # #[derive(Serialize, Deserialize)] struct Send;
/// # impl Aggregate for Parcel {
/// #     type Event = ParcelEvent; type Command = Send; type Reply = (); type Error = NeverRejects;
/// #     fn handle(&self, _: &Send, _: &Context<'_>) -> Decided<Self> { Ok(ParcelEvent::Sent.into()) }
/// #     fn apply(&mut self, _: &ParcelEvent) {}
/// # }
/// enum ShippingEvent {
///     Order(OrderEvent),
///     Payment(PaymentEvent),
/// }
///
/// impl EventSet for ShippingEvent {
///     fn decoder() -> EventDecoder<Self> {
///         EventDecoder::new().with(Self::Order).with(Self::Payment)
///     }
/// }
///
/// #[derive(Default)]
/// struct Shipping;
///
/// impl Process for Shipping {
///     const NAME: &'static str = "shipping";
///     type Event = ShippingEvent;
///
///     fn routes() -> Routes<ShippingEvent> {
///         Routes::new()
///             .starts(["placed"], |_: &OrderEvent, recorded| recorded.stream.id().to_owned())
///             .continues(["received"], |event: &PaymentEvent, _| {
///                 let PaymentEvent::Received { order } = event;
///                 order.clone()
///             })
///     }
///
///     fn react(&self, input: Input<'_, ShippingEvent>, context: &ProcessContext<'_>) -> Next {
///         match input {
///             Input::Event(ShippingEvent::Order(_)) => Next::new().after("unpaid", Duration::from_secs(900)),
///             Input::Event(ShippingEvent::Payment(_)) => {
///                 Next::new().cancel("unpaid").execute::<Parcel>("send", context.id(), Send)
///             }
///             Input::Done { effect: "send", .. } | Input::Due { timer: "unpaid" } => Next::new().complete(),
///             _ => Next::none(),
///         }
///     }
/// }
/// ```
pub trait Process: Default + Send + Sync + 'static {
    /// Name of the process, and category of the streams of its instances.
    ///
    /// It consists of dotted tokens of ASCII letters, digits, `_` and `-`, and must stay the same
    /// while the program evolves.
    const NAME: &'static str;

    /// The events that it reacts to: an [`Event`](crate::Event), or an [`EventSet`] over several.
    type Event: EventSet;

    /// Returns the events that start or continue an instance, and the ids of these instances.
    ///
    /// Called when the process is registered. If a route is invalid, for example because of an
    /// unknown variant, the runtime does not start.
    fn routes() -> Routes<Self::Event>;

    /// Reacts to an input. `self` is the state before the input.
    ///
    /// A panic parks the instance.
    fn react(&self, input: Input<'_, Self::Event>, context: &ProcessContext<'_>) -> Next;

    /// Folds an input into the state. Default: the process has no state.
    ///
    /// It cannot reject the input, which is recorded.
    fn apply(&mut self, input: Input<'_, Self::Event>) {
        let _ = input;
    }
}
