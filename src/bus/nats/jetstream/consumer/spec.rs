use std::fmt::Debug;
use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, Config, DeliverPolicy, ReplayPolicy};

use super::super::field::Field;
use super::super::options::ProvisionPolicy;

/// The expected configuration of a consumer.
#[derive(Debug, Clone)]
pub(in crate::bus::nats) struct ConsumerSpec {
    pub(in crate::bus::nats) name: String,
    /// Whether the consumer stays without a reader.
    pub(in crate::bus::nats) durable: bool,
    /// Whether other readers share the consumer.
    pub(in crate::bus::nats) shared: bool,
    /// Subjects, without overlaps.
    pub(in crate::bus::nats) filters: Vec<String>,
    /// Start of a new consumer. Not compared with an existing consumer, which has started already.
    pub(in crate::bus::nats) start: DeliverPolicy,
    pub(in crate::bus::nats) ack_wait: Duration,
    /// Maximum number of deliveries of a message; `None` without a limit.
    pub(in crate::bus::nats) max_deliver: Option<u32>,
    /// Successive waits in place of `ack_wait`.
    pub(in crate::bus::nats) backoff: Vec<Duration>,
    pub(in crate::bus::nats) max_ack_pending: usize,
    /// Push settings, in place of pull.
    pub(in crate::bus::nats) push: Option<Push>,
    /// Time without a reader after which the server deletes an ephemeral consumer.
    pub(in crate::bus::nats) inactive: Duration,
    pub(in crate::bus::nats) policy: ProvisionPolicy,
}

/// The destination of a push consumer.
#[derive(Debug, Clone)]
pub(in crate::bus::nats) struct Push {
    pub(in crate::bus::nats) subject: String,
    /// Queue group that shares the messages.
    pub(in crate::bus::nats) group: Option<String>,
}

impl ConsumerSpec {
    /// The shortest time after which the server may redeliver an unacknowledged message.
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
            // With a backoff, the server uses its first wait as `ack_wait` in any case.
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

/// The differences, each as `field: is X, should be Y`.
pub(super) fn differences(have: &Config, want: &Config) -> Vec<String> {
    compared(have, want).iter().filter(|field| !field.same).map(Field::to_string).collect()
}

/// Compares a consumer with its expected configuration.
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

/// The filter subjects of either field, sorted.
fn filters(config: &Config) -> Vec<&str> {
    let one = Some(config.filter_subject.as_str()).filter(|subject| !subject.is_empty());
    let mut filters: Vec<_> =
        one.into_iter().chain(config.filter_subjects.iter().map(String::as_str)).collect();
    filters.sort_unstable();
    filters
}
