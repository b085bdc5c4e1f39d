//! The runtime's part of commands: registrations and expired records.

use std::any::type_name;
use std::sync::{Arc, Weak};
use std::time::Duration;

use ractor::ActorCell;

use super::error::StartError;
use crate::aggregate::{self, Aggregate, AggregateOptions};
use crate::command::{Dispatcher, Handler, HandlerOptions, HandlerShared, Registry, ToAggregate, ToHandler};
use crate::event::{Event, EventTypes, check_name};
use crate::invalid_option::InvalidOption;
use crate::store::{EventStore, GroupCommitter};

/// Interval between deletions of expired records.
const FORGET_EVERY: Duration = Duration::from_secs(30 * 60);

/// Maximum number of records that one call deletes.
const FORGET: usize = 1_000;

/// A registered aggregate or handler, until the runtime starts.
pub(super) struct Registration {
    /// Category of the aggregate, or name of the handler.
    pub(super) name: &'static str,
    pub(super) type_name: &'static str,
    /// Checks the name and the types.
    check: Box<dyn Fn() -> Result<(), StartError> + Send>,
    options: Result<(), InvalidOption>,
    pub(super) start: Box<StartTarget>,
}

type StartTarget = dyn FnOnce(&mut Registry, TargetServices) -> Result<(), StartError> + Send;

/// The components that the actors of aggregates and handlers use.
#[derive(Clone)]
pub(super) struct TargetServices {
    pub(super) store: Arc<dyn EventStore>,
    pub(super) writer: GroupCommitter,
    pub(super) commands: Weak<Dispatcher>,
    pub(super) supervisor: ActorCell,
}

impl Registration {
    pub(super) fn aggregate<A: Aggregate>(options: AggregateOptions<A>) -> Self {
        Self {
            name: <A::Event as Event>::CATEGORY,
            type_name: type_name::<A>(),
            check: Box::new(|| Ok(EventTypes::of::<A::Event>().map(drop)?)),
            options: options.validate(),
            start: Box::new(move |registry, services| {
                let TargetServices { store, writer, supervisor, .. } = services;
                let shared = aggregate::Shared::new(store, writer, options)?;
                Ok(registry.start::<ToAggregate<A>>(shared, supervisor)?)
            }),
        }
    }

    pub(super) fn handler<H: Handler>(handler: H, options: HandlerOptions) -> Self {
        Self {
            name: H::NAME,
            type_name: type_name::<H>(),
            check: Box::new(|| Ok(check_name("handler name", H::NAME)?)),
            options: options.validate(),
            start: Box::new(move |registry, services| {
                let TargetServices { store, commands, supervisor, .. } = services;
                let shared = HandlerShared { handler, options, store, commands };
                Ok(registry.start::<ToHandler<H>>(shared, supervisor)?)
            }),
        }
    }

    /// Checks registrations of one kind. `same`: the error if two have the same name.
    pub(super) fn check(all: &[Self], same: impl Fn(&Self, &Self) -> StartError) -> Result<(), StartError> {
        for (index, one) in all.iter().enumerate() {
            if let Some(other) = all[..index].iter().find(|other| other.name == one.name) {
                return Err(same(other, one));
            }
            (one.check)()?;
            one.options.clone()?;
        }
        Ok(())
    }
}

/// Deletes records of commands that are older than `age`, for as long as it is polled.
pub(super) async fn forgetting(store: Arc<dyn EventStore>, age: Duration) {
    loop {
        loop {
            match store.forget_commands(age, FORGET).await {
                Ok(forgotten) if forgotten == FORGET => {}
                Ok(_) => break,
                Err(error) => {
                    tracing::warn!(%error, "could not delete expired records of commands; retrying at the next interval");
                    break;
                }
            }
        }
        tokio::time::sleep(FORGET_EVERY).await;
    }
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};

    use crate::command::ToAggregate;
    use crate::{Aggregate, Context, Decision, Event, ExecuteError, MemoryStore, NotExecutedKind, Runtime};

    #[derive(Default)]
    struct Light {
        switched: u64,
    }

    #[derive(Serialize, Deserialize)]
    enum LightEvent {
        Switched,
    }

    #[derive(Debug, Serialize, Deserialize, thiserror::Error)]
    #[error("never")]
    struct Never;

    impl Event for LightEvent {
        const CATEGORY: &'static str = "light";
    }

    impl Aggregate for Light {
        type Event = LightEvent;
        type Command = ();
        type Reply = u64;
        type Error = Never;

        fn handle(&self, (): &(), _: &Context<'_>) -> Result<Decision<LightEvent, u64>, Never> {
            Ok(Decision::event(LightEvent::Switched).reply(self.switched + 1))
        }

        fn apply(&mut self, _: &LightEvent) {
            self.switched += 1;
        }
    }

    #[tokio::test]
    async fn an_actor_that_ends_is_restarted() {
        let runtime =
            Runtime::builder().store(MemoryStore::new()).aggregate::<Light>().start().await.unwrap();
        for round in 1..=3 {
            loop {
                match runtime.execute::<Light>("hall", ()).await {
                    Ok(receipt) => break assert_eq!(receipt.reply, round),
                    // While the actor stops.
                    Err(ExecuteError::NotExecuted { kind: NotExecutedKind::Restarting { .. }, .. }) => {
                        tokio::task::yield_now().await
                    }
                    Err(error) => panic!("{error}"),
                }
            }
            let router = runtime.inner.commands.registry().router::<ToAggregate<Light>>().unwrap().actor();
            router.kill();
            while router.get_status() != ractor::ActorStatus::Stopped {
                tokio::task::yield_now().await;
            }
        }
        runtime.shutdown().await.unwrap();
    }
}
