//! The implementation without the feature `otel`: no metrics, no trace context.

use std::time::Duration;

use tracing::Span;

use super::trace::Destination;
use crate::event::Metadata;

#[derive(Debug, Clone, Default)]
pub(crate) struct Metrics(());

#[derive(Debug, Clone, Copy)]
pub(crate) struct Timer;

impl Timer {
    pub(crate) fn start() -> Self {
        Self
    }
}

impl Metrics {
    pub(crate) fn command(&self, _: &'static str, _: Duration, _: Option<&'static str>) {}
    pub(crate) fn command_retried(&self, _: &'static str) {}
    pub(crate) fn appended(&self, _: Timer, _: usize, _: Option<&'static str>) {}
    pub(crate) fn lease(&self, _: &str, _: &'static str) {}
    pub(crate) fn applied(&self, _: &str, _: Duration) {}
    pub(crate) fn snapshot(&self, _: &str, _: Option<&'static str>) {}
    pub(crate) fn published(&self, _: Destination<'_>, _: Timer, _: usize, _: Option<&'static str>) {}
}

#[cfg(feature = "nats")]
impl Metrics {
    pub(crate) fn connecting(&self, _: &'static str) {}
    pub(crate) fn connected(&self, _: &'static str, _: Timer, _: Option<&'static str>) {}
    pub(crate) fn connection_failed(&self, _: &'static str, _: &'static str) {}
    pub(crate) fn connection_lost(&self, _: &'static str) {}
    pub(crate) fn reconnected(&self, _: &'static str) {}
    pub(crate) fn closed(&self, _: &'static str, _: Timer, _: Option<&'static str>) {}
    pub(crate) fn consumed(&self, _: Destination<'_>, _: bool) {}
    pub(crate) fn settled(&self, _: Destination<'_>, _: &'static str, _: Timer, _: Option<&'static str>) {}
    pub(crate) fn processed(&self, _: Destination<'_>, _: Timer, _: Option<&'static str>) {}
    pub(crate) fn dead_letter(&self, _: Destination<'_>) {}
    pub(crate) fn consumer(&self, _: Destination<'_>, _: &str, _: u64, _: u64) {}
    pub(crate) fn log_stream(&self, _: Destination<'_>, _: u64, _: u64) {}
}

pub(super) fn enter(_: &Metadata) -> Option<()> {
    None
}

pub(super) fn inject(_: &Span, _: &mut Metadata) {}

pub(super) fn link<'a>(_: &Span, _: impl Iterator<Item = &'a Metadata>) {}

/// Returns true: without sampling, every event has its span.
pub(super) fn is_sampled(_: &Metadata) -> bool {
    true
}
