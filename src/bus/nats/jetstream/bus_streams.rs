//! The streams of a bus: the log stream and the stream of dead letters.

use std::time::Duration;

use async_nats::jetstream::context::ContextBuilder;
use uuid::Uuid;

use super::super::connection::Connection;
use super::super::subjects::Names;
use super::options::JetStreamOptions;
use super::rights::stream_rights;
use super::stream::{Content, Wanted, config, ensure};
use crate::bus::BusError;

/// Limits of the stream of dead letters: age, and size in bytes.
const DEAD_AGE: Duration = Duration::from_secs(30 * 24 * 60 * 60);
const DEAD_BYTES: u64 = 256 << 20;

impl JetStreamOptions {
    /// The expected configuration of the log stream of a store.
    pub(in crate::bus::nats) fn wanted_log_stream(&self, names: &Names, store: Uuid) -> Wanted {
        let content = Content { subjects: names.mapping.all(), store: Some(store) };
        config(content, &self.name(names.namespace()), self)
    }

    /// The expected configuration of the stream of dead letters.
    pub(in crate::bus::nats) fn wanted_dead(&self, names: &Names) -> Wanted {
        let (subjects, name) = dead(names);
        config(Content { subjects: &subjects, store: None }, &name, &self.of_dead())
    }

    /// These options with the limits of dead letters.
    fn of_dead(&self) -> Self {
        Self { max_age: Some(DEAD_AGE), max_bytes: Some(DEAD_BYTES), ..self.clone() }
    }

    /// Ensures that the log stream exists, for a subscriber.
    /// Its publisher marks later whose log it is.
    pub(in crate::bus::nats) async fn provide(
        &self,
        connection: &Connection,
        names: &Names,
    ) -> Result<(), BusError> {
        let client = &connection.client;
        let jetstream = ContextBuilder::new().timeout(connection.answer_timeout()).build(client.clone());
        let content = Content { subjects: names.mapping.all(), store: None };
        let name = self.name(names.namespace());
        let ensured = ensure(&jetstream, client, content, &name, self);
        connection.while_permitted("checking the stream", &stream_rights(&name), ensured).await.map(drop)
    }

    /// Ensures that the stream of dead letters exists, as the policy requires.
    pub(in crate::bus::nats) async fn provide_dead(
        &self,
        connection: &Connection,
        names: &Names,
    ) -> Result<(), BusError> {
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

/// Subjects and name of the stream of dead letters.
fn dead(names: &Names) -> ([String; 1], String) {
    let name = format!("{}_DEAD", names.namespace().to_uppercase().replace('.', "_"));
    ([format!("{}.dead.>", names.namespace())], name)
}
