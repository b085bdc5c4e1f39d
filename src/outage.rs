//! One classification of errors: whether trying again may help, and no event, command or input is to blame.

use std::error::Error;
use std::io::{self, ErrorKind};

use crate::bus::BusError;
use crate::store::{AppendError, CheckpointError, StoreError};
use crate::transient::{Transient, causes};

/// Whether the error, or one of its causes, is transient: an outage, an overload, an unknown outcome, a shutdown. Everything of
/// storied's own is known here, and the errors of the SQL drivers and of the network.
pub(crate) fn is_outage(error: &(dyn Error + 'static)) -> bool {
    causes(error).any(one)
}

fn one(error: &(dyn Error + 'static)) -> bool {
    if error.is::<Transient>() {
        return true;
    }
    if let Some(error) = error.downcast_ref::<StoreError>() {
        return is_store_outage(error);
    }
    match error.downcast_ref::<CheckpointError>() {
        // Another node was faster; the next attempt starts from what it wrote.
        Some(CheckpointError::Stale { .. }) => return true,
        Some(CheckpointError::Store(error)) => return is_store_outage(error),
        None => {}
    }
    if let Some(AppendError::Store(error)) = error.downcast_ref() {
        return is_store_outage(error);
    }
    if let Some(error) = error.downcast_ref::<BusError>() {
        return matches!(error, BusError::Unavailable { .. } | BusError::Closed);
    }
    #[cfg(feature = "postgres")]
    if crate::store::postgres::is_outage(error) {
        return true;
    }
    #[cfg(feature = "sqlite")]
    if crate::store::sqlite::is_outage(error) {
        return true;
    }
    #[cfg(feature = "nats")]
    if is_nats_failure(error) {
        return true;
    }
    error.downcast_ref::<io::Error>().is_some_and(is_network_failure)
}

/// Whether async-nats reports an outage, and not a mistake in what was asked of it.
#[cfg(feature = "nats")]
fn is_nats_failure(error: &(dyn Error + 'static)) -> bool {
    use async_nats::client::{
        FlushError, PublishError, PublishErrorKind as Publish, RequestError, RequestErrorKind as Request,
        SubscribeError, SubscribeErrorKind as Subscribe,
    };
    use async_nats::jetstream::context::{
        PublishError as Acknowledged, PublishErrorKind as Ack, RequestError as Api,
        RequestErrorKind as ApiKind,
    };
    use async_nats::{ConnectError, ConnectErrorKind as Connect};

    if let Some(error) = error.downcast_ref::<RequestError>() {
        return matches!(error.kind(), Request::TimedOut | Request::NoResponders | Request::Other);
    }
    if let Some(error) = error.downcast_ref::<PublishError>() {
        return matches!(error.kind(), Publish::Send);
    }
    if let Some(error) = error.downcast_ref::<ConnectError>() {
        return matches!(
            error.kind(),
            Connect::Dns | Connect::TimedOut | Connect::Io | Connect::MaxReconnects
        );
    }
    if let Some(error) = error.downcast_ref::<SubscribeError>() {
        return matches!(error.kind(), Subscribe::Other);
    }
    if let Some(error) = error.downcast_ref::<Acknowledged>() {
        return matches!(error.kind(), Ack::TimedOut | Ack::BrokenPipe | Ack::MaxAckPending | Ack::Other);
    }
    if let Some(error) = error.downcast_ref::<Api>() {
        return matches!(error.kind(), ApiKind::TimedOut | ApiKind::NoResponders | ApiKind::Other);
    }
    error.is::<FlushError>()
}

/// How the standard library begins the error of a name that was not resolved. It has no kind of its own.
const NOT_RESOLVED: &str = "failed to lookup address information";

/// A full disk needs a person, but no event is to blame for it.
pub(crate) fn is_store_outage(error: &StoreError) -> bool {
    error.is_transient() || matches!(error, StoreError::Storage { .. })
}

/// Whether a connection failed, or ended in the middle of an answer. Other errors of this type, as a missing file, may well be an
/// event's.
fn is_network_failure(error: &io::Error) -> bool {
    use ErrorKind::{
        BrokenPipe, ConnectionAborted, ConnectionRefused, ConnectionReset, HostUnreachable, NetworkDown,
        NetworkUnreachable, NotConnected, TimedOut, UnexpectedEof,
    };
    matches!(
        error.kind(),
        BrokenPipe
            | ConnectionAborted
            | ConnectionRefused
            | ConnectionReset
            | HostUnreachable
            | NetworkDown
            | NetworkUnreachable
            | NotConnected
            | TimedOut
            | UnexpectedEof
    ) || error.to_string().starts_with(NOT_RESOLVED)
}
