//! The state that the terms of a publisher share: store, bus, options and status.

use std::borrow::Cow;
use std::sync::Arc;

use tokio::sync::watch;
use uuid::Uuid;

use super::super::options::PublisherOptions;
use super::super::status::{PublisherState, PublisherStatus};
use super::interruption::Interruption;
use crate::bus::{EventBus, LogBatch};
use crate::event::Position;
use crate::feed::Feed;
use crate::lease::LeaseRenewer;
use crate::store::EventStore;
use crate::telemetry::trace::{self, Destination, Publishing};
use crate::telemetry::{Metrics, Timer};

/// Name of the lease.
pub(super) const NAME: &str = "publisher";

pub(super) struct Shared {
    pub(super) store: Arc<dyn EventStore>,
    pub(super) feed: Feed,
    pub(super) renewer: LeaseRenewer,
    pub(super) bus: Arc<dyn EventBus>,
    pub(super) options: PublisherOptions,
    pub(super) node: Uuid,
    pub(super) metrics: Metrics,
    pub(super) status: watch::Sender<PublisherStatus>,
}

/// A batch that is being published.
pub(super) struct Sending {
    name: Cow<'static, str>,
    events: usize,
    spans: Publishing,
    timer: Timer,
}

impl Shared {
    pub(super) fn set(&self, state: PublisherState) {
        self.status.send_if_modified(|status| {
            let news = status.state != state;
            status.state = state;
            news
        });
    }

    /// Reports the end of the log.
    pub(super) fn saw(&self, head: Position) {
        self.status.send_if_modified(|status| {
            let head = status.head.max(Some(head));
            std::mem::replace(&mut status.head, head) != head
        });
    }

    /// Starts the span and the timer of a batch.
    pub(super) fn begin(&self, batch: &LogBatch) -> Sending {
        let (name, events) = (self.bus.destination(), batch.events.len());
        let to = Destination { system: trace::system(self.bus.name()), name: &name };
        let spans = Publishing::begin(to, &batch.events);
        Sending { name, events, spans, timer: Timer::start() }
    }

    /// Ends the span and records the metrics of a batch.
    pub(super) fn ended(&self, sending: Sending, error: Option<&Interruption>) {
        let Sending { name, events, spans, timer } = sending;
        let error = error.map(Interruption::kind);
        let to = Destination { system: trace::system(self.bus.name()), name: &name };
        self.metrics.published(to, timer, events, error);
        spans.ended(error);
    }

    pub(super) fn failed(&self, error: String) {
        self.status.send_modify(|status| {
            status.state = PublisherState::Retrying { error: error.clone() };
            status.last_error = Some(error);
        });
    }
}
