use std::fmt::Debug;
use std::time::Duration;

use super::super::super::inspect::Field;
use async_nats::jetstream::consumer::{AckPolicy, Config, DeliverPolicy, ReplayPolicy};

/// What to do about a consumer on the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum ConsumerPolicy {
    /// It must be there, as described; an operator makes it. For logins that may not create anything.
    RequireExisting,
    /// It is made if it is not there; else it must be as described, and is left alone if it is not.
    #[default]
    CreateOrVerify,
    /// It is made if it is not there, and changed if it is not as described, as far as the server agrees.
    CreateOrUpdate,
}

/// What a consumer should be like.
#[derive(Debug, Clone)]
pub(in crate::bus::nats) struct ConsumerSpec {
    pub(in crate::bus::nats) name: String,
    /// Whether it stays when nobody reads from it.
    pub(in crate::bus::nats) durable: bool,
    /// Whether others read from it as well.
    pub(in crate::bus::nats) shared: bool,
    /// Subjects; none overlaps with another.
    pub(in crate::bus::nats) filters: Vec<String>,
    /// Where it begins. Not compared with one that is there: that has begun.
    pub(in crate::bus::nats) start: DeliverPolicy,
    pub(in crate::bus::nats) ack_wait: Duration,
    /// How often a message is delivered at most; `None` without limit.
    pub(in crate::bus::nats) max_deliver: Option<u32>,
    /// Waits in place of `ack_wait`, one after the other.
    pub(in crate::bus::nats) backoff: Vec<Duration>,
    pub(in crate::bus::nats) max_ack_pending: usize,
    /// Pushed by the server, in place of pulled.
    pub(in crate::bus::nats) push: Option<Push>,
    /// When nobody has read from one that is not durable for this long, it goes.
    pub(in crate::bus::nats) inactive: Duration,
    pub(in crate::bus::nats) policy: ConsumerPolicy,
}

/// Where the server pushes messages to.
#[derive(Debug, Clone)]
pub(in crate::bus::nats) struct Push {
    pub(in crate::bus::nats) subject: String,
    /// Whose members share them.
    pub(in crate::bus::nats) group: Option<String>,
}

impl ConsumerSpec {
    /// How soon the server may deliver something again that was not settled.
    pub(in crate::bus::nats) fn shortest_wait(&self) -> Duration {
        self.backoff.iter().copied().min().unwrap_or(self.ack_wait)
    }

    pub(super) fn config(&self, start: DeliverPolicy) -> Config {
        let (filter_subject, filter_subjects) = match &*self.filters {
            [one] => (one.clone(), Vec::new()),
            several => (String::new(), several.to_vec()),
        };
        Config {
            name: Some(self.name.clone()),
            durable_name: self.durable.then(|| self.name.clone()),
            deliver_subject: self.push.as_ref().map(|push| push.subject.clone()),
            deliver_group: self.push.as_ref().and_then(|push| push.group.clone()),
            deliver_policy: start,
            ack_policy: AckPolicy::Explicit,
            // With a backoff the server takes its first wait in any case.
            ack_wait: self.backoff.first().copied().unwrap_or(self.ack_wait),
            max_deliver: self.max_deliver.map_or(-1, i64::from),
            backoff: self.backoff.clone(),
            filter_subject,
            filter_subjects,
            replay_policy: ReplayPolicy::Instant,
            max_ack_pending: i64::try_from(self.max_ack_pending).unwrap_or(i64::MAX),
            inactive_threshold: if self.durable { Duration::ZERO } else { self.inactive },
            memory_storage: !self.durable,
            num_replicas: usize::from(!self.durable),
            ..Config::default()
        }
    }
}

/// What is not as it should be, each as `field: is X, should be Y`.
pub(super) fn differences(have: &Config, want: &Config) -> Vec<String> {
    compared(have, want).iter().filter(|field| !field.same).map(Field::to_string).collect()
}

/// How a consumer is, and how it should be.
pub(in crate::bus::nats) fn compared_consumer(have: &Config, want: &ConsumerSpec) -> Vec<Field> {
    compared(have, &want.config(want.start))
}

fn compared(have: &Config, want: &Config) -> Vec<Field> {
    let mut fields = Vec::new();
    let mut compare = |name: &'static str, is: &dyn Debug, should_be: &dyn Debug, same: bool| {
        fields.push(Field { name, is: format!("{is:?}"), should_be: format!("{should_be:?}"), same });
    };
    macro_rules! compare {
        ($($field:ident),*) => { $( compare(stringify!($field), &have.$field, &want.$field, have.$field == want.$field); )* };
    }
    let (filters, wanted) = (filters(have), filters(want));
    compare("filter_subjects", &filters, &wanted, filters == wanted);
    compare!(
        durable_name,
        deliver_group,
        ack_policy,
        ack_wait,
        max_deliver,
        backoff,
        max_ack_pending,
        replay_policy
    );
    compare!(headers_only, inactive_threshold, deliver_subject);
    fields
}

/// Sorted, whichever of the two fields they stand in.
fn filters(config: &Config) -> Vec<&str> {
    let one = Some(config.filter_subject.as_str()).filter(|subject| !subject.is_empty());
    let mut filters: Vec<_> =
        one.into_iter().chain(config.filter_subjects.iter().map(String::as_str)).collect();
    filters.sort_unstable();
    filters
}
