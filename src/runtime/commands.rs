//! What the runtime does for commands: start handlers, wait for projections, forget old records.

use std::sync::Arc;
use std::time::Duration;

use ractor::SpawnErr;

use super::StartError;
use super::supervisor::Supervisor;
use crate::command::{Commands, Follow, Handler, HandlerOptions, HandlerRouter, Registry};
use crate::event::{InvalidName, Position, check_name};
use crate::future::BoxFuture;
use crate::invalid_option::InvalidOption;
use crate::projection::ProjectionHandle;
use crate::store::EventStore;

/// How often old records are looked for.
const FORGET_EVERY: Duration = Duration::from_secs(30 * 60);

/// How many are forgotten in one call.
const FORGET: usize = 1_000;

/// What is known of a handler until the runtime starts.
pub(super) struct HandlerRegistration {
    name: &'static str,
    options: Result<(), InvalidOption>,
    start: Box<StartHandler>,
}

type StartHandler = dyn FnOnce(&mut Registry, Arc<dyn EventStore>, &Arc<Commands>, &Supervisor) -> Result<(), SpawnErr>
    + Send;

impl HandlerRegistration {
    pub(super) fn new<H: Handler>(handler: H, options: HandlerOptions) -> Self {
        let checked = options.validate();
        let start =
            move |registry: &mut Registry, store, commands: &Arc<Commands>, supervisor: &Supervisor| {
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
        commands: &Arc<Commands>,
        supervisor: &Supervisor,
    ) -> Result<(), SpawnErr> {
        (self.start)(registry, store, commands, supervisor)
    }
}

/// Refuses handlers that commands could not be told apart for.
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

/// The projections of this node, for commands whose caller waits for one.
pub(super) struct Following(pub(super) Vec<ProjectionHandle>);

impl Follow for Following {
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

/// Forgets what became of commands longer ago than `age`, for as long as it is polled.
pub(super) async fn forgetting(store: Arc<dyn EventStore>, age: Duration) {
    loop {
        loop {
            match store.forget_commands(age, FORGET).await {
                Ok(forgotten) if forgotten == FORGET => {}
                Ok(_) => break,
                Err(error) => {
                    tracing::warn!(%error, "old records of commands are kept for longer; they are looked for again");
                    break;
                }
            }
        }
        tokio::time::sleep(FORGET_EVERY).await;
    }
}
