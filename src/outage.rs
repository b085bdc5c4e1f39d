//! Classification of errors: outages, where a retry may succeed, and faults of the input.

use std::error::Error;
use std::io::{self, ErrorKind};

use crate::bus::BusError;
use crate::store::{AppendError, CheckpointError, StoreError};
use crate::transient::{Transient, causes};

/// Returns whether the error, or one of its causes, is transient.
///
/// Transient errors are outages, overloads, unknown outcomes and shutdowns. No event, command or
/// input causes them. The function covers all errors of storied, the SQL drivers and the network.
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
        Some(CheckpointError::Store(error)) => return is_store_outage(error),
        // Another node saved its checkpoint first. The next attempt starts from that checkpoint.
        Some(_) => return true,
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

/// Returns whether async-nats reports an outage, as opposed to an invalid request.
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

/// Start of the standard library's error text for an unresolved host name, which has no kind.
const NOT_RESOLVED: &str = "failed to lookup address information";

/// Returns whether a store error is an outage.
///
/// A full disk (`Storage`) and a refused login (`Misconfigured`) count as outages: an operator must
/// act, but no event causes them.
pub(crate) fn is_store_outage(error: &StoreError) -> bool {
    error.may_pass() || matches!(error, StoreError::Storage { .. })
}

/// Returns whether a connection failed, or ended in the middle of an answer.
///
/// An event may cause other errors of this type, for example a missing file.
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
