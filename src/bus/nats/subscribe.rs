//! Raw subscriptions, for programs that read events from the bus without a store or projections.
//!
//! Events that are not read in time, fail to decode or fail otherwise become errors in a separate
//! stream. Unread errors block nothing. Subscribers share nothing: a subscriber that does not read
//! loses only its own events.

mod dead_letter;
mod delivery;
mod error;
mod handler_task;
mod options;
mod queue;
mod receiver;
mod retry;
mod subscription;

use std::collections::BTreeMap;
use std::sync::Arc;

use futures_util::future::join_all;
use tokio::sync::{oneshot, watch};
use uuid::Uuid;

pub use self::delivery::{Delivery, Gap, Received};
pub use self::error::SubscriptionError;
pub use self::handler_task::HandlerTask;
use self::options::Life;
pub use self::options::{ConsumerOptions, StartFrom, SubscribeOptions};
use self::queue::Queue;
pub use self::queue::SubscriptionStats;
use self::receiver::{EventReceiver, Source};
pub use self::retry::{HandleError, HandleOptions, RetryPolicy};
pub use self::subscription::{Subscription, SubscriptionErrors};
use super::consumer_name;
use super::errors::incompatible;
use super::jetstream::{ConsumerSpec, Push};
use super::nats_bus::NatsBus;
use super::options::Driver;
use super::subjects::{Pattern, patterns};
use crate::bus::BusError;
use crate::time::FAR;

/// A source of events, and the names to keep if the server cannot filter exactly.
type FilteredSource = (Source, Option<Vec<Pattern>>);

impl NatsBus {
    /// Subscribes to events by name.
    ///
    /// Names: `order.placed`, `order.*` (one token), `order.>` (one or more), `*` (everything).
    ///
    /// Over Core, the subscription receives events published while it is connected. With the
    /// JetStream driver, it reads from a consumer of the log stream, see [`ConsumerOptions`].
    /// Events of one log arrive in log order, whatever their names, except with queue groups and
    /// redeliveries.
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
    /// [`BusError::Incompatible`] if a name is an invalid pattern, or the options do not fit the
    /// driver or the server. [`BusError::Unavailable`] if no server is reachable, unless the
    /// options are [`lazy`](SubscribeOptions::lazy). Afterwards, the subscription reconnects after
    /// every outage.
    pub async fn subscribe<N: AsRef<str>>(
        &self,
        names: impl IntoIterator<Item = N>,
        options: SubscribeOptions,
    ) -> Result<Subscription, BusError> {
        let names = patterns(names)?;
        for name in &names {
            name.check_names()?;
        }
        options.check()?;
        let sources = self.sources(&names, &options)?;
        let queue = Queue::new(options.capacity, options.pull_timeout, options.discard_errors, sources.len());
        let queue = Arc::new(queue);
        let stop = watch::Sender::new(false);
        let waits = sources.iter().filter_map(|(source, _)| match source {
            Source::Consumer { spec, .. } => Some(spec.shortest_wait()),
            Source::Core { .. } => None,
        });
        let ack_wait = waits.min().unwrap_or(FAR);
        let mut subscription =
            Subscription { bus: self.clone(), ack_wait, queue: queue.clone(), stop, receivers: Vec::new() };
        let mut ready = Vec::new();
        for (source, names) in sources {
            let stop = subscription.stop.subscribe();
            let receiver = EventReceiver { bus: self.clone(), source, names, queue: queue.clone(), stop };
            let (on_attach, attached) = oneshot::channel();
            ready.push(attached);
            subscription.receivers.push(tokio::spawn(receiver.run((!options.lazy).then_some(on_attach))));
        }
        if !options.lazy {
            for attached in join_all(ready).await {
                // A receiver without a report was stopped with the runtime.
                attached.unwrap_or(Err(BusError::Closed))?;
            }
        }
        Ok(subscription)
    }

    /// The sources of the events: one per queue group, because the server balances per group.
    fn sources(
        &self,
        names: &[Pattern],
        options: &SubscribeOptions,
    ) -> Result<Vec<FilteredSource>, BusError> {
        let mut groups: BTreeMap<Option<String>, Vec<Pattern>> = BTreeMap::new();
        for name in names {
            groups.entry(options.group_of(shown(name))).or_default().push(name.clone());
        }
        let mut sources = Vec::with_capacity(groups.len());
        for (group, names) in groups {
            // Characters with a meaning in the NATS protocol or its tools are refused.
            if let Some(group) =
                group.as_ref().filter(|group| !group.bytes().all(|byte| byte.is_ascii_graphic()))
            {
                return Err(incompatible(format!(
                    "invalid queue group {group:?}; use printable ASCII without spaces"
                )));
            }
            let (subjects, sieve) = self.names().mapping.filters(&names);
            let source = match &self.inner.options.driver {
                Driver::Core if options.consumer.is_some() => {
                    return Err(incompatible(
                        "NATS Core has no consumers; use the JetStream driver, or omit \
                         ConsumerOptions"
                            .into(),
                    ));
                }
                Driver::Core => Source::Core { subjects, group },
                Driver::JetStream(_) => {
                    let consumer = options.consumer.clone().unwrap_or_else(ConsumerOptions::ephemeral);
                    let spec = self.spec(&consumer, group.as_deref(), &names, subjects)?;
                    Source::Consumer { spec, confirm: consumer.confirm }
                }
            };
            sources.push((source, sieve.then_some(names)));
        }
        self.distinct(&sources)?;
        Ok(sources)
    }

    /// Refuses two equal consumers in one subscription.
    fn distinct(&self, sources: &[FilteredSource]) -> Result<(), BusError> {
        let mut names: Vec<_> = sources
            .iter()
            .filter_map(|(source, _)| match source {
                Source::Consumer { spec, .. } => Some(&spec.name),
                Source::Core { .. } => None,
            })
            .collect();
        names.sort_unstable();
        match names.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(incompatible(format!(
                "two queue groups share the consumer {}; derive its name from event and group, \
                 with ConsumerOptions::durable_with",
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
            "" => Err(incompatible(
                "the name of a durable consumer is empty; set one in ConsumerOptions".into(),
            )),
            _ => Ok(()),
        };
        let name = match (&options.life, group) {
            (Life::Durable(prefix), group) => {
                given(prefix)?;
                consumer_name::durable(prefix, group, &events)
            }
            (Life::Named(name), group) => {
                let events: Vec<_> = names.iter().map(shown).collect();
                let name = name(&events.join(","), group.unwrap_or_default());
                given(&name)?;
                consumer_name::custom(&name)
            }
            (Life::Ephemeral, None) => format!("ephemeral-{}", Uuid::new_v4().simple()),
            // Members of a group must derive the same name.
            (Life::Ephemeral, group) => consumer_name::durable("ephemeral", group, &events),
        };
        let push = options.push.then(|| Push {
            subject: format!("{}.deliver.{name}", self.names().namespace()),
            group: group.map(consumer_name::custom),
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

/// The pattern as the user writes it.
fn shown(pattern: &Pattern) -> &str {
    if pattern.is_everything() { "*" } else { pattern.as_str() }
}
