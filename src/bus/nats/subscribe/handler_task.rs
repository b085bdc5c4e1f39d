//! Event handlers with a bounded concurrency, and the outcome of failed events.

use std::fmt;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{interval_at, timeout};
use tracing::Instrument;

use super::super::jetstream::AckError;
use super::super::nats_bus::NatsBus;
use super::dead_letter::{self, DeadLetter};
use super::delivery::{Delivery, Received};
use super::error::SubscriptionError;
use super::queue::{Queue, SubscriptionStats};
use super::receiver::give_back;
use super::retry::{HandleError, HandleOptions};
use super::subscription::{Subscription, SubscriptionErrors, unfinished};
use crate::bus::{BusError, EventBus};
use crate::panic::panic_text;
use crate::supervised::StopError;
use crate::telemetry::Timer;
use crate::telemetry::trace::{self, Destination};
use crate::time::{FAR, after};

/// A running handler. Dropping it stops it at once, and JetStream redelivers the current events.
#[must_use = "dropping it stops the handler"]
pub struct HandlerTask {
    queue: Arc<Queue>,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Subscription {
    /// Runs `handler` for each event in the background, with the concurrency of the options.
    ///
    /// An event is acknowledged if the handler succeeds. A running handler reports progress to the
    /// server. Gaps and failures of the handler are reported by [`errors`](HandlerTask::errors). A
    /// panic of the handler is a failure.
    ///
    /// # Errors
    /// [`BusError::Incompatible`] if the options need JetStream and the bus uses Core.
    pub fn for_each<H, F>(self, options: HandleOptions, handler: H) -> Result<HandlerTask, BusError>
    where
        H: Fn(Arc<Delivery>) -> F + Send + Sync + 'static,
        F: Future<Output = Result<(), HandleError>> + Send + 'static,
    {
        if options.dead_letters && !self.bus.is_durable() {
            return Err(BusError::Incompatible {
                reason: "HandleOptions::dead_letters needs a stream, and NATS Core has none; use the \
                         JetStream driver"
                    .into(),
            });
        }
        let (queue, stop) = (self.queue.clone(), watch::Sender::new(false));
        let stopping = stop.subscribe();
        let runner =
            Runner { bus: self.bus.clone(), wait: self.ack_wait, queue: queue.clone(), options, handler };
        let task = tokio::spawn(run(self, Arc::new(runner), stopping));
        Ok(HandlerTask { queue, stop, task })
    }
}

impl HandlerTask {
    /// Returns the errors; see [`Subscription::errors`].
    #[must_use]
    pub fn errors(&self) -> SubscriptionErrors {
        SubscriptionErrors { queue: self.queue.clone() }
    }

    /// Returns the counters of the subscription.
    #[must_use]
    pub fn stats(&self) -> SubscriptionStats {
        self.queue.stats()
    }

    /// Waits until the subscription ends because its bus was closed. Cancel-safe.
    pub async fn ended(&mut self) {
        // The task does not panic: a panic of the handler ends only the handler.
        let _ = (&mut self.task).await;
    }

    /// Stops handling, and returns unread deliveries to the server.
    ///
    /// Current events finish within `patience`.
    ///
    /// # Errors
    /// If a handler did not finish in time. It is aborted, and JetStream redelivers its event.
    pub async fn stop(mut self, patience: Duration) -> Result<(), StopError> {
        self.stop.send_replace(true);
        if timeout(patience, &mut self.task).await.is_ok() {
            return Ok(());
        }
        self.task.abort();
        // An aborted task ends at once.
        let _ = (&mut self.task).await;
        Err(unfinished("a handler is still running", patience))
    }
}

impl fmt::Debug for HandlerTask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HandlerTask").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

impl Drop for HandlerTask {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Runner<H> {
    bus: NatsBus,
    /// Time until the server redelivers without a progress report.
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
    let permits = Arc::new(Semaphore::new(runner.options.concurrency));
    let mut running = JoinSet::new();
    loop {
        let next = async {
            // Acquire a permit first, so that a taken event is handled at once.
            let permit = permits.clone().acquire_owned().await;
            (subscription.next().await, permit)
        };
        let (received, permit) = tokio::select! {
            biased;
            _ = stopping.wait_for(|stop| *stop) => break,
            // Removes a finished task from the set. Its result was handled already.
            Some(_) = running.join_next() => continue,
            next = next => next,
        };
        match received {
            Some(Received::Event(delivery)) => {
                let runner = runner.clone();
                running.spawn(async move {
                    runner.handle(delivery).await;
                    drop(permit);
                });
            }
            // The gap is reported as an error as well.
            Some(Received::Gap(_)) => {}
            None => break,
        }
    }
    // Return unread deliveries for other readers. Current events are acknowledged before their
    // consumer ends.
    give_back(runner.queue.retire()).await;
    while running.join_next().await.is_some() {}
    if let Err(error) = subscription.close(FAR).await {
        tracing::warn!(%error, "could not close a subscription");
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
        let from = Destination { system: "nats", name: self.bus.destination_name() };
        let handled = self.run(&delivery).instrument(span.clone()).await;
        let failure = handled.as_ref().err().map(|error| if error.retry { "retry" } else { "give_up" });
        trace::processed(&span, failure);
        drop(span);
        self.bus.metrics().processed(from, timer, failure);
        let settled = delivery.acker.as_ref().is_none_or(|acker| acker.is_settled());
        let result = match handled {
            Ok(()) if self.options.manual || settled => Ok(()),
            Ok(()) => delivery.ack().await,
            Err(error) if self.options.manual || settled => {
                self.failed(
                    &delivery,
                    &error,
                    if settled { "already acknowledged" } else { "not acknowledged" },
                );
                Ok(())
            }
            Err(error) => self.give_up_or_retry(&delivery, &error).await,
        };
        if let Err(error) = result {
            let (event, position) = (delivery.event.name.clone(), delivery.event.position);
            self.queue.error(SubscriptionError::Unsettled { event, position, reason: error.to_string() });
        }
    }

    /// Runs the handler, and reports progress to the server meanwhile.
    async fn run(&self, delivery: &Arc<Delivery>) -> Result<(), HandleError> {
        let handler = AssertUnwindSafe(async { (self.handler)(delivery.clone()).await }).catch_unwind();
        let every = (self.wait / 3).max(Duration::from_millis(1));
        let mut progress = interval_at(after(every), every);
        tokio::pin!(handler);
        loop {
            tokio::select! {
                biased;
                handled = &mut handler => {
                    return handled.unwrap_or_else(|panic| {
                        Err(HandleError::retry(format!("the handler panicked: {}", panic_text(&*panic))))
                    });
                }
                _ = progress.tick() => {
                    self.queue.busy();
                    // If the server receives no progress, it redelivers. After an acknowledgement,
                    // there is nothing to report.
                    let _ = delivery.in_progress().await;
                }
            }
        }
    }

    async fn give_up_or_retry(&self, delivery: &Delivery, error: &HandleError) -> Result<(), AckError> {
        if delivery.acker.is_none() {
            self.failed(delivery, error, "NATS Core does not redeliver");
            return Ok(());
        }
        let wait = self.options.retry.wait_after(error, delivery.attempt);
        match wait {
            Some(wait) => {
                self.failed(delivery, error, "retrying");
                delivery.nak_with_delay(wait).await
            }
            None if !self.options.dead_letters => {
                self.failed(delivery, error, "given up");
                delivery.term().await
            }
            None => {
                let letter = DeadLetter { delivery, reason: error.to_string() };
                match dead_letter::publish(&self.bus, letter).await {
                    Ok(()) => {
                        let from = Destination { system: "nats", name: self.bus.destination_name() };
                        self.bus.metrics().dead_letter(from);
                        self.failed(delivery, error, "given up as a dead letter");
                        delivery.term().await
                    }
                    // Never give up without a dead letter: the event is redelivered, and fails
                    // again.
                    Err(unposted) => {
                        self.failed(delivery, error, "could not publish a dead letter; retrying");
                        tracing::error!(error = %unposted, "could not publish a dead letter");
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
