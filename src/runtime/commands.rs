//! The runtime's part of commands: handlers, waiting for projections, expired records.

use std::sync::Arc;
use std::time::Duration;

use ractor::SpawnErr;

use super::error::StartError;
use super::supervisor::Supervisor;
use crate::command::{Dispatcher, Handler, HandlerOptions, HandlerRouter, ProjectionWaiter, Registry};
use crate::event::{InvalidName, Position, check_name};
use crate::future::BoxFuture;
use crate::invalid_option::InvalidOption;
use crate::projection::ProjectionHandle;
use crate::store::EventStore;

/// Interval between deletions of expired records.
const FORGET_EVERY: Duration = Duration::from_secs(30 * 60);

/// Maximum number of records that one call deletes.
const FORGET: usize = 1_000;

/// A registered handler, until the runtime starts.
pub(super) struct HandlerRegistration {
    name: &'static str,
    options: Result<(), InvalidOption>,
    start: Box<StartHandler>,
}

type StartHandler = dyn FnOnce(&mut Registry, Arc<dyn EventStore>, &Arc<Dispatcher>, &Supervisor) -> Result<(), SpawnErr>
    + Send;

impl HandlerRegistration {
    pub(super) fn new<H: Handler>(handler: H, options: HandlerOptions) -> Self {
        let checked = options.validate();
        let start =
            move |registry: &mut Registry, store, commands: &Arc<Dispatcher>, supervisor: &Supervisor| {
                let (commands, root) = (Arc::downgrade(commands), supervisor.cell());
                let router = HandlerRouter::start(handler, options, store, commands, root)?;
                supervisor.adopt(Box::new(router.clone()));
                registry.add_handler(router);
                Ok(())
            };
        Self { name: H::NAME, options: checked, start: Box::new(start) }
    }

    pub(super) fn start(
        self,
        registry: &mut Registry,
        store: Arc<dyn EventStore>,
        commands: &Arc<Dispatcher>,
        supervisor: &Supervisor,
    ) -> Result<(), SpawnErr> {
        (self.start)(registry, store, commands, supervisor)
    }
}

/// Rejects invalid and duplicate names of handlers.
pub(super) fn check(handlers: &[HandlerRegistration]) -> Result<(), StartError> {
    for (index, HandlerRegistration { name, options, .. }) in handlers.iter().enumerate() {
        check_name("handler name", name).map_err(|error: InvalidName| StartError::HandlerName(error))?;
        if handlers[..index].iter().any(|other| other.name == *name) {
            return Err(StartError::SameHandler { name });
        }
        options.clone()?;
    }
    Ok(())
}

/// The projections of this node, for callers that wait until one has applied their events.
pub(super) struct Following(pub(super) Vec<ProjectionHandle>);

impl ProjectionWaiter for Following {
    fn names(&self) -> Vec<String> {
        self.0.iter().map(|projection| projection.name().to_owned()).collect()
    }

    fn caught_up<'a>(
        &'a self,
        name: &'a str,
        position: Position,
        patience: Duration,
    ) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(async move {
            let projection = self.0.iter().find(|projection| projection.name() == name);
            let projection =
                projection.ok_or_else(|| format!("there is no projection {name:?} on this node"))?;
            projection.caught_up_to_within(position, patience).await.map_err(|error| error.to_string())
        })
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
