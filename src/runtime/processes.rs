//! Registered processes, until the runtime starts.

use std::any::type_name;
use std::sync::Arc;

use super::commands::TargetServices;
use super::error::StartError;
use crate::event::{Position, check_name};
use crate::future::BoxFuture;
use crate::invalid_option::InvalidOption;
use crate::process::{
    self, Process, ProcessFollower, ProcessOptions, ProcessServices, RunningProcess, follower_name,
    record_process_start,
};
use crate::projection::NodeServices;
use crate::store::{EventStore, FilterError};

/// A registered process.
pub(super) struct ProcessRegistration {
    pub(super) name: &'static str,
    pub(super) type_name: &'static str,
    /// Name of the projection that follows the log for the process.
    pub(super) projection: String,
    options: ProcessOptions,
    routes: Result<(), FilterError>,
    invalid: Result<(), InvalidOption>,
    pub(super) start: Box<StartProcess>,
}

type StartProcess = dyn FnOnce(ProcessServices) -> BoxFuture<'static, Result<Arc<dyn RunningProcess>, StartError>>
    + Send
    + Sync;

impl ProcessRegistration {
    pub(super) fn new<P: Process>(options: ProcessOptions) -> Self {
        let starting = options.clone();
        let follower = ProcessFollower::<P>::new();
        Self {
            name: P::NAME,
            type_name: type_name::<P>(),
            projection: follower_name(P::NAME),
            routes: follower.as_ref().map(drop).map_err(Clone::clone),
            invalid: options.validate(),
            options,
            start: Box::new(move |services| {
                Box::pin(async move {
                    let follower = follower.map_err(|error| StartError::Route { name: P::NAME, error })?;
                    Ok(process::spawn(follower, starting, services).await??)
                })
            }),
        }
    }

    /// Checks the names, routes and options of all processes.
    pub(super) fn check(all: &[Self]) -> Result<(), StartError> {
        for (index, one) in all.iter().enumerate() {
            check_name("process name", one.name)?;
            if all[..index].iter().any(|other| other.name == one.name) {
                return Err(StartError::SameProcess { name: one.name });
            }
            one.routes.clone().map_err(|error| StartError::Route { name: one.name, error })?;
            one.invalid.clone()?;
        }
        Ok(())
    }
}

/// Records the start positions of new processes.
pub(super) async fn record_starts(
    processes: &[ProcessRegistration],
    store: &Arc<dyn EventStore>,
    log_end: Position,
) -> Result<(), StartError> {
    for process in processes {
        record_process_start(store, process.name, &process.options, log_end).await?;
    }
    Ok(())
}

/// Starts all processes.
pub(super) async fn start_processes(
    registered: Vec<ProcessRegistration>,
    node: NodeServices,
    targets: &TargetServices,
) -> Result<Vec<Arc<dyn RunningProcess>>, StartError> {
    let mut processes = Vec::with_capacity(registered.len());
    for process in registered {
        let services = ProcessServices {
            node: node.clone(),
            writer: targets.writer.clone(),
            commands: targets.commands.clone(),
            supervisor: targets.supervisor.clone(),
        };
        processes.push((process.start)(services).await?);
    }
    Ok(processes)
}
