use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::consumer::DeliverPolicy;
use chrono::{DateTime, Utc};

use super::super::jetstream::ConsumerPolicy;
use super::super::limits::{KEPT, PAUSE, SERVER_WAIT, within};
use crate::bus::BusError;

/// How a [`Subscription`](super::Subscription) gets its events.
#[derive(Clone)]
pub struct SubscribeOptions {
    group: Option<Arc<GroupOf>>,
    pub(super) capacity: usize,
    pub(super) pull_timeout: Option<Duration>,
    pub(super) eat_errors: bool,
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
            eat_errors: false,
            lazy: false,
            consumer: None,
        }
    }
}

impl SubscribeOptions {
    /// The defaults: every subscriber gets every event from now on.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Of all subscribers in this queue group, one gets each event. Their order over several subscribers is nobody's.
    #[must_use]
    pub fn queue_group(self, group: impl Into<String>) -> Self {
        let group = group.into();
        self.queue_groups(move |_| Some(group.clone()))
    }

    /// A queue group for each name (or pattern) that is subscribed to; `None` for those of which everybody gets all.
    #[must_use]
    pub fn queue_groups(mut self, group: impl Fn(&str) -> Option<String> + Send + Sync + 'static) -> Self {
        self.group = Some(Arc::new(group));
        self
    }

    /// Shares the events out among the instances of a service: the queue group of `order.placed` is
    /// `{service}:order.placed`.
    #[must_use]
    pub fn load_balancer(self, service: impl Into<String>) -> Self {
        let service = service.into();
        self.queue_groups(move |name| Some(format!("{service}:{name}")))
    }

    /// How many events wait for their reader in this process. Over Core what comes on top is lost, and said
    /// ([`Gap::Overflow`](super::Gap::Overflow)); from a JetStream consumer no more are asked for. 1,024 by default, 1 to
    /// 1,048,576. This and all that follows is checked by [`subscribe`](super::super::NatsBus::subscribe).
    #[must_use]
    pub fn capacity(mut self, events: usize) -> Self {
        self.capacity = events;
        self
    }

    /// How long an event may wait for its reader. Then this subscriber loses it, and gets a
    /// [`SubscriptionError::PullTimeout`](super::SubscriptionError::PullTimeout); a JetStream consumer delivers it again.
    /// Without limit by default; 1 ms to a day.
    #[must_use]
    pub fn pull_timeout(mut self, timeout: Duration) -> Self {
        self.pull_timeout = Some(timeout);
        self
    }

    /// Counts errors and keeps none of them. They never hold anything up in either case.
    #[must_use]
    pub fn eat_errors(mut self) -> Self {
        self.eat_errors = true;
        self
    }

    /// Does not wait for a server: the subscription begins when there is one, and why there is none is among its errors.
    /// By default the first attempt must succeed.
    #[must_use]
    pub fn lazy(mut self) -> Self {
        self.lazy = true;
        self
    }

    /// How the consumer is, with the JetStream driver. [`ConsumerOptions::ephemeral`] by default.
    #[must_use]
    pub fn consumer(mut self, options: ConsumerOptions) -> Self {
        self.consumer = Some(options);
        self
    }

    /// Refuses what could not work.
    pub(super) fn check(&self) -> Result<(), BusError> {
        within("SubscribeOptions::capacity", &self.capacity, &(1..=1 << 20))?;
        if let Some(timeout) = self.pull_timeout {
            within("SubscribeOptions::pull_timeout", &timeout, &PAUSE)?;
        }
        self.consumer.as_ref().map_or(Ok(()), ConsumerOptions::check)
    }

    /// The queue group of a name; none if it is empty.
    pub(super) fn group_of(&self, name: &str) -> Option<String> {
        self.group.as_ref().and_then(|group| group(name)).filter(|group| !group.is_empty())
    }
}

impl fmt::Debug for SubscribeOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SubscribeOptions")
            .field("capacity", &self.capacity)
            .field("pull_timeout", &self.pull_timeout)
            .field("eat_errors", &self.eat_errors)
            .field("lazy", &self.lazy)
            .field("consumer", &self.consumer)
            .finish_non_exhaustive()
    }
}

/// How a consumer of the mirror is.
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
    pub(super) policy: ConsumerPolicy,
}

/// How long a consumer lives, and what it is called.
#[derive(Clone)]
pub(super) enum Life {
    Ephemeral,
    /// `prefix:queue:event`.
    Durable(String),
    Named(Arc<NameOf>),
}

type NameOf = dyn Fn(&str, &str) -> String + Send + Sync;

/// Where a consumer begins that is made for the first time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum StartFrom {
    /// With the oldest event that the mirror has.
    Beginning,
    /// With what is published from now on.
    New,
    /// With this message of the stream.
    Sequence(u64),
    /// With the first event that was published at this time or later.
    Time(DateTime<Utc>),
    /// With the last event of each name that is subscribed to (of each subject, if names are mapped to several), and then with
    /// what is published from now on.
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
            policy: ConsumerPolicy::default(),
        }
    }

    /// It goes with its subscription, and delivers what is published from now on.
    #[must_use]
    pub fn ephemeral() -> Self {
        Self::new(Life::Ephemeral)
    }

    /// It stays on the server, goes on where it was, and begins with the oldest event that the mirror has. Called
    /// `prefix:queue:event`, where a dot is written `_`, everything but letters, digits and `-` as `=` and two hexadecimal
    /// digits, no queue group as `$noqueue` and every event as `$all`; several events have `,` between them. Another set of
    /// events is another consumer.
    #[must_use]
    pub fn durable(prefix: impl Into<String>) -> Self {
        Self::new(Life::Durable(prefix.into()))
    }

    /// As [`durable`](Self::durable), under this name (written in the same way).
    #[must_use]
    pub fn durable_as(name: impl Into<String>) -> Self {
        let name = name.into();
        Self::durable_with(move |_, _| name.clone())
    }

    /// As [`durable`](Self::durable), under a name made from event (several with `,` between them) and queue group (empty
    /// if there is none), written in the same way.
    #[must_use]
    pub fn durable_with(name: impl Fn(&str, &str) -> String + Send + Sync + 'static) -> Self {
        Self::new(Life::Named(Arc::new(name)))
    }

    /// Where it begins. [`New`](StartFrom::New) for an ephemeral one, [`Beginning`](StartFrom::Beginning) for a durable one.
    #[must_use]
    pub fn start(mut self, from: StartFrom) -> Self {
        self.start = Some(from);
        self
    }

    /// How long the server waits for a delivery to be settled before it delivers again. While a handler runs it is told
    /// that it does. 30 s by default, 10 ms to a year.
    #[must_use]
    pub fn ack_wait(mut self, wait: Duration) -> Self {
        self.ack_wait = wait;
        self
    }

    /// How often the server delivers an event at most; then it stays in the mirror, and the consumer passes it over. No
    /// limit by default, at least 1: [`HandleOptions`](super::HandleOptions) has one of its own, which leaves a dead letter.
    #[must_use]
    pub fn max_deliver(mut self, times: u32) -> Self {
        self.max_deliver = Some(times);
        self
    }

    /// Waits between one delivery and the next that take the place of `ack_wait`, the last of them for all that follow. The
    /// server does not apply them to what is given back with `nak`. [`max_deliver`](Self::max_deliver), if there is one,
    /// must be greater than their number. None by default, at most 1,000, each 10 ms to a year.
    #[must_use]
    pub fn backoff(mut self, waits: impl IntoIterator<Item = Duration>) -> Self {
        self.backoff = waits.into_iter().collect();
        self
    }

    /// How many events of this consumer may be out at a time without being settled, with all its readers. 1,000 by default,
    /// 1 to 1,000,000; 1 keeps strict order also when something is delivered again.
    #[must_use]
    pub fn max_ack_pending(mut self, events: usize) -> Self {
        self.max_ack_pending = events;
        self
    }

    /// The server pushes, in place of being asked. It is limited by [`max_ack_pending`](Self::max_ack_pending) alone.
    #[must_use]
    pub fn push(mut self) -> Self {
        self.push = true;
        self
    }

    /// Does not wait until the server knows that a delivery is settled. Quicker, and what is lost on the way is delivered
    /// again. By default it waits.
    #[must_use]
    pub fn ack_async(mut self) -> Self {
        self.confirm = false;
        self
    }

    /// How long an ephemeral consumer outlives its readers, if they could not say goodbye. 60 s by default, 100 ms to 100
    /// years.
    #[must_use]
    pub fn inactive(mut self, wait: Duration) -> Self {
        self.inactive = wait;
        self
    }

    /// What to do about a consumer that is there, or not. [`ConsumerPolicy::CreateOrVerify`] by default.
    #[must_use]
    pub fn policy(mut self, policy: ConsumerPolicy) -> Self {
        self.policy = policy;
        self
    }

    /// Refuses what no server could keep to.
    fn check(&self) -> Result<(), BusError> {
        within("ConsumerOptions::ack_wait", &self.ack_wait, &SERVER_WAIT)?;
        within("ConsumerOptions::max_ack_pending", &self.max_ack_pending, &(1..=1_000_000))?;
        within("ConsumerOptions::inactive", &self.inactive, &KEPT)?;
        within("the number of waits in ConsumerOptions::backoff", &self.backoff.len(), &(0..=1_000))?;
        for wait in &self.backoff {
            within("a wait in ConsumerOptions::backoff", wait, &SERVER_WAIT)?;
        }
        if let Some(times) = self.max_deliver {
            within("ConsumerOptions::max_deliver", &times, &(1..=u32::MAX))?;
            if self.backoff.len() >= times as usize {
                return Err(BusError::Incompatible {
                    reason: format!(
                        "ConsumerOptions::max_deliver is {times}, and must be greater than the number of waits in backoff, {}",
                        self.backoff.len()
                    ),
                });
            }
        }
        match self.start {
            Some(StartFrom::Sequence(0)) => Err(BusError::Incompatible {
                reason: "StartFrom::Sequence is 0, and messages of a stream are counted from 1".into(),
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

/// As async-nats has it, whichever of its kinds of time that is in this build.
fn instant(time: DateTime<Utc>) -> Result<async_nats::datetime::DateTime, BusError> {
    let nanos = i128::from(time.timestamp()) * 1_000_000_000 + i128::from(time.timestamp_subsec_nanos());
    async_nats::datetime::from_nanos(nanos).map_err(|error| BusError::Incompatible {
        reason: format!("a consumer cannot begin at {time}: {error}"),
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
