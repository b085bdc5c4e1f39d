//! An append that waits for its transaction.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::super::append::AppendError;
use crate::event::{NewEvent, Position, StreamId, Version};

/// The result of an append.
pub(crate) type AppendResult = Result<Committed, AppendError>;

/// A durable append.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Committed {
    /// Position of the last event.
    pub(crate) position: Position,
}

/// A chain of appends, each decided on events of the previous one that were not durable yet.
///
/// If an append fails, the writer breaks the chain and refuses the rest of it, even if an expected
/// version happens to match: the rest was decided on events that do not exist.
#[derive(Debug, Clone)]
pub(crate) struct SpeculationChain(Arc<AtomicBool>);

impl SpeculationChain {
    pub(crate) fn new() -> Self {
        Self(Arc::new(AtomicBool::new(true)))
    }

    pub(super) fn holds(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    pub(super) fn cut(&self) {
        self.0.store(false, Ordering::Release);
    }
}

/// An append to one stream at exactly the version `expected`.
pub(crate) struct PendingAppend {
    pub(crate) stream: StreamId,
    pub(crate) expected: Version,
    pub(crate) events: Vec<NewEvent>,
    pub(crate) chain: SpeculationChain,
    /// Maximum number of appends in its transaction: no limit at first, then halved each time the
    /// store refuses the content of its transaction.
    pub(crate) batch_limit: usize,
    /// Called once, from the writer's task; must not block.
    pub(crate) done: Box<dyn FnOnce(AppendResult) + Send>,
}

impl PendingAppend {
    pub(super) fn bytes(&self) -> usize {
        self.events.iter().map(|event| event.payload.len() + event.metadata.len() + 64).sum()
    }
}
