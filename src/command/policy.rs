//! Which commands a node takes, and what it does around each.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::ExecuteError;
use crate::event::Metadata;
use crate::panic::{caught, text_of};

/// A command, as filters and hooks see it.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct CommandInfo<'a> {
    /// The aggregate's category, or the handler's name.
    pub name: &'a str,
    /// The aggregate's id, or the key that the handler gave the command.
    pub key: Option<&'a str>,
    /// The command's id.
    pub id: Uuid,
    /// What came with it.
    pub metadata: &'a Metadata,
}

/// How a command ended, as hooks see it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct CommandEnd {
    /// How long it took where it was executed.
    pub runtime: Duration,
    /// Why there is no receipt, if there is none.
    pub error: Option<String>,
}

type Before = dyn Fn(&CommandInfo<'_>) -> Result<(), String> + Send + Sync;
type After = dyn Fn(&CommandInfo<'_>, &CommandEnd) + Send + Sync;
type Filter = dyn Fn(&CommandInfo<'_>) -> bool + Send + Sync;

/// The filters and hooks of a node. They run where the command is executed, whoever sent it.
#[derive(Clone, Default)]
pub(crate) struct Policy {
    filters: Vec<Arc<Filter>>,
    /// For commands of one name, or for all.
    before: Vec<(Option<String>, Arc<Before>)>,
    after: Vec<(Option<String>, Arc<After>)>,
}

impl Policy {
    pub(super) fn add_filter(&mut self, filter: Arc<Filter>) {
        self.filters.push(filter);
    }

    pub(super) fn add_before(&mut self, name: Option<String>, hook: Arc<Before>) {
        self.before.push((name, hook));
    }

    pub(super) fn add_after(&mut self, name: Option<String>, hook: Arc<After>) {
        self.after.push((name, hook));
    }

    /// Whether this node takes the command.
    ///
    /// # Errors
    /// When a filter panics.
    pub(super) fn takes(&self, info: &CommandInfo<'_>) -> Result<bool, String> {
        caught(|| self.filters.iter().all(|filter| filter(info)))
            .map_err(|panic| format!("a filter of the command bus panicked: {panic}"))
    }

    /// Runs the hooks before a command. The first that refuses ends it.
    pub(super) fn begin(&self, info: &CommandInfo<'_>) -> Result<(), String> {
        let mut hooks = self.before.iter().filter(|(name, _)| concerns(name, info));
        caught(|| hooks.try_for_each(|(_, hook)| hook(info)))
            .unwrap_or_else(|panic| Err(format!("a hook before the command panicked: {panic}")))
    }

    /// Whether somebody wants to know how the command ends.
    pub(super) fn watches(&self, name: &str) -> bool {
        self.after.iter().any(|(concerned, _)| concerned.as_deref().is_none_or(|concerned| concerned == name))
    }

    /// Runs the hooks after a command. Their panics change nothing: the command has ended.
    pub(super) fn end<T, E: std::error::Error>(
        &self,
        info: &CommandInfo<'_>,
        runtime: Duration,
        result: &Result<T, ExecuteError<E>>,
    ) {
        let end = CommandEnd { runtime, error: result.as_ref().err().map(text_of) };
        for (_, hook) in self.after.iter().filter(|(name, _)| concerns(name, info)) {
            if let Err(panic) = caught(|| hook(info, &end)) {
                tracing::error!(command = %info.id, name = info.name, panic, "a hook after a command panicked");
            }
        }
    }
}

fn concerns(name: &Option<String>, info: &CommandInfo<'_>) -> bool {
    name.as_deref().is_none_or(|name| name == info.name)
}

impl fmt::Debug for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Policy")
            .field("filters", &self.filters.len())
            .field("before", &self.before.len())
            .field("after", &self.after.len())
            .finish()
    }
}
