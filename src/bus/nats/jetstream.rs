//! An exact mirror of the log in a JetStream stream: every event once, in log order, without a hole.
//!
//! Its own end says how far publishing got. Each message states the sequence number of the one before it, and the server
//! refuses it when that is not the last one: a publisher that was paused, and wakes up behind another, changes nothing.

mod consumer;
mod mirror;
mod stream;

use std::time::Duration;

use async_nats::jetstream::context::ContextBuilder;
use uuid::Uuid;

pub(super) use self::consumer::compared_consumer;
pub use self::consumer::{AckError, ConsumerPolicy};
pub(super) use self::consumer::{Consumer, ConsumerItem, ConsumerSpec, Push, Settle, Taken};
pub(super) use self::mirror::MirrorPublisher;
use self::stream::{Content, Wanted, config, ensure};
pub(super) use self::stream::{ask as stream_api, fields as compared_stream, info as stream_info};
use super::connection::Connection;
use super::limits::{KEPT, within};
use super::subjects::Names;
use crate::bus::BusError;
use crate::event::Position;

/// How long dead letters are kept, and how many bytes of them.
const DEAD_AGE: Duration = Duration::from_secs(30 * 24 * 60 * 60);
const DEAD_BYTES: u64 = 256 << 20;

/// What the mirror of the log looks like. Everything not said is as the methods document it; limits are finite by default.
#[derive(Debug, Clone)]
pub struct JetStreamOptions {
    policy: StreamPolicy,
    /// Made from the namespace if not given.
    name: Option<String>,
    storage: StreamStorage,
    replicas: usize,
    max_age: Option<Duration>,
    max_bytes: Option<u64>,
    duplicate_window: Duration,
    window: usize,
    mirror_from: MirrorFrom,
}

/// What to do about the stream on the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum StreamPolicy {
    /// It must be there; an operator decides about its limits, storage and replicas. Only what an exact mirror cannot do
    /// without is checked.
    RequireExisting,
    /// It is made if it is not there; else it must be exactly as described, and is left alone if it is not.
    #[default]
    CreateOrVerify,
    /// It is made if it is not there, and changed if it is not as described, as far as the server agrees.
    CreateOrUpdate,
}

/// Where a stream keeps its messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum StreamStorage {
    /// On disk.
    #[default]
    File,
    /// In the server's memory; gone with the server, and rebuilt then.
    Memory,
}

/// Where a new mirror begins, also one that is made anew because the old one was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum MirrorFrom {
    /// With the first event of the log.
    #[default]
    Beginning,
    /// Behind this position.
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
            mirror_from: MirrorFrom::default(),
        }
    }
}

impl JetStreamOptions {
    /// The defaults.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// What to do about the stream. [`StreamPolicy::CreateOrVerify`] by default.
    #[must_use]
    pub fn policy(mut self, policy: StreamPolicy) -> Self {
        self.policy = policy;
        self
    }

    /// The stream's name. By default made from the namespace: `STORIED_EVENTS` from `storied`, with `_` for dots.
    #[must_use]
    pub fn stream(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Where it keeps its messages. On disk by default.
    #[must_use]
    pub fn storage(mut self, storage: StreamStorage) -> Self {
        self.storage = storage;
        self
    }

    /// How many servers of a cluster keep it. 1 by default, at most 5; 3 is for production.
    #[must_use]
    pub fn replicas(mut self, replicas: usize) -> Self {
        self.replicas = replicas;
        self
    }

    /// How long a message stays. 7 days by default, 100 ms to 100 years; `None` for as long as there is room.
    #[must_use]
    pub fn max_age(mut self, age: impl Into<Option<Duration>>) -> Self {
        self.max_age = age.into();
        self
    }

    /// How large the stream may become, in bytes; the oldest messages make room. The server sets this much aside when the
    /// stream is made. 1 GiB by default, at least 1; `None` for as much as there is.
    #[must_use]
    pub fn max_bytes(mut self, bytes: impl Into<Option<u64>>) -> Self {
        self.max_bytes = bytes.into();
        self
    }

    /// How long the server recognises an event that it has already, by its id: a second net below the sequence check. 2
    /// minutes by default, 100 ms to 100 years, and no longer than [`max_age`](Self::max_age).
    #[must_use]
    pub fn duplicate_window(mut self, window: Duration) -> Self {
        self.duplicate_window = window;
        self
    }

    /// How many messages may be on their way without a confirmation. 256 by default, 1 to 65,536.
    #[must_use]
    pub fn window(mut self, messages: usize) -> Self {
        self.window = messages;
        self
    }

    /// Where a new mirror begins. [`MirrorFrom::Beginning`] by default.
    #[must_use]
    pub fn mirror_from(mut self, from: MirrorFrom) -> Self {
        self.mirror_from = from;
        self
    }

    /// Refuses what no server could keep to. To the server, zero means something else: its default, or no limit.
    pub(super) fn check(&self) -> Result<(), BusError> {
        let incompatible = |reason: String| Err(BusError::Incompatible { reason });
        within("JetStreamOptions::replicas", &self.replicas, &(1..=5))?;
        within("JetStreamOptions::window", &self.window, &(1..=65_536))?;
        within("JetStreamOptions::duplicate_window", &self.duplicate_window, &KEPT)?;
        if let Some(age) = self.max_age {
            within("JetStreamOptions::max_age (None for no limit)", &age, &KEPT)?;
            if self.duplicate_window > age {
                return incompatible(format!(
                    "JetStreamOptions::duplicate_window is {:?}, and must not be longer than max_age, {age:?}",
                    self.duplicate_window
                ));
            }
        }
        if let Some(bytes) = self.max_bytes {
            within("JetStreamOptions::max_bytes (None for no limit)", &bytes, &(1..=i64::MAX as u64))?;
        }
        match &self.name {
            Some(name) if !is_stream_name(name) => incompatible(format!(
                "{:?} cannot be the name of a stream: use 1 to 200 printable ASCII characters without spaces and . * > / \\",
                name.chars().take(80).collect::<String>()
            )),
            _ => Ok(()),
        }
    }

    /// The stream's name under a namespace.
    pub(super) fn name(&self, namespace: &str) -> String {
        let made = || format!("{}_EVENTS", namespace.to_uppercase().replace('.', "_"));
        self.name.clone().unwrap_or_else(made)
    }

    /// What the mirror of a store's log is to be like.
    pub(super) fn wanted_mirror(&self, names: &Names, store: Uuid) -> Wanted {
        let content = Content { subjects: names.mapping.all(), store: Some(store) };
        config(content, &self.name(names.namespace()), self)
    }

    /// What the stream of dead letters is to be like.
    pub(super) fn wanted_dead(&self, names: &Names) -> Wanted {
        let (subjects, name) = dead(names);
        config(Content { subjects: &subjects, store: None }, &name, &self.of_dead())
    }

    /// As this, for dead letters.
    fn of_dead(&self) -> Self {
        Self { max_age: Some(DEAD_AGE), max_bytes: Some(DEAD_BYTES), ..self.clone() }
    }

    /// Sees to it that a subscriber finds the stream there. Whose log it is, its publisher will say.
    pub(super) async fn provide(&self, connection: &Connection, names: &Names) -> Result<(), BusError> {
        let client = &connection.client;
        let jetstream = ContextBuilder::new().timeout(connection.answer_timeout()).build(client.clone());
        let content = Content { subjects: names.mapping.all(), store: None };
        let name = self.name(names.namespace());
        let ensured = ensure(&jetstream, client, content, &name, self);
        connection.while_permitted("looking for the stream", &stream_rights(&name), ensured).await.map(drop)
    }

    /// Sees to it that there is a stream for dead letters, as the policy says.
    pub(super) async fn provide_dead(&self, connection: &Connection, names: &Names) -> Result<(), BusError> {
        let client = &connection.client;
        let jetstream = ContextBuilder::new().timeout(connection.answer_timeout()).build(client.clone());
        let (subjects, name) = dead(names);
        let content = Content { subjects: &subjects, store: None };
        let options = self.of_dead();
        let ensured = ensure(&jetstream, client, content, &name, &options);
        let what = "looking for the stream of dead letters";
        connection.while_permitted(what, &stream_rights(&name), ensured).await.map(drop)
    }
}

fn is_stream_name(name: &str) -> bool {
    (1..=200).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_graphic() && !b".*>/\\".contains(&byte))
}

/// Subjects of questions about a stream.
pub(super) fn stream_rights(stream: &str) -> [String; 3] {
    [
        format!("$JS.API.STREAM.*.{stream}"),
        format!("$JS.API.STREAM.MSG.GET.{stream}"),
        "$JS.API.STREAM.NAMES".to_owned(),
    ]
}

/// Subjects of questions about a consumer.
fn consumer_rights(stream: &str, consumer: &str) -> [String; 4] {
    [
        format!("$JS.API.CONSUMER.*.{stream}.{consumer}"),
        format!("$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"),
        format!("$JS.API.CONSUMER.CREATE.{stream}.>"),
        format!("$JS.API.STREAM.INFO.{stream}"),
    ]
}

/// The subjects and the name of the stream of dead letters.
fn dead(names: &Names) -> ([String; 1], String) {
    let name = format!("{}_DEAD", names.namespace().to_uppercase().replace('.', "_"));
    ([format!("{}.dead.>", names.namespace())], name)
}
