//! Raw subscriptions, for programs that want events as they come over the bus, without a store and without projections.
//!
//! What was not read in time, could not be decoded or went wrong otherwise is an error beside the events, and holds nothing
//! up, read or not. Between subscribers nothing is shared: one that does not read is its own loss alone.

mod dead;
mod delivery;
mod error;
mod handle;
mod lane;
mod options;
mod queue;
mod retry;

use std::collections::BTreeMap;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::Stream;
use futures_util::future::{join_all, poll_fn};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{sleep_until, timeout};
use uuid::Uuid;

pub use self::delivery::{Delivery, Gap, Received};
pub use self::error::SubscriptionError;
pub use self::handle::Handling;
use self::lane::{Lane, Source};
use self::options::Life;
pub use self::options::{ConsumerOptions, StartFrom, SubscribeOptions};
use self::queue::Queue;
pub use self::queue::SubscriptionStats;
pub use self::retry::{HandleError, HandleOptions, RetryPolicy};
use super::jetstream::{AckError, ConsumerSpec, Push};
use super::subjects::{Pattern, patterns};
use super::{Driver, NatsBus, naming};
use crate::bus::BusError;
use crate::time::{FAR, after};

/// Events of some names, as they come over a [`NatsBus`]. A [`Stream`] of [`Received`].
///
/// Dropping it ends it; what JetStream delivered and nobody took is given back.
pub struct Subscription {
    bus: NatsBus,
    /// How soon JetStream delivers again what was not settled.
    ack_wait: Duration,
    queue: Arc<Queue>,
    stop: watch::Sender<bool>,
    lanes: Vec<JoinHandle<()>>,
}

/// What did not end in time when a subscription was closed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the subscription did not end within {patience:?}: {what}")]
pub struct CloseError {
    /// The time there was.
    pub patience: Duration,
    /// What was unfinished.
    pub what: String,
}

/// Where events come from, and the names to keep of them if the server lets others through.
type Way = (Source, Option<Vec<Pattern>>);

impl NatsBus {
    /// Subscribes to events by name: `order.placed`, `order.*` (one token), `order.>` (one or more), `*` (everything).
    ///
    /// Over Core this brings what is published while it listens. With the JetStream driver it reads from a consumer of the
    /// mirror, see [`ConsumerOptions`]. Events of one log come in log order, whatever their names, except over queue groups
    /// and when JetStream delivers something again.
    ///
    /// ```no_run
    /// use storied::bus::{ConsumerOptions, NatsBus, Received, SubscribeOptions};
    ///
    /// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
    /// let bus = NatsBus::jetstream("nats://127.0.0.1:4222");
    /// let options = SubscribeOptions::new().consumer(ConsumerOptions::durable("shipping"));
    /// let mut orders = bus.subscribe(["order.placed", "order.cancelled"], options).await?;
    /// while let Some(received) = orders.next().await {
    ///     match received {
    ///         Received::Event(delivery) => {
    ///             println!("{} of {}", delivery.event().name, delivery.event().stream);
    ///             delivery.ack().await?;
    ///         }
    ///         gap => println!("{gap:?}"),
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`BusError::Incompatible`] when the names are no patterns or the options do not fit the driver or the server;
    /// [`BusError::Unavailable`] when no server is there, unless the options are [`lazy`](SubscribeOptions::lazy). From
    /// then on it comes back by itself after every outage.
    pub async fn subscribe<N: AsRef<str>>(
        &self,
        names: impl IntoIterator<Item = N>,
        options: SubscribeOptions,
    ) -> Result<Subscription, BusError> {
        let names = patterns(names).map_err(|error| BusError::Incompatible { reason: error.to_string() })?;
        for name in &names {
            name.check_names().map_err(|error| BusError::Incompatible { reason: error.to_string() })?;
        }
        options.check()?;
        let lanes = self.lanes(&names, &options)?;
        let queue = Queue::new(options.capacity, options.pull_timeout, options.eat_errors, lanes.len());
        let queue = Arc::new(queue);
        let stop = watch::Sender::new(false);
        let waits = lanes.iter().filter_map(|(source, _)| match source {
            Source::Consumer { spec, .. } => Some(spec.shortest_wait()),
            Source::Core { .. } => None,
        });
        let ack_wait = waits.min().unwrap_or(FAR);
        let mut subscription =
            Subscription { bus: self.clone(), ack_wait, queue: queue.clone(), stop, lanes: Vec::new() };
        let mut ready = Vec::new();
        for (source, names) in lanes {
            let stop = subscription.stop.subscribe();
            let lane = Lane { bus: self.clone(), source, names, queue: queue.clone(), stop };
            let (tell, told) = oneshot::channel();
            ready.push(told);
            subscription.lanes.push(tokio::spawn(lane.run((!options.lazy).then_some(tell))));
        }
        if !options.lazy {
            for told in join_all(ready).await {
                // A lane that says nothing has been stopped, with the runtime.
                told.unwrap_or(Err(BusError::Closed))?;
            }
        }
        Ok(subscription)
    }

    /// The ways on which the events come in: one for each queue group, since the server shares out by group.
    fn lanes(&self, names: &[Pattern], options: &SubscribeOptions) -> Result<Vec<Way>, BusError> {
        let mut groups: BTreeMap<Option<String>, Vec<Pattern>> = BTreeMap::new();
        for name in names {
            groups.entry(options.group_of(shown(name))).or_default().push(name.clone());
        }
        let mut lanes = Vec::with_capacity(groups.len());
        for (group, names) in groups {
            // What NATS' protocol and its tools could not tell from something else.
            if let Some(group) =
                group.as_ref().filter(|group| !group.bytes().all(|byte| byte.is_ascii_graphic()))
            {
                return Err(incompatible(format!(
                    "{group:?} cannot be a queue group; use printable ASCII without spaces"
                )));
            }
            let (subjects, sieve) = self.names().mapping.filters(&names);
            let source = match &self.inner.options.driver {
                Driver::Core if options.consumer.is_some() => {
                    return Err(incompatible(
                        "NATS Core has no consumers; use the JetStream driver, or no ConsumerOptions".into(),
                    ));
                }
                Driver::Core => Source::Core { subjects, group },
                Driver::JetStream(_) => {
                    let consumer = options.consumer.clone().unwrap_or_else(ConsumerOptions::ephemeral);
                    let spec = self.spec(&consumer, group.as_deref(), &names, subjects)?;
                    Source::Consumer { spec, confirm: consumer.confirm }
                }
            };
            lanes.push((source, sieve.then_some(names)));
        }
        self.distinct(&lanes)?;
        Ok(lanes)
    }

    /// Two consumers of one subscription must not be the same.
    fn distinct(&self, lanes: &[Way]) -> Result<(), BusError> {
        let mut names: Vec<_> = lanes
            .iter()
            .filter_map(|(source, _)| match source {
                Source::Consumer { spec, .. } => Some(&spec.name),
                Source::Core { .. } => None,
            })
            .collect();
        names.sort_unstable();
        match names.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(incompatible(format!(
                "two queue groups would share the consumer {}; make its name from event and group, with \
                 ConsumerOptions::durable_with",
                pair[0]
            ))),
            None => Ok(()),
        }
    }

    fn spec(
        &self,
        options: &ConsumerOptions,
        group: Option<&str>,
        names: &[Pattern],
        filters: Vec<String>,
    ) -> Result<ConsumerSpec, BusError> {
        let events: Vec<_> = names.iter().map(Pattern::as_str).collect();
        let given = |name: &str| match name.trim() {
            "" => {
                Err(incompatible("the name of a durable consumer is empty; ConsumerOptions needs one".into()))
            }
            _ => Ok(()),
        };
        let name = match (&options.life, group) {
            (Life::Durable(prefix), group) => {
                given(prefix)?;
                naming::durable(prefix, group, &events)
            }
            (Life::Named(name), group) => {
                let events: Vec<_> = names.iter().map(shown).collect();
                let name = name(&events.join(","), group.unwrap_or_default());
                given(&name)?;
                naming::custom(&name)
            }
            (Life::Ephemeral, None) => format!("ephemeral-{}", Uuid::new_v4().simple()),
            // Members must find each other.
            (Life::Ephemeral, group) => naming::durable("ephemeral", group, &events),
        };
        let push = options.push.then(|| Push {
            subject: format!("{}.deliver.{name}", self.names().namespace()),
            group: group.map(naming::custom),
        });
        Ok(ConsumerSpec {
            name,
            durable: options.is_durable(),
            shared: group.is_some(),
            filters,
            start: options.deliver()?,
            ack_wait: options.ack_wait,
            max_deliver: options.max_deliver,
            backoff: options.backoff.clone(),
            max_ack_pending: options.max_ack_pending,
            push,
            inactive: options.inactive,
            policy: options.policy,
        })
    }
}

/// As the user would write it.
fn shown(pattern: &Pattern) -> &str {
    if pattern.is_everything() { "*" } else { pattern.as_str() }
}

fn incompatible(reason: String) -> BusError {
    BusError::Incompatible { reason }
}

impl Subscription {
    /// The next event or gap; `None` when the subscription has ended. Cancel-safe.
    pub async fn next(&mut self) -> Option<Received> {
        poll_fn(|cx| self.queue.poll_next(cx)).await
    }

    /// Up to `most` events, as many as come within `wait`, and at least one if there is one by then. Gaps in between are
    /// among the [errors](Self::errors) only. Dropping the future loses what it has gathered; JetStream delivers that
    /// again.
    pub async fn fetch(&mut self, most: usize, wait: Duration) -> Vec<Delivery> {
        let mut fetched = Vec::new();
        let end = after(wait);
        while fetched.len() < most {
            tokio::select! {
                biased;
                received = self.next() => match received {
                    Some(Received::Event(delivery)) => fetched.push(delivery),
                    Some(Received::Gap(_)) => {}
                    None => break,
                },
                () = sleep_until(end) => break,
            }
        }
        fetched
    }

    /// What goes wrong. Each error is said once, to whichever of its readers is first; the last 256 are kept until then.
    #[must_use]
    pub fn errors(&self) -> SubscriptionErrors {
        SubscriptionErrors { queue: self.queue.clone() }
    }

    /// How it is doing.
    #[must_use]
    pub fn stats(&self) -> SubscriptionStats {
        self.queue.stats()
    }

    /// Ends it in order: nothing more comes in, and what JetStream delivered and nobody took is given back.
    ///
    /// # Errors
    /// When that took longer than `patience`; it is not waited for any more then.
    pub async fn close(mut self, patience: Duration) -> Result<(), CloseError> {
        self.stop.send_replace(true);
        let lanes = std::mem::take(&mut self.lanes);
        match timeout(patience, join_all(lanes)).await {
            Ok(_) => Ok(()),
            Err(_) => Err(CloseError { patience, what: "the server was not told".into() }),
        }
    }
}

impl Stream for Subscription {
    type Item = Received;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Received>> {
        self.queue.poll_next(cx)
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        // The lanes end by themselves: they have something to give back.
        self.stop.send_replace(true);
    }
}

impl fmt::Debug for Subscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscription").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

/// The errors of a [`Subscription`]: a [`Stream`], which ends with it.
pub struct SubscriptionErrors {
    queue: Arc<Queue>,
}

impl SubscriptionErrors {
    /// The next error; `None` when the subscription has ended. Cancel-safe.
    pub async fn next(&mut self) -> Option<SubscriptionError> {
        poll_fn(|cx| self.queue.poll_error(cx)).await
    }
}

impl Stream for SubscriptionErrors {
    type Item = SubscriptionError;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<SubscriptionError>> {
        self.queue.poll_error(cx)
    }
}

impl fmt::Debug for SubscriptionErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SubscriptionErrors").finish_non_exhaustive()
    }
}
