//! Operations on a stream of the server: lookup, creation, comparison, and the mark of its store.

use std::fmt::Debug;

use async_nats::Client;
use async_nats::jetstream::context::RequestErrorKind;
use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::{Config, DiscardPolicy, Info, RetentionPolicy, StorageType};
use async_nats::jetstream::{Context, Error, ErrorCode};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::super::errors::{incompatible, silent, unavailable};
use super::field::Field;
use super::options::{JetStreamOptions, ProvisionPolicy};
use crate::bus::BusError;

/// Metadata key of a stream for the id of the store whose log it keeps.
const STORE_ID: &str = "storied.store_id";

/// The expected configuration of a stream.
pub(in super::super) type Wanted = Config;

/// The content of a stream.
#[derive(Debug, Clone, Copy)]
pub(super) struct Content<'a> {
    pub(super) subjects: &'a [String],
    /// Id of the store, known to its publisher only.
    /// A subscriber only needs an exact log stream.
    pub(super) store: Option<Uuid>,
}

/// Ensures that the log stream exists and matches, as the policy requires. Returns its state.
pub(super) async fn ensure(
    jetstream: &Context,
    client: &Client,
    content: Content<'_>,
    name: &str,
    options: &JetStreamOptions,
) -> Result<Info, BusError> {
    let wanted = config(content, name, options);
    let mut found = info(jetstream, client, name).await?;
    if found.is_none() {
        if options.policy == ProvisionPolicy::RequireExisting {
            return Err(incompatible(format!(
                "there is no JetStream stream {name}; create it with the subjects {:?}, or choose \
                 ProvisionPolicy::CreateOrVerify",
                content.subjects
            )));
        }
        found = match api::<Info>(jetstream, client, format!("STREAM.CREATE.{name}"), &wanted).await? {
            Ok(info) => {
                tracing::info!(stream = name, "created a JetStream stream");
                Some(info)
            }
            // Another node was first, perhaps with other options: the comparison below reports
            // differences.
            Err(error) if error.error_code() == ErrorCode::STREAM_NAME_EXIST => {
                info(jetstream, client, name).await?
            }
            Err(error) if error.error_code() == ErrorCode::STREAM_SUBJECT_OVERLAP => {
                return Err(overlap(jetstream, client, content.subjects, name).await?);
            }
            Err(error) => return Err(refused(&format!("creating the stream {name}"), error)),
        };
    }
    let found =
        found.ok_or_else(|| silent(format!("the stream {name} was deleted right after its creation")))?;
    check_store(content, name, &found.config)?;
    let essential = options.policy == ProvisionPolicy::RequireExisting || content.store.is_none();
    let different = differences(&found.config, &wanted, essential);
    if different.is_empty() {
        return Ok(found);
    }
    // A subscriber was first, and created the stream without knowing its store.
    if found.state.last_sequence == 0 && !found.config.metadata.contains_key(STORE_ID) && different.len() == 1
    {
        return update(jetstream, client, found.config, &wanted, &different).await;
    }
    if options.policy != ProvisionPolicy::CreateOrUpdate {
        return Err(incompatible(format!(
            "the JetStream stream {name} differs from the options: {}; change the options or the \
             stream, or choose ProvisionPolicy::CreateOrUpdate",
            different.join(", ")
        )));
    }
    update(jetstream, client, found.config, &wanted, &different).await
}

async fn update(
    jetstream: &Context,
    client: &Client,
    mut config: Config,
    wanted: &Config,
    different: &[String],
) -> Result<Info, BusError> {
    let name = wanted.name.clone();
    config.metadata.extend(wanted.metadata.clone());
    // The server's own metadata must not be written back.
    config.metadata.retain(|key, _| !key.starts_with("_nats."));
    let config = Config {
        subjects: wanted.subjects.clone(),
        storage: wanted.storage,
        num_replicas: wanted.num_replicas,
        retention: wanted.retention,
        discard: wanted.discard,
        max_age: wanted.max_age,
        max_bytes: wanted.max_bytes,
        max_messages: wanted.max_messages,
        max_messages_per_subject: wanted.max_messages_per_subject,
        max_message_size: wanted.max_message_size,
        duplicate_window: wanted.duplicate_window,
        no_ack: wanted.no_ack,
        sealed: wanted.sealed,
        mirror: None,
        sources: None,
        subject_transform: None,
        ..config
    };
    let changed = api::<Info>(jetstream, client, format!("STREAM.UPDATE.{name}"), &config).await?;
    let info = changed
        .map_err(|error| refused(&format!("updating the stream {name} ({})", different.join(", ")), error))?;
    // Old servers drop unknown fields silently.
    let different = differences(&info.config, wanted, false);
    if !different.is_empty() {
        return Err(incompatible(format!(
            "the server did not update the stream {name} as requested: {}",
            different.join(", ")
        )));
    }
    tracing::info!(stream = name, "updated a JetStream stream");
    Ok(info)
}

/// Returns the state of a stream, if it exists.
pub(in super::super) async fn info(
    jetstream: &Context,
    client: &Client,
    name: &str,
) -> Result<Option<Info>, BusError> {
    match api(jetstream, client, format!("STREAM.INFO.{name}"), &NOTHING).await? {
        Ok(info) => Ok(Some(info)),
        Err(error) if error.error_code() == ErrorCode::STREAM_NOT_FOUND => Ok(None),
        Err(error) => Err(refused(&format!("looking up the stream {name}"), error)),
    }
}

pub(super) fn config(content: Content<'_>, name: &str, options: &JetStreamOptions) -> Config {
    let unlimited = |limit: Option<u64>| limit.map_or(-1, |limit| i64::try_from(limit).unwrap_or(i64::MAX));
    Config {
        name: name.to_owned(),
        subjects: content.subjects.to_vec(),
        storage: if options.memory { StorageType::Memory } else { StorageType::File },
        num_replicas: options.replicas,
        retention: RetentionPolicy::Limits,
        discard: DiscardPolicy::Old,
        max_age: options.max_age.unwrap_or_default(),
        max_bytes: unlimited(options.max_bytes),
        max_messages: -1,
        max_messages_per_subject: -1,
        max_consumers: -1,
        max_message_size: -1,
        duplicate_window: options.duplicate_window,
        description: Some("storied: the log, event by event".into()),
        metadata: content.store.map(|store| (STORE_ID.to_owned(), store.to_string())).into_iter().collect(),
        ..Config::default()
    }
}

fn check_store(content: Content<'_>, name: &str, config: &Config) -> Result<(), BusError> {
    let Some(own) = content.store.map(|store| store.to_string()) else { return Ok(()) };
    match config.metadata.get(STORE_ID) {
        Some(store) if *store != own => Err(other_store(name, store, &own)),
        _ => Ok(()),
    }
}

/// Whether the stream is marked with this store.
pub(super) fn is_marked(config: &Config, store: Uuid) -> bool {
    config.metadata.get(STORE_ID).is_some_and(|marked| *marked == store.to_string())
}

pub(super) fn other_store(name: &str, store: &str, own: &str) -> BusError {
    incompatible(format!(
        "the stream {name} is the log stream of another store ({store}, expected {own}); give each \
         store its own namespace, or delete the stream if its store is gone"
    ))
}

/// The differences, each as `field: is X, should be Y`.
fn differences(have: &Config, want: &Config, essential_only: bool) -> Vec<String> {
    let fields = compared(have, want, essential_only);
    fields.iter().filter(|field| !field.same).map(Field::to_string).collect()
}

/// Compares a stream with the expected configuration of a publisher with these options.
pub(in super::super) fn fields(have: &Config, want: &Config, options: &JetStreamOptions) -> Vec<Field> {
    compared(have, want, options.policy == ProvisionPolicy::RequireExisting)
}

/// Compares field by field. Ignores fields that the server adds.
fn compared(have: &Config, want: &Config, essential_only: bool) -> Vec<Field> {
    let mut fields = Vec::new();
    let mut compare = |name: &'static str, is: &dyn Debug, should_be: &dyn Debug, same: bool| {
        fields.push(Field { name, is: format!("{is:?}"), should_be: format!("{should_be:?}"), same });
    };
    macro_rules! compare {
        ($($field:ident),*) => { $( compare(stringify!($field), &have.$field, &want.$field, have.$field == want.$field); )* };
    }
    // An exact log stream requires these fields.
    let sorted = |subjects: &[String]| {
        let mut subjects = subjects.to_vec();
        subjects.sort_unstable();
        subjects
    };
    compare("subjects", &have.subjects, &want.subjects, sorted(&have.subjects) == sorted(&want.subjects));
    compare!(retention, max_messages_per_subject, no_ack, sealed, mirror, sources, subject_transform);
    if !essential_only {
        compare!(storage, num_replicas, discard, max_age, max_bytes, max_messages, max_message_size);
        compare!(duplicate_window);
        let marked = have.metadata.get(STORE_ID);
        let mark = want.metadata.get(STORE_ID);
        compare("metadata storied.store_id", &marked, &mark, marked == mark);
    }
    fields
}

/// Finds the streams that have these subjects.
async fn overlap(
    jetstream: &Context,
    client: &Client,
    subjects: &[String],
    name: &str,
) -> Result<BusError, BusError> {
    #[derive(Deserialize)]
    struct Names {
        streams: Option<Vec<String>>,
    }
    let mut names = Vec::new();
    for subject in subjects {
        let request = serde_json::json!({ "subject": subject });
        let found = api::<Names>(jetstream, client, "STREAM.NAMES".into(), &request).await?;
        names.extend(found.ok().and_then(|found| found.streams).unwrap_or_default());
    }
    Ok(incompatible(format!(
        "cannot create the stream {name}: its subjects {subjects:?} overlap with those of {}; \
         choose another namespace, or set the stream name to an older name of the log stream",
        if names.is_empty() { "another stream".to_owned() } else { names.join(", ") },
    )))
}

/// An empty request body.
pub(super) const NOTHING: Nothing = Nothing {};

#[derive(Debug, Serialize)]
pub(super) struct Nothing {}

/// Sends a request to JetStream; returns its answer or its error.
pub(super) async fn api<T: DeserializeOwned>(
    jetstream: &Context,
    client: &Client,
    subject: String,
    payload: &impl Serialize,
) -> Result<Result<T, Error>, BusError> {
    match jetstream.request::<_, _, Response<T>>(subject.clone(), payload).await {
        Ok(Response::Ok(answer)) => Ok(Ok(answer)),
        Ok(Response::Err { error }) => Ok(Err(error)),
        Err(error) if error.kind() == RequestErrorKind::NoResponders => {
            if client.server_info().jetstream {
                let reason = "JetStream does not answer: it is starting, or not enabled for this account";
                Err(unavailable(reason.into(), error))
            } else {
                Err(incompatible(
                    "JetStream is not enabled on the NATS server; start it with -js, or use the \
                     Core driver"
                        .into(),
                ))
            }
        }
        Err(error) => Err(unavailable(format!("JetStream did not answer {subject}"), error)),
    }
}

/// As [`api`], but an error of JetStream becomes a bus error.
pub(in super::super) async fn ask<T: DeserializeOwned>(
    jetstream: &Context,
    client: &Client,
    subject: String,
    payload: &impl Serialize,
    what: &str,
) -> Result<T, BusError> {
    api(jetstream, client, subject, payload).await?.map_err(|error| refused(what, error))
}

/// Converts an error of JetStream: temporary, or in need of an operator.
pub(super) fn refused(what: &str, error: Error) -> BusError {
    match error.error_code() {
        ErrorCode::JETSTREAM_NOT_ENABLED | ErrorCode::JETSTREAM_NOT_ENABLED_FOR_ACCOUNT => {
            incompatible(format!(
                "{what}: JetStream is not enabled ({error}); start the server with -js, or use the \
                 Core driver"
            ))
        }
        // In the server's error class (500), but permanent.
        ErrorCode::STREAM_INVALID_CONFIG => incompatible(format!("{what}: JetStream refuses: {error}")),
        _ if error.code() >= 500 => unavailable(format!("{what}: JetStream failed"), error),
        _ => incompatible(format!("{what}: JetStream refuses: {error}")),
    }
}
