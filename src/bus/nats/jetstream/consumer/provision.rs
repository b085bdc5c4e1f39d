//! Operations on a consumer of the server: lookup, creation and comparison.

use std::sync::Arc;

use async_nats::jetstream::consumer::{Config, DeliverPolicy, Info};
use async_nats::jetstream::{Context, Error, ErrorCode};

use super::super::options::ProvisionPolicy;
use super::super::stream::{NOTHING, api, info as stream_info, refused};
use super::spec::{ConsumerSpec, differences};
use crate::bus::BusError;
use crate::bus::nats::connection::Connection;
use crate::bus::nats::errors::{incompatible, silent};

/// A consumer, its stream and its connection.
pub(super) struct Target {
    pub(super) connection: Arc<Connection>,
    pub(super) jetstream: Context,
    pub(super) stream: String,
    pub(super) spec: ConsumerSpec,
}

impl Target {
    /// Returns the state of the consumer, if it exists.
    pub(super) async fn find(&self) -> Result<Option<Info>, BusError> {
        let subject = format!("CONSUMER.INFO.{}.{}", self.stream, self.spec.name);
        match api(&self.jetstream, &self.connection.client, subject, &NOTHING).await? {
            Ok(info) => Ok(Some(info)),
            Err(error) if error.error_code() == ErrorCode::CONSUMER_NOT_FOUND => Ok(None),
            Err(error) if error.error_code() == ErrorCode::STREAM_NOT_FOUND => Err(self.no_stream()),
            Err(error) => Err(refused(&format!("looking up the consumer {}", self.spec.name), error)),
        }
    }

    fn no_stream(&self) -> BusError {
        silent(format!("there is no JetStream stream {}", self.stream))
    }

    /// Reports messages that the stream lost before the consumer delivered them or their ack
    /// arrived.
    pub(super) async fn lost(&self, info: &Info) -> Result<Option<String>, BusError> {
        let found = stream_info(&self.jetstream, &self.connection.client, &self.stream).await?;
        let first = found.ok_or_else(|| self.no_stream())?.state.first_sequence;
        let (delivered, floor) = (info.delivered.stream_sequence, info.ack_floor.stream_sequence);
        let unread = first > delivered + 1;
        let unsettled = info.num_ack_pending > 0 && first > floor + 1;
        Ok((unread || unsettled).then(|| self.truncated(first)))
    }

    fn truncated(&self, first: u64) -> String {
        format!(
            "the stream {} starts at message {first}: it reached its limits before {} had read the \
             messages",
            self.stream, self.spec.name
        )
    }

    /// Checks that an existing consumer matches, and updates it if the policy allows.
    /// `first` means that this process has not read from it before.
    pub(super) async fn compare(&self, info: Info, first: bool) -> Result<Info, BusError> {
        let name = &self.spec.name;
        let wanted = self.spec.config(self.spec.start);
        let different = differences(&info.config, &wanted);
        if different.is_empty() {
            let alone = self.spec.push.as_ref().is_some_and(|push| push.group.is_none());
            // Later, the old subscription of this process may still count as bound.
            if alone && first && info.push_bound {
                return Err(incompatible(format!(
                    "the push consumer {name} has another reader, and allows one only; give both a \
                     queue group, or each its own name"
                )));
            }
            return Ok(info);
        }
        if self.spec.policy != ProvisionPolicy::CreateOrUpdate {
            return Err(incompatible(format!(
                "the consumer {name} of the stream {} differs from the options: {}; change the \
                 options, choose another name, delete the consumer, or choose \
                 ProvisionPolicy::CreateOrUpdate",
                self.stream,
                different.join(", ")
            )));
        }
        // The start of an existing consumer cannot be changed, and has no effect any more.
        let changed = self.create(&self.spec.config(info.config.deliver_policy), "update").await?;
        let changed = changed.map_err(|error| {
            refused(&format!("updating the consumer {name} ({})", different.join(", ")), error)
        })?;
        self.echoed(changed)
    }

    /// Creates the consumer: at the requested start, or after the ack floor of a lost consumer.
    pub(super) async fn make(&self, floor: Option<u64>) -> Result<(Info, Option<String>), BusError> {
        let name = &self.spec.name;
        if self.spec.policy == ProvisionPolicy::RequireExisting {
            return Err(incompatible(format!(
                "the stream {} has no consumer {name}; create it, or choose \
                 ProvisionPolicy::CreateOrVerify",
                self.stream
            )));
        }
        let (start, gap) = match floor {
            None => (self.spec.start, None),
            Some(floor) => {
                let found = stream_info(&self.jetstream, &self.connection.client, &self.stream).await?;
                let state = found.ok_or_else(|| self.no_stream())?.state;
                if state.last_sequence < floor {
                    let gap = format!(
                        "the stream {} was recreated; {name} starts again at its initial start",
                        self.stream
                    );
                    (self.spec.start, Some(gap))
                } else {
                    let gap = format!(
                        "the consumer {name} was deleted, and continues after the last known ack \
                         floor"
                    );
                    (DeliverPolicy::ByStartSequence { start_sequence: floor + 1 }, Some(gap))
                }
            }
        };
        let info = match self.create(&self.spec.config(start), "create").await? {
            Ok(info) => self.echoed(info)?,
            // Another node was first, perhaps with other options.
            Err(error) if error.error_code() == ErrorCode::CONSUMER_ALREADY_EXISTS => {
                let found = self.find().await?;
                self.compare(
                    found.ok_or_else(|| {
                        silent(format!("the consumer {name} was deleted right after its creation"))
                    })?,
                    floor.is_none(),
                )
                .await?
            }
            Err(error) if error.error_code() == ErrorCode::STREAM_NOT_FOUND => return Err(self.no_stream()),
            Err(error) => return Err(refused(&format!("creating the consumer {name}"), error)),
        };
        Ok((info, gap))
    }

    async fn create(&self, config: &Config, action: &str) -> Result<Result<Info, Error>, BusError> {
        let request = serde_json::json!({ "stream_name": self.stream, "config": config, "action": action });
        let subject = format!("CONSUMER.CREATE.{}.{}", self.stream, self.spec.name);
        api(&self.jetstream, &self.connection.client, subject, &request).await
    }

    /// Checks the server's copy: old servers drop unknown fields silently.
    fn echoed(&self, info: Info) -> Result<Info, BusError> {
        let different = differences(&info.config, &self.spec.config(self.spec.start));
        if different.is_empty() {
            return Ok(info);
        }
        Err(incompatible(format!(
            "the server did not create the consumer {} as requested: {}",
            self.spec.name,
            different.join(", ")
        )))
    }
}
