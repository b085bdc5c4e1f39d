//! Filters and hooks of the command bus.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::{Dispatched, ExecuteError};
use crate::event::Metadata;
use crate::panic::{caught, text_of};

/// The view of a command that filters and hooks get.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct CommandInfo<'a> {
    /// Category of the aggregate, or name of the handler or decision.
    pub name: &'a str,
    /// Id of the aggregate, key from the handler, or id of the decision's stream.
    pub key: Option<&'a str>,
    /// Id of the command.
    pub id: Uuid,
    /// Metadata of the command.
    pub metadata: &'a Metadata,
}

/// The end of a command, as hooks get it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct CommandEnd {
    /// Duration on the executing node.
    pub runtime: Duration,
    /// Error, if the command has no receipt.
    pub error: Option<String>,
}

type Before = dyn Fn(&CommandInfo<'_>) -> Result<(), String> + Send + Sync;
type After = dyn Fn(&CommandInfo<'_>, &CommandEnd) + Send + Sync;
type Filter = dyn Fn(&CommandInfo<'_>) -> bool + Send + Sync;

/// The filters and hooks of a node. They run on the node that executes the command.
#[derive(Clone, Default)]
pub(crate) struct CommandHooks {
    filters: Vec<Arc<Filter>>,
    /// Hooks for commands of one name, or for all commands.
    before: Vec<(Option<String>, Arc<Before>)>,
    after: Vec<(Option<String>, Arc<After>)>,
}

impl CommandHooks {
    pub(super) fn add_filter(&mut self, filter: Arc<Filter>) {
        self.filters.push(filter);
    }

    pub(super) fn add_before(&mut self, name: Option<String>, hook: Arc<Before>) {
        self.before.push((name, hook));
    }

    pub(super) fn add_after(&mut self, name: Option<String>, hook: Arc<After>) {
        self.after.push((name, hook));
    }

    /// Returns whether this node accepts the command.
    ///
    /// # Errors
    /// If a filter panics.
    pub(super) fn accepts(&self, info: &CommandInfo<'_>) -> Result<bool, String> {
        caught(|| self.filters.iter().all(|filter| filter(info)))
            .map_err(|panic| format!("a filter of the command bus panicked: {panic}"))
    }

    /// Runs the hooks before a command. The first error refuses the command.
    pub(super) fn before(&self, info: &CommandInfo<'_>) -> Result<(), String> {
        let mut hooks = self.before.iter().filter(|(name, _)| concerns(name, info));
        caught(|| hooks.try_for_each(|(_, hook)| hook(info)))
            .unwrap_or_else(|panic| Err(format!("a hook before the command panicked: {panic}")))
    }

    /// Runs the hooks after a command. A panic in a hook does not change the result.
    fn after<T, E: std::error::Error>(
        &self,
        info: &CommandInfo<'_>,
        runtime: Duration,
        result: &Result<T, ExecuteError<E>>,
    ) {
        let end = CommandEnd { runtime, error: result.as_ref().err().map(text_of) };
        for (_, hook) in self.after.iter().filter(|(name, _)| concerns(name, info)) {
            if let Err(panic) = caught(|| hook(info, &end)) {
                tracing::error!(command = %info.id, name = info.name, panic, "hook after command panicked");
            }
        }
    }
}

fn concerns(name: &Option<String>, info: &CommandInfo<'_>) -> bool {
    name.as_deref().is_none_or(|name| name == info.name)
}

impl fmt::Debug for CommandHooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CommandHooks")
            .field("filters", &self.filters.len())
            .field("before", &self.before.len())
            .field("after", &self.after.len())
            .finish()
    }
}

/// The hooks after one command, with the command's data.
pub(super) struct AfterHooks {
    hooks: CommandHooks,
    name: String,
    key: Option<String>,
    id: Uuid,
    metadata: Metadata,
}

impl AfterHooks {
    /// Returns `None` if no hook runs after the command.
    pub(super) fn of(hooks: &CommandHooks, info: &CommandInfo<'_>) -> Option<Self> {
        let CommandInfo { name, key, id, metadata } = *info;
        hooks.after.iter().any(|(concerned, _)| concerns(concerned, info)).then(|| Self {
            hooks: hooks.clone(),
            name: name.to_owned(),
            key: key.map(Into::into),
            id,
            metadata: metadata.clone(),
        })
    }

    /// Runs the hooks when the command ends, even if its caller has stopped waiting.
    pub(super) fn over<T, E>(self, dispatched: Dispatched<T, E>) -> Dispatched<T, E>
    where
        T: Send + 'static,
        E: std::error::Error + Send + 'static,
    {
        let Self { hooks, name, key, id, metadata } = self;
        let task = tokio::spawn(async move {
            let report = dispatched.report().await;
            let info = CommandInfo { name: &name, key: key.as_deref(), id, metadata: &metadata };
            hooks.after(&info, report.runtime, &report.result);
            (report.result, report.runtime)
        });
        Dispatched::new(id, async move {
            task.await.unwrap_or_else(|_| {
                let reason = "the runtime ended before an answer arrived".to_owned();
                (Err(ExecuteError::OutcomeUnknown { command_id: id, reason }), Duration::ZERO)
            })
        })
    }
}
