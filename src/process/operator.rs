//! Inspection and control of processes without their code, for an operator's tool.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde::Serialize;
use uuid::Uuid;

use super::error::RequestError;
use super::event::Verb;
use super::follower::follower_name;
use super::instance_page::{InstancePage, ReadInstances, read_page};
use super::request::request;
use super::status::{InstanceStatus, read_status, stream_of};
use crate::event::check_name;
use crate::projection::owner_lease;
use crate::store::{EventStore, LeaseInfo, StoreError, StoredTimer};

/// External view and control of the processes of an event store.
///
/// The calling program needs neither the code of the processes nor the types of their events. Requests
/// are durable events in the streams of the instances; the node that owns the process acts on them.
///
/// ```no_run
/// use std::sync::Arc;
/// use storied::process::{InstanceState, ProcessOperator, ReadInstances};
/// use storied::{EventStore, PostgresStore};
///
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// let store: Arc<dyn EventStore> = Arc::new(PostgresStore::connect("").await?);
/// let operator = ProcessOperator::new(store);
/// let parked = ReadInstances::new().state(InstanceState::Parked);
/// for instance in operator.instances("fulfilment", parked).await?.instances {
///     println!("{}: {}", instance.id, instance.parked.unwrap_or_default());
///     operator.retry("fulfilment", &instance.id).await?;
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct ProcessOperator {
    store: Arc<dyn EventStore>,
}

/// A process, as stored. Serializes as a map of its fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ProcessRecord {
    /// Name of the process.
    pub name: String,
    /// The node that owns it now.
    pub owner: Option<Uuid>,
    /// Whether the projection that follows the log for the process is paused.
    ///
    /// A paused process acts on no event and on no request.
    pub paused: bool,
}

impl ProcessRecord {
    /// Returns the name of the projection that follows the log for the process.
    pub fn projection(&self) -> String {
        follower_name(&self.name)
    }
}

impl ProcessOperator {
    /// Creates an operator for the processes of `store`.
    pub fn new(store: Arc<dyn EventStore>) -> Self {
        Self { store }
    }

    /// Returns all processes that a node has ever owned, by name.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub async fn processes(&self) -> Result<Vec<ProcessRecord>, StoreError> {
        let prefix = owner_lease(&follower_name(""));
        let leases = self.store.leases().await?;
        let of_process = |info: LeaseInfo| {
            let name = info.lease.name.strip_prefix(&prefix)?.to_owned();
            Some((name, info.live.then_some(info.lease.owner)))
        };
        let owners: BTreeMap<String, Option<Uuid>> = leases.into_iter().filter_map(of_process).collect();
        if owners.is_empty() {
            return Ok(Vec::new());
        }
        let controls = self.store.controls().await?;
        let paused = |name: &str| controls.get(&follower_name(name)).is_some_and(|control| control.paused);
        let record = |(name, owner): (String, _)| ProcessRecord { paused: paused(&name), owner, name };
        Ok(owners.into_iter().map(record).collect())
    }

    /// Returns the process of that name.
    ///
    /// # Errors
    /// `UnknownProcess` if no node has ever owned it; `Invalid` if no process can have this name. If
    /// the store cannot be read.
    pub async fn process(&self, name: &str) -> Result<ProcessRecord, RequestError> {
        check_name("process name", name)
            .map_err(|error| StoreError::Invalid { reason: error.to_string() })?;
        let processes = self.processes().await?;
        let found = processes.iter().find(|process| process.name == name).cloned();
        found.ok_or_else(|| RequestError::UnknownProcess {
            process: name.to_owned(),
            known: processes.into_iter().map(|process| process.name).collect(),
        })
    }

    /// Reads a page of the instances of a process.
    ///
    /// The pages are in the order in which the instances started. With a state, they are in the order
    /// in which the instances were last parked, began to compensate, or ended. An instance that changes
    /// between two pages may be in both or in none. Reads the log until the page is full, and the
    /// stream of each instance that it finds.
    ///
    /// # Errors
    /// As [`process`](Self::process); `Corrupt` if an event does not decode.
    pub async fn instances(&self, process: &str, read: ReadInstances) -> Result<InstancePage, RequestError> {
        self.process(process).await?;
        Ok(read_page(&*self.store, process, read).await?)
    }

    /// Reads the status of an instance from its stream.
    ///
    /// # Errors
    /// As [`process`](Self::process); `Unknown` if the instance does not exist, `Invalid` if no instance
    /// can have this id, `Corrupt` if an event does not decode.
    pub async fn status(&self, process: &str, id: &str) -> Result<InstanceStatus, RequestError> {
        self.check(process, id).await?;
        let status = read_status(&*self.store, process, id).await?;
        status.ok_or_else(|| RequestError::UnknownInstance {
            process: process.to_owned(),
            instance: id.to_owned(),
        })
    }

    /// Returns the open timers of an instance as the store has them, by due time.
    ///
    /// A timer is missing if it fires at the moment, or if the owner has not stored it yet. Reads the
    /// timers of the process by due time, until all of the instance are found.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub async fn timers(&self, status: &InstanceStatus) -> Result<Vec<StoredTimer>, StoreError> {
        const PAGE: usize = StoredTimer::MAX_LIMIT;
        let is_open = |stored: &&StoredTimer| {
            let mut open = status.timers.iter();
            stored.instance == status.id
                && open.any(|timer| timer.name == stored.name && timer.version == stored.version)
        };
        let (mut found, mut after) = (Vec::new(), None);
        while found.len() < status.timers.len() {
            let mut page = self.store.timers(Some(&status.process), after.as_ref(), PAGE).await?;
            found.extend(page.iter().filter(is_open).cloned());
            if page.len() < PAGE {
                break;
            }
            after = page.pop();
        }
        Ok(found)
    }

    /// Requests a retry of a parked instance; see [`InstanceHandle::retry`](super::InstanceHandle::retry).
    ///
    /// # Errors
    /// As [`status`](Self::status); `NotParked` if it is not parked. If the store cannot be written.
    pub async fn retry(&self, process: &str, id: &str) -> Result<(), RequestError> {
        self.request(process, id, Verb::Retry).await
    }

    /// Requests the end of an instance; see [`InstanceHandle::cancel`](super::InstanceHandle::cancel).
    ///
    /// # Errors
    /// As [`status`](Self::status); `Ended` if it has ended. If the store cannot be written.
    pub async fn cancel(&self, process: &str, id: &str) -> Result<(), RequestError> {
        self.request(process, id, Verb::Cancel).await
    }

    /// Requests compensation; see [`InstanceHandle::compensate`](super::InstanceHandle::compensate).
    ///
    /// # Errors
    /// As [`status`](Self::status); `Ended` if it has ended, `Compensating` if it compensates. If the
    /// store cannot be written.
    pub async fn compensate(&self, process: &str, id: &str) -> Result<(), RequestError> {
        self.request(process, id, Verb::Compensate).await
    }

    async fn request(&self, process: &str, id: &str, verb: Verb) -> Result<(), RequestError> {
        self.check(process, id).await?;
        request(&*self.store, process, id, verb).await
    }

    /// Checks that the process exists, and that the id is valid.
    async fn check(&self, process: &str, id: &str) -> Result<(), RequestError> {
        stream_of(process, id)?;
        // First: the stream of an aggregate has no events of an instance.
        self.process(process).await.map(drop)
    }
}

impl fmt::Debug for ProcessOperator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProcessOperator").field("store", self.store.info()).finish_non_exhaustive()
    }
}
