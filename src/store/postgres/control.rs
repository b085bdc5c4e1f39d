//! Progress and control of projections, and the checkpoint of the publisher.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::super::{
    Checkpoint, CheckpointError, CheckpointKey, ControlChange, ParkedEvent, ProgressWrite, ProjectionControl,
    PublisherCheckpoint, Request, StoreError, StoredProjection, StoredRequest,
};
use super::inner::PgInner;
use crate::event::Position;

/// Runs a call on a connection.
macro_rules! on_connection {
    ($core:ident, $doing:expr, $session:ident => $call:expr) => {{
        let mut $session = $core.connections.get($doing).await?;
        let result = $call.await?;
        $session.finish($doing).await?;
        Ok(result)
    }};
}

pub(super) async fn projection(core: &Arc<PgInner>, name: &str) -> Result<StoredProjection, StoreError> {
    on_connection!(core, "reading a projection", session => core.progress.projection(&mut *session, name, Some(core.info.id)))
}

pub(super) async fn checkpoint(core: &Arc<PgInner>, key: &CheckpointKey) -> Result<Checkpoint, StoreError> {
    on_connection!(core, "reading a checkpoint", session => core.progress.checkpoint(&mut *session, key, core.info.id))
}

pub(super) async fn checkpoints(
    core: &Arc<PgInner>,
    projection: &str,
) -> Result<Vec<(CheckpointKey, Checkpoint)>, StoreError> {
    on_connection!(core, "reading checkpoints", session => core.progress.checkpoints(&mut *session, projection, core.info.id))
}

pub(super) async fn write_progress(
    core: &Arc<PgInner>,
    writes: Vec<ProgressWrite>,
) -> Result<(), CheckpointError> {
    const DOING: &str = "writing the progress of a projection";
    let mut session = match writes.len() {
        0 | 1 => core.connections.get(DOING).await?,
        _ => core.connections.begin(DOING).await?,
    };
    for write in &writes {
        if let Err(error) = core.progress.write(&mut *session, core.info.id, write).await {
            session.roll_back().await;
            return Err(error);
        }
    }
    Ok(session.finish(DOING).await?)
}

pub(super) async fn parked(
    core: &Arc<PgInner>,
    key: &CheckpointKey,
    from: Position,
    limit: usize,
) -> Result<Vec<ParkedEvent>, StoreError> {
    on_connection!(core, "reading parked events", session => core.progress.parked(&mut *session, key, from, limit))
}

pub(super) async fn requests(
    core: &Arc<PgInner>,
    projection: &str,
    from: Request,
    limit: usize,
) -> Result<Vec<StoredRequest>, StoreError> {
    on_connection!(core, "reading requests", session => core.progress.requests(&mut *session, projection, from, limit))
}

pub(super) async fn controls(core: &Arc<PgInner>) -> Result<BTreeMap<String, ProjectionControl>, StoreError> {
    on_connection!(core, "reading the controls of the projections", session => core.controls.all(&mut *session))
}

pub(super) async fn control(
    core: &Arc<PgInner>,
    projection: &str,
    change: ControlChange,
) -> Result<ProjectionControl, StoreError> {
    on_connection!(core, "controlling a projection", session => core.controls.change(&mut *session, projection, change))
}

pub(super) async fn publisher(core: &Arc<PgInner>) -> Result<PublisherCheckpoint, StoreError> {
    on_connection!(core, "reading the checkpoint of the publisher", session => core.controls.publisher(&mut *session))
}

pub(super) async fn save_publisher(
    core: &Arc<PgInner>,
    from: PublisherCheckpoint,
    to: PublisherCheckpoint,
) -> Result<bool, StoreError> {
    on_connection!(core, "saving the checkpoint of the publisher", session => core.controls.save_publisher(&mut *session, from, to))
}
