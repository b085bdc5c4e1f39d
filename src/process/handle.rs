//! An instance as callers see it, with the type of its process.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use super::Process;
use super::error::RequestError;
use super::event::Verb;
use super::request::request;
use super::status::{InstanceStatus, read_status};
use crate::store::{EventStore, StoreError};

/// An instance of a process, on any node. Cheap to clone.
///
/// [`Runtime::process`](crate::Runtime::process) creates it. It reads the store, and needs no node
/// that runs the process.
pub struct InstanceHandle<P> {
    store: Arc<dyn EventStore>,
    id: String,
    process: PhantomData<fn() -> P>,
}

impl<P> InstanceHandle<P> {
    pub(crate) fn new(store: Arc<dyn EventStore>, id: String) -> Self {
        Self { store, id, process: PhantomData }
    }

    /// Returns the id of the instance.
    pub fn id(&self) -> &str {
        &self.id
    }
}

impl<P: Process> InstanceHandle<P> {
    /// Reads the status from the stream of the instance; `None` if it does not exist.
    ///
    /// # Errors
    /// The error of the store; `Invalid` if the id is invalid, `Corrupt` if an event does not decode.
    pub async fn status(&self) -> Result<Option<InstanceStatus>, StoreError> {
        read_status(&*self.store, P::NAME, &self.id).await
    }

    /// Requests a retry of a parked instance.
    ///
    /// The owner sends its open commands again, with their ids, and reacts to the held inputs in
    /// order. The request is durable when this returns.
    ///
    /// # Errors
    /// If the instance does not exist or is not parked, or the store failed.
    pub async fn retry(&self) -> Result<(), RequestError> {
        request(&*self.store, P::NAME, &self.id, Verb::Retry).await
    }

    /// Requests the end of an instance, without compensation.
    ///
    /// Its timers are cancelled, and its open commands are not sent any more. A command in flight may
    /// still take effect. The request is durable when this returns.
    ///
    /// # Errors
    /// If the instance does not exist or has ended, or the store failed.
    pub async fn cancel(&self) -> Result<(), RequestError> {
        request(&*self.store, P::NAME, &self.id, Verb::Cancel).await
    }

    /// Requests [compensation](super::Next::compensate), also of a parked instance.
    ///
    /// If the instance is parked because a command failed, this command counts as one without effect.
    /// The request is durable when this returns.
    ///
    /// # Errors
    /// If the instance does not exist or has ended, or the store failed.
    pub async fn compensate(&self) -> Result<(), RequestError> {
        request(&*self.store, P::NAME, &self.id, Verb::Compensate).await
    }
}

impl<P> Clone for InstanceHandle<P> {
    fn clone(&self) -> Self {
        Self { store: self.store.clone(), id: self.id.clone(), process: PhantomData }
    }
}

impl<P> fmt::Debug for InstanceHandle<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InstanceHandle").field("id", &self.id).finish_non_exhaustive()
    }
}
