//! Commands with a reply of their own.

use std::any::type_name;

use super::{Execute, ExecuteError, Receipt, ToAggregate};
use crate::aggregate::Aggregate;
use crate::future::BoxFuture;

/// A type of command with its own type of reply.
///
/// For an aggregate that gives different commands different replies: its
/// [`Reply`](Aggregate::Reply) is an enum, and each command type selects its variant.
///
/// ```
/// use serde::{Deserialize, Serialize};
/// use storied::{Aggregate, Command, Context, Decided, Decision, Event, MemoryStore, NeverRejects, Runtime};
///
/// # #[derive(Default)] struct Stock { units: u64 }
/// # #[derive(Serialize, Deserialize)] enum StockEvent { Added { units: u64 } }
/// # impl Event for StockEvent { const CATEGORY: &'static str = "stock"; }
/// # #[derive(Serialize, Deserialize)] enum StockCommand { Add { units: u64 }, Count }
/// #[derive(Serialize, Deserialize)]
/// enum StockReply { Added, Counted { units: u64 } }
///
/// impl Aggregate for Stock {
///     type Reply = StockReply;
/// #   type Event = StockEvent; type Command = StockCommand; type Error = NeverRejects;
///     fn handle(&self, command: &StockCommand, _: &Context) -> Decided<Self> {
///         Ok(match *command {
///             StockCommand::Add { units } => Decision::event(StockEvent::Added { units }).reply(StockReply::Added),
///             StockCommand::Count => Decision::none().reply(StockReply::Counted { units: self.units }),
///         })
///     }
/// #   fn apply(&mut self, StockEvent::Added { units }: &StockEvent) { self.units += units; }
/// }
///
/// struct Count;
///
/// impl From<Count> for StockCommand {
///     fn from(_: Count) -> Self { Self::Count }
/// }
///
/// impl Command for Count {
///     type Aggregate = Stock;
///     type Reply = u64;
///     fn reply(reply: StockReply) -> Option<u64> {
///         if let StockReply::Counted { units } = reply { Some(units) } else { None }
///     }
/// }
///
/// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let runtime = Runtime::builder().store(MemoryStore::new()).aggregate::<Stock>().start().await?;
/// runtime.execute::<Stock>("tea", StockCommand::Add { units: 3 }).await?;
/// let units: u64 = runtime.execute_command("tea", Count).await?.reply;
/// assert_eq!(units, 3);
/// # runtime.shutdown().await?;
/// # Ok(()) }
/// ```
pub trait Command: Into<<Self::Aggregate as Aggregate>::Command> {
    /// Aggregate that decides on the command.
    type Aggregate: Aggregate;
    /// Reply to this command.
    type Reply: Send + 'static;

    /// Converts the reply of the aggregate; `None` for the reply to another command.
    fn reply(reply: <Self::Aggregate as Aggregate>::Reply) -> Option<Self::Reply>;
}

/// A command with its own type of reply. Set its options, then await it for the receipt.
///
/// [`Runtime::execute_command`](crate::Runtime::execute_command) creates it.
#[derive(Debug)]
#[must_use = "a command does nothing until it is awaited"]
pub struct ExecuteCommand<C: Command> {
    request: Execute<ToAggregate<C::Aggregate>>,
}

impl<C: Command> ExecuteCommand<C> {
    pub(crate) fn new(request: Execute<ToAggregate<C::Aggregate>>) -> Self {
        Self { request }
    }

    /// Sets options of the command: `.with(|request| request.command_id(id))`.
    pub fn with(
        self,
        set: impl FnOnce(Execute<ToAggregate<C::Aggregate>>) -> Execute<ToAggregate<C::Aggregate>>,
    ) -> Self {
        Self { request: set(self.request) }
    }
}

impl<C: Command> IntoFuture for ExecuteCommand<C> {
    type Output = Result<Receipt<C::Reply>, ExecuteError<<C::Aggregate as Aggregate>::Error>>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        let request = self.request.into_future();
        Box::pin(async move {
            let (receipt, reply) = request.await?.split();
            match C::reply(reply) {
                Some(reply) => Ok(receipt.with_reply(reply)),
                None => {
                    let reason = format!("the aggregate gave no reply to {}", type_name::<C>());
                    Err(ExecuteError::unreadable_reply(receipt.command_id, Some(receipt), reason))
                }
            }
        })
    }
}
