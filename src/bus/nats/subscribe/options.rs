use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::consumer::DeliverPolicy;
use chrono::{DateTime, Utc};

use super::super::jetstream::ProvisionPolicy;
use super::super::limits::{KEPT, PAUSE, SERVER_WAIT, within};
use crate::bus::BusError;

/// Options of a [`Subscription`](super::Subscription).
#[derive(Clone)]
pub struct SubscribeOptions {
    group: Option<Arc<GroupOf>>,
    pub(super) capacity: usize,
    pub(super) pull_timeout: Option<Duration>,
    pub(super) discard_errors: bool,
    pub(super) lazy: bool,
    pub(super) consumer: Option<ConsumerOptions>,
}

type GroupOf = dyn Fn(&str) -> Option<String> + Send + Sync;

impl Default for SubscribeOptions {
    fn default() -> Self {
        Self {
            group: None,
            capacity: 1_024,
            pull_timeout: None,
            discard_errors: false,
            lazy: false,
            consumer: None,
        }
    }
}

impl SubscribeOptions {
    /// Creates the default options: every subscriber receives every event from now on.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Joins a queue group: one subscriber of the group receives each event.
    ///
    /// The order across subscribers of a group is undefined.
    #[must_use]
    pub fn queue_group(self, group: impl Into<String>) -> Self {
        let group = group.into();
        self.queue_groups(move |_| Some(group.clone()))
    }

    /// Sets the queue group per subscribed name or pattern; `None` for names without a group.
    #[must_use]
    pub fn queue_groups(mut self, group: impl Fn(&str) -> Option<String> + Send + Sync + 'static) -> Self {
        self.group = Some(Arc::new(group));
        self
    }

    /// Balances events among the instances of a service.
    ///
    /// The queue group of `order.placed` is `{service}:order.placed`.
    #[must_use]
    pub fn load_balancer(self, service: impl Into<String>) -> Self {
        let service = service.into();
        self.queue_groups(move |name| Some(format!("{service}:{name}")))
    }

    /// Sets the number of unread events that this process buffers.
    ///
    /// Over Core, further events are lost and reported as [`Gap::Overflow`](super::Gap::Overflow).
    /// A JetStream consumer requests no further events. Default: 1,024. Range: 1 to 1,048,576.
    /// [`subscribe`](super::super::NatsBus::subscribe) checks this and all following options.
    #[must_use]
    pub fn capacity(mut self, events: usize) -> Self {
        self.capacity = events;
        self
    }

    /// Sets how long an event may stay unread.
    ///
    /// After it, the subscriber loses the event and gets a
    /// [`SubscriptionError::PullTimeout`](super::SubscriptionError::PullTimeout). A JetStream
    /// consumer redelivers the event. Default: no limit. Range: 1 ms to 1 day.
    #[must_use]
    pub fn pull_timeout(mut self, timeout: Duration) -> Self {
        self.pull_timeout = Some(timeout);
        self
    }

    /// Counts errors without keeping them. Errors block nothing in either case.
    #[must_use]
    pub fn discard_errors(mut self) -> Self {
        self.discard_errors = true;
        self
    }

    /// Does not wait for a server.
    ///
    /// The subscription starts when a server is reachable, and reports failures in its errors. By
    /// default, the first attempt must succeed.
    #[must_use]
    pub fn lazy(mut self) -> Self {
        self.lazy = true;
        self
    }

    /// Sets the consumer options of the JetStream driver. Default: [`ConsumerOptions::ephemeral`].
    #[must_use]
    pub fn consumer(mut self, options: ConsumerOptions) -> Self {
        self.consumer = Some(options);
        self
    }

    /// Refuses invalid options.
    pub(super) fn check(&self) -> Result<(), BusError> {
        within("SubscribeOptions::capacity", &self.capacity, &(1..=1 << 20))?;
        if let Some(timeout) = self.pull_timeout {
            within("SubscribeOptions::pull_timeout", &timeout, &PAUSE)?;
        }
        self.consumer.as_ref().map_or(Ok(()), ConsumerOptions::check)
    }

    /// The queue group of a name; `None` if it is empty.
    pub(super) fn group_of(&self, name: &str) -> Option<String> {
        self.group.as_ref().and_then(|group| group(name)).filter(|group| !group.is_empty())
    }
}

impl fmt::Debug for SubscribeOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SubscribeOptions")
            .field("capacity", &self.capacity)
            .field("pull_timeout", &self.pull_timeout)
            .field("discard_errors", &self.discard_errors)
            .field("lazy", &self.lazy)
            .field("consumer", &self.consumer)
            .finish_non_exhaustive()
    }
}

/// Options of a consumer of the log stream.
#[derive(Clone)]
pub struct ConsumerOptions {
    pub(super) life: Life,
    start: Option<StartFrom>,
    pub(super) ack_wait: Duration,
    pub(super) max_deliver: Option<u32>,
    pub(super) backoff: Vec<Duration>,
    pub(super) max_ack_pending: usize,
    pub(super) push: bool,
    pub(super) confirm: bool,
    pub(super) inactive: Duration,
    pub(super) policy: ProvisionPolicy,
}

/// The lifetime and the name of a consumer.
#[derive(Clone)]
pub(super) enum Life {
    Ephemeral,
    /// Durable, named `prefix:queue:event`.
    Durable(String),
    Named(Arc<NameOf>),
}

type NameOf = dyn Fn(&str, &str) -> String + Send + Sync;

/// The start of a new consumer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum StartFrom {
    /// With the oldest event of the log stream.
    Beginning,
    /// With events published from now on.
    New,
    /// With this sequence number of the stream.
    Sequence(u64),
    /// With the first event published at this time or later.
    Time(DateTime<Utc>),
    /// With the last event of each subscribed name, and then with events published from now on.
    /// If a mapping gives a name several subjects, the last event of each subject.
    LastOfEach,
}

impl ConsumerOptions {
    fn new(life: Life) -> Self {
        Self {
            life,
            start: None,
            ack_wait: Duration::from_secs(30),
            max_deliver: None,
            backoff: Vec::new(),
            max_ack_pending: 1_000,
            push: false,
            confirm: true,
            inactive: Duration::from_secs(60),
            policy: ProvisionPolicy::default(),
        }
    }

    /// An ephemeral consumer. It ends with its subscription, and delivers events from now on.
    #[must_use]
    pub fn ephemeral() -> Self {
        Self::new(Life::Ephemeral)
    }

    /// A durable consumer.
    /// It stays on the server, and starts with the oldest event of the log stream.
    ///
    /// A later subscription continues where the consumer stopped. The name is `prefix:queue:event`.
    /// A dot becomes `_`, and every other byte except letters, digits and `-` becomes `=` and two
    /// hexadecimal digits. `$noqueue` stands for no queue group and `$all` for every event; several
    /// events have `,` between them. A different set of events is a different consumer.
    #[must_use]
    pub fn durable(prefix: impl Into<String>) -> Self {
        Self::new(Life::Durable(prefix.into()))
    }

    /// As [`durable`](Self::durable), with this name (encoded in the same way).
    #[must_use]
    pub fn durable_as(name: impl Into<String>) -> Self {
        let name = name.into();
        Self::durable_with(move |_, _| name.clone())
    }

    /// As [`durable`](Self::durable), with a name derived from the event and the queue group.
    ///
    /// Several events have `,` between them. The queue group is empty if there is none. The name is
    /// encoded in the same way.
    #[must_use]
    pub fn durable_with(name: impl Fn(&str, &str) -> String + Send + Sync + 'static) -> Self {
        Self::new(Life::Named(Arc::new(name)))
    }

    /// Sets the start of a new consumer.
    ///
    /// Default: [`New`](StartFrom::New) for an ephemeral one, [`Beginning`](StartFrom::Beginning)
    /// for a durable one.
    #[must_use]
    pub fn start(mut self, from: StartFrom) -> Self {
        self.start = Some(from);
        self
    }

    /// Sets the time until the server redelivers an unacknowledged event.
    ///
    /// A running handler reports progress, which restarts it. Default: 30 s. Range: 10 ms to 1
    /// year.
    #[must_use]
    pub fn ack_wait(mut self, wait: Duration) -> Self {
        self.ack_wait = wait;
        self
    }

    /// Sets the maximum number of deliveries of an event. Default: no limit. Minimum: 1.
    ///
    /// After it, the event stays in the log stream, and the consumer skips it. The retry limit of
    /// [`HandleOptions`](super::HandleOptions) leaves a dead letter instead.
    #[must_use]
    pub fn max_deliver(mut self, times: u32) -> Self {
        self.max_deliver = Some(times);
        self
    }

    /// Sets the waits between deliveries, in place of `ack_wait`. The last wait repeats.
    ///
    /// The server does not apply them after a `nak`. [`max_deliver`](Self::max_deliver), if set,
    /// must exceed their number. Default: none. Maximum: 1,000 waits, each 10 ms to 1 year.
    #[must_use]
    pub fn backoff(mut self, waits: impl IntoIterator<Item = Duration>) -> Self {
        self.backoff = waits.into_iter().collect();
        self
    }

    /// Sets the maximum number of delivered and unacknowledged events, over all readers.
    ///
    /// Default: 1,000. Range: 1 to 1,000,000. With 1, redeliveries keep strict order, too.
    #[must_use]
    pub fn max_ack_pending(mut self, events: usize) -> Self {
        self.max_ack_pending = events;
        self
    }

    /// Uses a push consumer in place of pull.
    ///
    /// Only [`max_ack_pending`](Self::max_ack_pending) limits its deliveries in flight.
    #[must_use]
    pub fn push(mut self) -> Self {
        self.push = true;
        self
    }

    /// Sets whether an acknowledgement waits until the server confirms it.
    ///
    /// Without confirmation it is faster, but the server redelivers an event whose acknowledgement
    /// is lost. Default: true.
    #[must_use]
    pub fn double_ack(mut self, confirm: bool) -> Self {
        self.confirm = confirm;
        self
    }

    /// Sets how long an ephemeral consumer outlives readers that could not delete it.
    ///
    /// Default: 60 s. Range: 100 ms to 100 years.
    #[must_use]
    pub fn inactive_threshold(mut self, wait: Duration) -> Self {
        self.inactive = wait;
        self
    }

    /// Sets the handling of the consumer. Default: [`ProvisionPolicy::CreateOrVerify`].
    #[must_use]
    pub fn policy(mut self, policy: ProvisionPolicy) -> Self {
        self.policy = policy;
        self
    }

    /// Refuses values that no server supports.
    fn check(&self) -> Result<(), BusError> {
        within("ConsumerOptions::ack_wait", &self.ack_wait, &SERVER_WAIT)?;
        within("ConsumerOptions::max_ack_pending", &self.max_ack_pending, &(1..=1_000_000))?;
        within("ConsumerOptions::inactive_threshold", &self.inactive, &KEPT)?;
        within("the number of waits in ConsumerOptions::backoff", &self.backoff.len(), &(0..=1_000))?;
        for wait in &self.backoff {
            within("a wait in ConsumerOptions::backoff", wait, &SERVER_WAIT)?;
        }
        if let Some(times) = self.max_deliver {
            within("ConsumerOptions::max_deliver", &times, &(1..=u32::MAX))?;
            if self.backoff.len() >= times as usize {
                return Err(BusError::Incompatible {
                    reason: format!(
                        "ConsumerOptions::max_deliver is {times}; it must exceed the number of \
                         waits in backoff ({})",
                        self.backoff.len()
                    ),
                });
            }
        }
        match self.start {
            Some(StartFrom::Sequence(0)) => Err(BusError::Incompatible {
                reason: "StartFrom::Sequence is 0; sequence numbers of a stream start at 1".into(),
            }),
            _ => Ok(()),
        }
    }

    pub(super) fn is_durable(&self) -> bool {
        !matches!(self.life, Life::Ephemeral)
    }

    pub(super) fn deliver(&self) -> Result<DeliverPolicy, BusError> {
        Ok(match self.start {
            Some(StartFrom::Beginning) => DeliverPolicy::All,
            Some(StartFrom::New) => DeliverPolicy::New,
            Some(StartFrom::Sequence(start_sequence)) => DeliverPolicy::ByStartSequence { start_sequence },
            Some(StartFrom::Time(time)) => DeliverPolicy::ByStartTime { start_time: instant(time)? },
            Some(StartFrom::LastOfEach) => DeliverPolicy::LastPerSubject,
            None if self.is_durable() => DeliverPolicy::All,
            None => DeliverPolicy::New,
        })
    }
}

/// Converts a time to async-nats' type, which depends on its features.
fn instant(time: DateTime<Utc>) -> Result<async_nats::datetime::DateTime, BusError> {
    let nanos = i128::from(time.timestamp()) * 1_000_000_000 + i128::from(time.timestamp_subsec_nanos());
    async_nats::datetime::from_nanos(nanos).map_err(|error| BusError::Incompatible {
        reason: format!("a consumer cannot start at {time}: {error}"),
    })
}

impl fmt::Debug for ConsumerOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConsumerOptions")
            .field("durable", &self.is_durable())
            .field("start", &self.start)
            .field("ack_wait", &self.ack_wait)
            .field("max_deliver", &self.max_deliver)
            .field("backoff", &self.backoff)
            .field("max_ack_pending", &self.max_ack_pending)
            .field("push", &self.push)
            .field("confirm", &self.confirm)
            .field("policy", &self.policy)
            .finish_non_exhaustive()
    }
}
