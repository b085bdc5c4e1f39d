//! The bus over NATS: Core (keeps nothing) or JetStream (keeps an exact copy of the log).
//!
//! Both drivers publish every event to `{namespace}.events.{event name}`, in log order. Followers
//! use a plain subscription with both drivers, unless they
//! [follow durably](crate::projection::FollowMode). A durable consumer is slower and no safer: a
//! live follower detects gaps by the positions in the messages. It then reads the missing events
//! from the store. `docs/wire-format.md` describes the message format.

mod connection;
mod connection_metrics;
mod consumer_name;
mod core_nats;
mod durable_consumer;
mod errors;
mod event_bus;
mod events;
mod inspect;
mod jetstream;
mod limits;
mod live_subscription;
mod login;
mod merged_subscription;
mod nats_bus;
mod options;
pub(crate) mod shared_connection;
mod subjects;
mod subscribe;
mod wakeup;
mod wire;

pub use self::events::NatsEvent;
pub use self::inspect::{
    ConsumerReport, LogStreamItem, LogStreamReader, NatsReport, StreamFound, StreamReport,
};
pub use self::jetstream::{AckError, Field, JetStreamOptions, ProvisionPolicy};
pub use self::nats_bus::NatsBus;
pub use self::options::NatsOptions;
pub use self::subjects::Subjects;
pub use self::subscribe::{
    ConsumerOptions, Delivery, Gap, HandleError, HandleOptions, HandlerTask, Received, RetryPolicy,
    StartFrom, SubscribeOptions, Subscription, SubscriptionError, SubscriptionErrors, SubscriptionStats,
};
