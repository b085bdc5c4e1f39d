//! Decisions over several streams.
//!
//! A command that implements [`Decide`] is decided over the events that match a
//! [query](crate::store::Query), in any streams. Each [`View`] of the decision has a query, and
//! folds its events. The events of the decision are appended only if no other event matches one of
//! the queries meanwhile (I13). Otherwise the command is decided again.
//!
//! ```text
//! decide ─► read the matching events ─► fold ─► decide ─► append unless others match ─► receipt
//!                      ▲                                          │
//!                      └────── backoff ◄──── others matched ◄─────┘
//! ```
//!
//! A decision runs on the node of its caller. It needs no actor, no registration and no owner.

mod attempts;
mod queried_view;
mod view;

use serde::Serialize;
use serde::de::DeserializeOwned;

pub(crate) use self::attempts::{DecisionRequest, DecisionResult, decide_and_append};
pub(crate) use self::queried_view::QueriedView;
pub use self::view::{View, Views};
use crate::aggregate::{Context, Decision};
use crate::event::Event;

/// A command that is decided over the events that match a query.
///
/// The value is the command: its content decides whether a repeated command id is the same command.
/// The code is pure, as that of an [`Aggregate`](crate::Aggregate): no I/O, and no clock or
/// randomness except those of [`Context`]. A command may be decided more than once before its
/// events are stored. Only [`Runtime::decide`](crate::Runtime::decide) executes it. A decision
/// cannot be scheduled or dispatched, and no handler or process can send it.
///
/// If one stream holds everything that the decision needs, choose an aggregate: it keeps its state
/// in memory.
///
/// ```
/// use serde::{Deserialize, Serialize};
/// use storied::event::Tags;
/// use storied::store::Query;
/// use storied::{
///     Context, Decide, Decision, DecisionOf, Event, MemoryStore, NeverRejects, Runtime, View,
/// };
///
/// #[derive(Serialize, Deserialize)]
/// #[serde(rename_all = "snake_case")]
/// enum SeatEvent { Taken { seat: String, guest: String } }
///
/// impl Event for SeatEvent {
///     const CATEGORY: &'static str = "seat";
///     fn tags(&self) -> Tags {
///         let SeatEvent::Taken { guest, .. } = self;
///         Tags::new().tag("guest", guest)
///     }
/// }
///
/// /// The number of seats of a guest, in any stream.
/// struct SeatsOf { guest: String, seats: u32 }
///
/// impl View for SeatsOf {
///     type Event = SeatEvent;
///     fn query(&self) -> Query { Query::tagged("guest", &self.guest) }
///     fn apply(&mut self, _: &SeatEvent) { self.seats += 1; }
/// }
///
/// #[derive(Serialize)]
/// struct Take { seat: String, guest: String }
///
/// impl Decide for Take {
///     const NAME: &'static str = "take_seat";
///     type View = SeatsOf;
///     type Event = SeatEvent;
///     type Reply = ();
///     type Error = NeverRejects;
///
///     fn view(&self) -> SeatsOf { SeatsOf { guest: self.guest.clone(), seats: 0 } }
///     fn stream(&self) -> String { self.seat.clone() }
///     fn decide(&self, view: &SeatsOf, _: &Context<'_>) -> DecisionOf<Self> {
///         if view.seats > 0 {
///             return Ok(Decision::none()); // the guest has a seat
///         }
///         Ok(SeatEvent::Taken { seat: self.seat.clone(), guest: self.guest.clone() }.into())
///     }
/// }
///
/// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let runtime = Runtime::builder().store(MemoryStore::new()).start().await?;
/// let take = |seat: &str| Take { seat: seat.into(), guest: "Ada".into() };
/// assert_eq!(runtime.decide(take("1A")).await?.events, 1);
/// assert_eq!(runtime.decide(take("1B")).await?.events, 0);
/// # runtime.shutdown().await?;
/// # Ok(()) }
/// ```
pub trait Decide: Serialize + Sized + Send + Sync + 'static {
    /// Name of the decision in spans and metrics, and part of its content.
    ///
    /// It consists of dotted tokens of ASCII letters, digits, `_` and `-`.
    const NAME: &'static str;
    /// State that the decision is based on: a [`View`], or a tuple of two to four of them.
    ///
    /// A tuple can contain tuples.
    type View: Views;
    /// Events that the decision writes. Their category is the category of the stream.
    type Event: Event;
    /// Reply to the command in addition to the receipt; `()` for none.
    ///
    /// The store keeps it with the last event, so that a repeated command gets the first reply.
    type Reply: Serialize + DeserializeOwned + Send + 'static;
    /// Reason for rejecting the command; [`NeverRejects`](crate::NeverRejects) for none.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Returns the view before its first event.
    fn view(&self) -> Self::View;

    /// Returns the id of the stream that gets the events.
    ///
    /// A decision reads any streams, and writes to this one. Choose a stream with few concurrent
    /// writers. Aggregates may write to it, too: a decision expects no version of it.
    fn stream(&self) -> String;

    /// Decides: events and a reply, or a rejection. Must have no side effects.
    ///
    /// [`Context::version`] is [`Version::NONE`](crate::Version::NONE): the decision is not based
    /// on a version of its stream.
    ///
    /// # Errors
    /// The reason for which the command is rejected.
    fn decide(&self, view: &Self::View, context: &Context<'_>) -> DecisionOf<Self>;
}

/// The outcome of [`Decide::decide`]: a decision, or the reason for rejecting the command.
pub type DecisionOf<D> = Result<Decision<<D as Decide>::Event, <D as Decide>::Reply>, <D as Decide>::Error>;
