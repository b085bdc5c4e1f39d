//! The log stream: an exact copy of the log in a JetStream stream, in log order, without gaps.
//!
//! The last message of the stream states how far publishing got. Each message states the sequence
//! number of the message before it. The server refuses a message if that number is not the last
//! one. A paused publisher that resumes after another publisher therefore changes nothing.

mod consumer;
mod log_publisher;
mod stream;

use std::time::Duration;

use async_nats::jetstream::context::ContextBuilder;
use uuid::Uuid;

pub(super) use self::consumer::compared_consumer;
pub use self::consumer::{AckError, ConsumerPolicy};
pub(super) use self::consumer::{Acker, Consumer, ConsumerItem, ConsumerSpec, Push, Taken};
pub(super) use self::log_publisher::LogPublisher;
use self::stream::{Content, Wanted, config, ensure};
pub(super) use self::stream::{ask as stream_api, fields as compared_stream, info as stream_info};
use super::connection::Connection;
use super::limits::{KEPT, within};
use super::subjects::Names;
use crate::bus::BusError;
use crate::event::Position;

/// Limits of the stream of dead letters: age, and size in bytes.
const DEAD_AGE: Duration = Duration::from_secs(30 * 24 * 60 * 60);
const DEAD_BYTES: u64 = 256 << 20;

/// Options of the log stream. All limits are finite by default.
#[derive(Debug, Clone)]
pub struct JetStreamOptions {
    policy: StreamPolicy,
    /// Name of the stream. Default: derived from the namespace.
    name: Option<String>,
    storage: StreamStorage,
    replicas: usize,
    max_age: Option<Duration>,
    max_bytes: Option<u64>,
    duplicate_window: Duration,
    window: usize,
    log_stream_from: LogStreamFrom,
}

/// The handling of the stream on the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum StreamPolicy {
    /// The stream must exist. An operator decides about its limits, storage and replicas.
    /// Only the properties that an exact log stream requires are checked.
    RequireExisting,
    /// Creates a missing stream. An existing stream must match exactly, and is never changed.
    #[default]
    CreateOrVerify,
    /// Creates a missing stream. Updates a different stream, as far as the server allows.
    CreateOrUpdate,
}

/// The storage of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum StreamStorage {
    /// On disk.
    #[default]
    File,
    /// In the memory of the server. Lost when the server stops, and refilled afterwards.
    Memory,
}

/// The start of a new log stream, also of one that replaces a lost log stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum LogStreamFrom {
    /// With the first event of the log.
    #[default]
    Beginning,
    /// After this position.
    After(Position),
}

impl Default for JetStreamOptions {
    fn default() -> Self {
        Self {
            policy: StreamPolicy::default(),
            name: None,
            storage: StreamStorage::default(),
            replicas: 1,
            max_age: Some(Duration::from_secs(7 * 24 * 60 * 60)),
            max_bytes: Some(1 << 30),
            duplicate_window: Duration::from_secs(120),
            window: 256,
            log_stream_from: LogStreamFrom::default(),
        }
    }
}

impl JetStreamOptions {
    /// Creates the default options.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the handling of the stream. Default: [`StreamPolicy::CreateOrVerify`].
    #[must_use]
    pub fn policy(mut self, policy: StreamPolicy) -> Self {
        self.policy = policy;
        self
    }

    /// Sets the name of the stream.
    ///
    /// Default: derived from the namespace, with `_` for dots. `storied` gives `STORIED_EVENTS`.
    #[must_use]
    pub fn stream(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Sets the storage. Default: on disk.
    #[must_use]
    pub fn storage(mut self, storage: StreamStorage) -> Self {
        self.storage = storage;
        self
    }

    /// Sets the number of replicas in a cluster. Default: 1. Maximum: 5. Use 3 in production.
    #[must_use]
    pub fn replicas(mut self, replicas: usize) -> Self {
        self.replicas = replicas;
        self
    }

    /// Sets how long a message is kept; `None` without a limit.
    ///
    /// Default: 7 days. Range: 100 ms to 100 years.
    #[must_use]
    pub fn max_age(mut self, age: impl Into<Option<Duration>>) -> Self {
        self.max_age = age.into();
        self
    }

    /// Sets the maximum size of the stream in bytes; `None` without a limit.
    ///
    /// The oldest messages are deleted first. The server reserves this size when the stream is
    /// created. Default: 1 GiB. Minimum: 1.
    #[must_use]
    pub fn max_bytes(mut self, bytes: impl Into<Option<u64>>) -> Self {
        self.max_bytes = bytes.into();
        self
    }

    /// Sets the deduplication window, in which the server detects a duplicate event by its id.
    ///
    /// The window supplements the sequence check. Default: 2 minutes. Range: 100 ms to 100 years,
    /// and at most [`max_age`](Self::max_age).
    #[must_use]
    pub fn duplicate_window(mut self, window: Duration) -> Self {
        self.duplicate_window = window;
        self
    }

    /// Sets the maximum number of unconfirmed messages in flight. Default: 256. Range: 1 to 65,536.
    #[must_use]
    pub fn window(mut self, messages: usize) -> Self {
        self.window = messages;
        self
    }

    /// Sets the start of a new log stream. Default: [`LogStreamFrom::Beginning`].
    #[must_use]
    pub fn log_stream_from(mut self, from: LogStreamFrom) -> Self {
        self.log_stream_from = from;
        self
    }

    /// Refuses values that no server supports.
    /// For the server, zero means its default or no limit.
    pub(super) fn check(&self) -> Result<(), BusError> {
        let incompatible = |reason: String| Err(BusError::Incompatible { reason });
        within("JetStreamOptions::replicas", &self.replicas, &(1..=5))?;
        within("JetStreamOptions::window", &self.window, &(1..=65_536))?;
        within("JetStreamOptions::duplicate_window", &self.duplicate_window, &KEPT)?;
        if let Some(age) = self.max_age {
            within("JetStreamOptions::max_age (None for no limit)", &age, &KEPT)?;
            if self.duplicate_window > age {
                return incompatible(format!(
                    "JetStreamOptions::duplicate_window is {:?}; it must not exceed max_age \
                     ({age:?})",
                    self.duplicate_window
                ));
            }
        }
        if let Some(bytes) = self.max_bytes {
            within("JetStreamOptions::max_bytes (None for no limit)", &bytes, &(1..=i64::MAX as u64))?;
        }
        match &self.name {
            Some(name) if !is_stream_name(name) => incompatible(format!(
                "invalid stream name {:?}; use 1 to 200 printable ASCII characters without spaces \
                 and . * > / \\",
                name.chars().take(80).collect::<String>()
            )),
            _ => Ok(()),
        }
    }

    /// The name of the stream under a namespace.
    pub(super) fn name(&self, namespace: &str) -> String {
        let made = || format!("{}_EVENTS", namespace.to_uppercase().replace('.', "_"));
        self.name.clone().unwrap_or_else(made)
    }

    /// The expected configuration of the log stream of a store.
    pub(super) fn wanted_log_stream(&self, names: &Names, store: Uuid) -> Wanted {
        let content = Content { subjects: names.mapping.all(), store: Some(store) };
        config(content, &self.name(names.namespace()), self)
    }

    /// The expected configuration of the stream of dead letters.
    pub(super) fn wanted_dead(&self, names: &Names) -> Wanted {
        let (subjects, name) = dead(names);
        config(Content { subjects: &subjects, store: None }, &name, &self.of_dead())
    }

    /// These options with the limits of dead letters.
    fn of_dead(&self) -> Self {
        Self { max_age: Some(DEAD_AGE), max_bytes: Some(DEAD_BYTES), ..self.clone() }
    }

    /// Ensures that the log stream exists, for a subscriber.
    /// Its publisher marks later whose log it is.
    pub(super) async fn provide(&self, connection: &Connection, names: &Names) -> Result<(), BusError> {
        let client = &connection.client;
        let jetstream = ContextBuilder::new().timeout(connection.answer_timeout()).build(client.clone());
        let content = Content { subjects: names.mapping.all(), store: None };
        let name = self.name(names.namespace());
        let ensured = ensure(&jetstream, client, content, &name, self);
        connection.while_permitted("checking the stream", &stream_rights(&name), ensured).await.map(drop)
    }

    /// Ensures that the stream of dead letters exists, as the policy requires.
    pub(super) async fn provide_dead(&self, connection: &Connection, names: &Names) -> Result<(), BusError> {
        let client = &connection.client;
        let jetstream = ContextBuilder::new().timeout(connection.answer_timeout()).build(client.clone());
        let (subjects, name) = dead(names);
        let content = Content { subjects: &subjects, store: None };
        let options = self.of_dead();
        let ensured = ensure(&jetstream, client, content, &name, &options);
        let what = "checking the stream of dead letters";
        connection.while_permitted(what, &stream_rights(&name), ensured).await.map(drop)
    }
}

fn is_stream_name(name: &str) -> bool {
    (1..=200).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_graphic() && !b".*>/\\".contains(&byte))
}

/// Subjects of the requests about a stream.
pub(super) fn stream_rights(stream: &str) -> [String; 3] {
    [
        format!("$JS.API.STREAM.*.{stream}"),
        format!("$JS.API.STREAM.MSG.GET.{stream}"),
        "$JS.API.STREAM.NAMES".to_owned(),
    ]
}

/// Subjects of the requests about a consumer.
fn consumer_rights(stream: &str, consumer: &str) -> [String; 4] {
    [
        format!("$JS.API.CONSUMER.*.{stream}.{consumer}"),
        format!("$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"),
        format!("$JS.API.CONSUMER.CREATE.{stream}.>"),
        format!("$JS.API.STREAM.INFO.{stream}"),
    ]
}

/// Subjects and name of the stream of dead letters.
fn dead(names: &Names) -> ([String; 1], String) {
    let name = format!("{}_DEAD", names.namespace().to_uppercase().replace('.', "_"));
    ([format!("{}.dead.>", names.namespace())], name)
}
