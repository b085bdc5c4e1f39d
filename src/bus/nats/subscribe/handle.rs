//! A handler for each event, so many at a time, and what becomes of those that it fails on.

use std::fmt;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{interval_at, timeout};
use tracing::Instrument;

use super::super::NatsBus;
use super::dead::{self, DeadLetter};
use super::lane::give_back;
use super::queue::Queue;
use super::retry::{HandleError, HandleOptions};
use super::{
    CloseError, Delivery, Received, Subscription, SubscriptionError, SubscriptionErrors, SubscriptionStats,
};
use crate::bus::{BusError, EventBus};
use crate::panic::panic_text;
use crate::telemetry::Timer;
use crate::telemetry::trace::{self, Destination};
use crate::time::{FAR, after};

/// A handler at work. Dropping it stops it at once; what was being handled is delivered again by JetStream.
#[must_use = "dropping it stops the handler"]
pub struct Handling {
    queue: Arc<Queue>,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Subscription {
    /// Runs `handler` for each event, in the background: at most so many at a time as the options say. What it succeeds on
    /// is acknowledged; while it runs the server is told so. Gaps are among the [errors](Handling::errors), as is what the
    /// handler fails on. A panic of the handler is a failure.
    ///
    /// # Errors
    /// [`BusError::Incompatible`] when the options need JetStream, and the bus is over Core.
    pub fn for_each<H, F>(self, options: HandleOptions, handler: H) -> Result<Handling, BusError>
    where
        H: Fn(Arc<Delivery>) -> F + Send + Sync + 'static,
        F: Future<Output = Result<(), HandleError>> + Send + 'static,
    {
        if options.dead_letters && !self.bus.is_durable() {
            return Err(BusError::Incompatible {
                reason: "HandleOptions::dead_letters keeps events in a stream, and NATS Core has none; use the JetStream \
                         driver"
                    .into(),
            });
        }
        let (queue, stop) = (self.queue.clone(), watch::Sender::new(false));
        let stopping = stop.subscribe();
        let runner =
            Runner { bus: self.bus.clone(), wait: self.ack_wait, queue: queue.clone(), options, handler };
        let task = tokio::spawn(run(self, Arc::new(runner), stopping));
        Ok(Handling { queue, stop, task })
    }
}

impl Handling {
    /// What goes wrong; see [`Subscription::errors`].
    #[must_use]
    pub fn errors(&self) -> SubscriptionErrors {
        SubscriptionErrors { queue: self.queue.clone() }
    }

    /// How the subscription is doing.
    #[must_use]
    pub fn stats(&self) -> SubscriptionStats {
        self.queue.stats()
    }

    /// Waits until the subscription has ended by itself: its bus was closed. Cancel-safe.
    pub async fn ended(&mut self) {
        // The task does not panic: the handler's panics end with the handler.
        let _ = (&mut self.task).await;
    }

    /// Ends it in order: nothing more is handled, what waits is given back, and what is being handled ends within
    /// `patience`.
    ///
    /// # Errors
    /// When a handler was still at work then. It was torn down, and its event is delivered again by JetStream.
    pub async fn stop(mut self, patience: Duration) -> Result<(), CloseError> {
        self.stop.send_replace(true);
        if timeout(patience, &mut self.task).await.is_ok() {
            return Ok(());
        }
        self.task.abort();
        // What was torn down leaves at once.
        let _ = (&mut self.task).await;
        Err(CloseError { patience, what: "a handler was still at work".into() })
    }
}

impl fmt::Debug for Handling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handling").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

impl Drop for Handling {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Runner<H> {
    bus: NatsBus,
    /// How soon the server delivers again what it hears nothing of.
    wait: Duration,
    queue: Arc<Queue>,
    options: HandleOptions,
    handler: H,
}

async fn run<H, F>(
    mut subscription: Subscription,
    runner: Arc<Runner<H>>,
    mut stopping: watch::Receiver<bool>,
) where
    H: Fn(Arc<Delivery>) -> F + Send + Sync + 'static,
    F: Future<Output = Result<(), HandleError>> + Send + 'static,
{
    let places = Arc::new(Semaphore::new(runner.options.concurrency));
    let mut running = JoinSet::new();
    loop {
        let next = async {
            // A place first: what is taken out is handled at once.
            let place = places.clone().acquire_owned().await;
            (subscription.next().await, place)
        };
        let (received, place) = tokio::select! {
            biased;
            _ = stopping.wait_for(|stop| *stop) => break,
            // What has ended makes room in the set; how it ended is known.
            Some(_) = running.join_next() => continue,
            next = next => next,
        };
        match received {
            Some(Received::Event(delivery)) => {
                let runner = runner.clone();
                running.spawn(async move {
                    runner.handle(delivery).await;
                    drop(place);
                });
            }
            // It is among the errors as well.
            Some(Received::Gap(_)) => {}
            None => break,
        }
    }
    // Others may have what waits. What is being handled is settled before its consumer may go.
    give_back(runner.queue.retire()).await;
    while running.join_next().await.is_some() {}
    if let Err(error) = subscription.close(FAR).await {
        tracing::warn!(%error, "a subscription did not end in order");
    }
}

impl<H, F> Runner<H>
where
    H: Fn(Arc<Delivery>) -> F + Send + Sync + 'static,
    F: Future<Output = Result<(), HandleError>> + Send + 'static,
{
    async fn handle(&self, delivery: Delivery) {
        let delivery = Arc::new(delivery);
        let (timer, span) = (Timer::start(), delivery.span());
        let from = Destination { system: "nats", name: self.bus.place() };
        let handled = self.run(&delivery).instrument(span.clone()).await;
        let failure = handled.as_ref().err().map(|error| if error.retry { "retry" } else { "give_up" });
        trace::processed(&span, failure);
        drop(span);
        self.bus.metrics().processed(from, timer, failure);
        let settled = delivery.settle.as_ref().is_none_or(|settle| settle.is_settled());
        let said = match handled {
            Ok(()) if self.options.manual || settled => Ok(()),
            Ok(()) => delivery.ack().await,
            Err(error) if self.options.manual || settled => {
                self.failed(&delivery, &error, if settled { "it is settled" } else { "it is left as it is" });
                Ok(())
            }
            Err(error) => self.give_up_or_try_again(&delivery, &error).await,
        };
        if let Err(error) = said {
            let (event, position) = (delivery.event.name.clone(), delivery.event.position);
            self.queue.error(SubscriptionError::Unsettled { event, position, reason: error.to_string() });
        }
    }

    /// Runs the handler, and tells the server meanwhile that it does.
    async fn run(&self, delivery: &Arc<Delivery>) -> Result<(), HandleError> {
        let handler = AssertUnwindSafe(async { (self.handler)(delivery.clone()).await }).catch_unwind();
        let every = (self.wait / 3).max(Duration::from_millis(1));
        let mut tell = interval_at(after(every), every);
        tokio::pin!(handler);
        loop {
            tokio::select! {
                biased;
                handled = &mut handler => {
                    return handled.unwrap_or_else(|panic| {
                        Err(HandleError::retry(format!("it panicked: {}", panic_text(&*panic))))
                    });
                }
                _ = tell.tick() => {
                    self.queue.busy();
                    // When the server cannot be told, it delivers again; and when it was settled, there is nothing to tell.
                    let _ = delivery.in_progress().await;
                }
            }
        }
    }

    async fn give_up_or_try_again(
        &self,
        delivery: &Delivery,
        error: &HandleError,
    ) -> Result<(), super::AckError> {
        if delivery.settle.is_none() {
            self.failed(delivery, error, "NATS Core does not deliver again");
            return Ok(());
        }
        let wait = self.options.retry.wait_after(error, delivery.attempt);
        match wait {
            Some(wait) => {
                self.failed(delivery, error, "it is tried again");
                delivery.nak_with_delay(wait).await
            }
            None if !self.options.dead_letters => {
                self.failed(delivery, error, "it is given up");
                delivery.term().await
            }
            None => {
                let letter = DeadLetter { delivery, reason: error.to_string() };
                match dead::post(&self.bus, letter).await {
                    Ok(()) => {
                        let from = Destination { system: "nats", name: self.bus.place() };
                        self.bus.metrics().dead_letter(from);
                        self.failed(delivery, error, "it is a dead letter now");
                        delivery.term().await
                    }
                    // Never given up without a trace: it comes again, and fails again.
                    Err(unposted) => {
                        self.failed(delivery, error, "it could not become a dead letter and is tried again");
                        tracing::error!(error = %unposted, "a dead letter could not be posted");
                        delivery.nak_with_delay(self.options.retry.max).await
                    }
                }
            }
        }
    }

    fn failed(&self, delivery: &Delivery, error: &HandleError, outcome: &'static str) {
        let (event, position) = (delivery.event.name.clone(), delivery.event.position);
        let (attempt, reason) = (delivery.attempt, error.to_string());
        self.queue.error(SubscriptionError::Handler { event, position, attempt, reason, outcome });
    }
}
