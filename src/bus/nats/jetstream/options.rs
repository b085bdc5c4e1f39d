//! Options of the log stream.

use std::time::Duration;

use super::super::limits::{KEPT, within};
use crate::bus::BusError;
use crate::event::Position;

/// Options of the log stream. All limits are finite by default.
#[derive(Debug, Clone)]
pub struct JetStreamOptions {
    pub(super) policy: ProvisionPolicy,
    /// Name of the stream. Default: derived from the namespace.
    pub(super) name: Option<String>,
    pub(super) memory: bool,
    pub(super) replicas: usize,
    pub(super) max_age: Option<Duration>,
    pub(super) max_bytes: Option<u64>,
    pub(super) duplicate_window: Duration,
    pub(super) window: usize,
    pub(super) log_stream_after: Position,
}

/// The handling of a stream or a consumer on the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum ProvisionPolicy {
    /// It must exist; an operator creates it. For logins that may not create it.
    ///
    /// The operator decides about limits, storage and replicas of a stream: only the properties
    /// that an exact log stream requires are checked. A consumer must match.
    RequireExisting,
    /// Creates what is missing. What exists must match, and is never changed.
    #[default]
    CreateOrVerify,
    /// Creates what is missing. Updates what differs, as far as the server allows.
    CreateOrUpdate,
}

impl Default for JetStreamOptions {
    fn default() -> Self {
        Self {
            policy: ProvisionPolicy::default(),
            name: None,
            memory: false,
            replicas: 1,
            max_age: Some(Duration::from_secs(7 * 24 * 60 * 60)),
            max_bytes: Some(1 << 30),
            duplicate_window: Duration::from_secs(120),
            window: 256,
            log_stream_after: Position::START,
        }
    }
}

impl JetStreamOptions {
    /// Creates the default options.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the handling of the stream. Default: [`ProvisionPolicy::CreateOrVerify`].
    #[must_use]
    pub fn policy(mut self, policy: ProvisionPolicy) -> Self {
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

    /// Sets whether the stream is in the memory of the server instead of on disk.
    ///
    /// It is lost when the server stops, and refilled afterwards. Default: no.
    #[must_use]
    pub fn memory_storage(mut self, memory: bool) -> Self {
        self.memory = memory;
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

    /// Sets the position after which a new log stream starts.
    ///
    /// Also of one that replaces a lost log stream. Default: [`Position::START`], the whole log.
    #[must_use]
    pub fn log_stream_after(mut self, position: Position) -> Self {
        self.log_stream_after = position;
        self
    }

    /// Refuses values that no server supports.
    /// For the server, zero means its default or no limit.
    pub(in crate::bus::nats) fn check(&self) -> Result<(), BusError> {
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
    pub(in crate::bus::nats) fn name(&self, namespace: &str) -> String {
        let made = || format!("{}_EVENTS", namespace.to_uppercase().replace('.', "_"));
        self.name.clone().unwrap_or_else(made)
    }
}

fn is_stream_name(name: &str) -> bool {
    (1..=200).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_graphic() && !b".*>/\\".contains(&byte))
}
