//! The follower of a process: a projection that delivers events to instances.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::Process;
use super::batch::BatchEnd;
use super::drivers::Drivers;
use super::event::REQUESTED;
use super::resumption::resumption;
use super::routes::{RouteKind, Routes};
use super::work::{WorkError, WorkKind};
use crate::event::{AnyEvent, EventName, Position, RecordedEvent, StreamId};
use crate::projection::{ApplyError, AtLeastOnce, Delivery, Projection, ReadModel, Sealed};
use crate::store::{
    Checkpoint, CheckpointError, CheckpointKey, EventStore, Filter, FilterError, ParkedEvent, ProgressWrite,
    Request, StoreError, StoredProgress, StoredProjection, StoredRequest,
};

/// Returns the name of the projection that follows the log for a process.
pub(crate) fn follower_name(process: &str) -> String {
    format!("process {process}")
}

/// The follower of a process.
pub(crate) struct ProcessFollower<P: Process> {
    name: String,
    routes: Routes<P::Event>,
    filter: Filter,
}

impl<P: Process> ProcessFollower<P> {
    /// Creates the follower from the routes of the process.
    ///
    /// # Errors
    /// If a route is invalid.
    pub(crate) fn new() -> Result<Self, FilterError> {
        let routes = P::routes();
        let mut names = routes.names()?;
        names.insert(EventName::new(format!("{}.{REQUESTED}", P::NAME))?);
        Ok(Self { name: follower_name(P::NAME), routes, filter: Filter::all().with_names(names) })
    }
}

/// The events of a transaction, with the instances that receive them.
#[derive(Default)]
pub(crate) struct Deliveries(Vec<RoutedEvent>);

struct RoutedEvent {
    instance: String,
    /// `None` for the request of an operator.
    route: Option<RouteKind>,
    event: RecordedEvent,
}

impl<P: Process> Projection for ProcessFollower<P> {
    const NAME: &'static str = P::NAME;
    type Event = AnyEvent;
    type Transaction = Deliveries;

    fn name(&self) -> &str {
        &self.name
    }

    fn filter(&self) -> Filter {
        self.filter.clone()
    }

    async fn apply(
        &mut self,
        _: AnyEvent,
        event: &RecordedEvent,
        deliveries: &mut Deliveries,
    ) -> Result<(), ApplyError> {
        if event.stream.category() == P::NAME {
            let instance = event.stream.id().to_owned();
            deliveries.0.push(RoutedEvent { instance, route: None, event: event.clone() });
            return Ok(());
        }
        let routed = self.routes.route(event)?;
        // First, so that an event with an invalid id reaches none of its instances.
        routed.iter().try_for_each(|(instance, _)| StreamId::new(P::NAME, instance).map(drop))?;
        for (instance, route) in routed {
            deliveries.0.push(RoutedEvent { instance, route: Some(route), event: event.clone() });
        }
        Ok(())
    }

    /// I12: the instances recognise every event that they have consumed.
    async fn reset(&mut self, _: &mut Deliveries) -> Result<(), ApplyError> {
        Ok(())
    }
}

/// The instances of a process as a read model: its commit delivers the events.
///
/// The checkpoint moves when every input is recorded in the stream of its instance.
pub(super) struct InstanceDelivery<P: Process> {
    progress: AtLeastOnce,
    drivers: Arc<Drivers<P>>,
}

impl<P: Process> InstanceDelivery<P> {
    pub(super) fn new(drivers: Arc<Drivers<P>>) -> Self {
        Self { progress: AtLeastOnce::new(), drivers }
    }

    /// Delivers events. Adds the writes that park those that no instance can record.
    async fn deliver(
        &self,
        deliveries: Deliveries,
        writes: &mut Vec<ProgressWrite>,
    ) -> Result<(), CheckpointError> {
        let late = writes.iter().any(|write| matches!(write, ProgressWrite::Unpark { .. }));
        let key = writes.iter().find_map(|write| match write {
            ProgressWrite::Checkpoint { key, .. } => Some(key.clone()),
            _ => None,
        });
        let mut failed: BTreeMap<Position, ParkedEvent> = BTreeMap::new();
        let DeliveryBatch { batch, events } = DeliveryBatch::of(deliveries, late);
        let BatchEnd { recorded, unfinished } = self.drivers.run(batch).await;
        for ((instance, events), recorded) in events.iter().zip(recorded) {
            for (event, recorded) in events.iter().zip(recorded) {
                match recorded {
                    Ok(_) => {}
                    Err(WorkError::Transient(reason)) => {
                        return Err(StoreError::Unavailable { reason, source: None }.into());
                    }
                    Err(WorkError::Permanent(reason)) => {
                        let reason = format!("instance {instance:?} cannot record the event: {reason}");
                        failed.entry(event.position).or_insert_with(|| ParkedEvent::new(event, reason, 1));
                    }
                }
            }
        }
        match (key, failed.first_key_value()) {
            (_, None) => {}
            (Some(key), Some(_)) if !late => {
                for event in failed.into_values() {
                    let (process, position, reason) = (P::NAME, event.position, &event.error);
                    tracing::error!(process, %position, reason, "parked the event; the process continues");
                    writes.push(ProgressWrite::Park { key: key.clone(), event });
                }
            }
            (_, Some((_, event))) => return Err(StoreError::Invalid { reason: event.error.clone() }.into()),
        }
        if !unfinished.is_empty() {
            let wait = self.drivers.resume_after;
            let unfinished = unfinished.into_iter();
            let put = unfinished.map(|(instance, version)| resumption(instance, version, wait)).collect();
            self.drivers.timers.write(put, Vec::new()).await?;
        }
        Ok(())
    }
}

/// Returns whether a reset would forget parked events.
///
/// I12: an instance that has consumed later events does not consume them when they are delivered
/// again in log order. So they stay parked, until a retry delivers them.
fn forgets_parked(write: &ProgressWrite) -> bool {
    matches!(write, ProgressWrite::UnparkAll { .. })
}

/// The work of a transaction: one unit for each instance, so that its events stay in order.
struct DeliveryBatch {
    batch: Vec<(String, WorkKind)>,
    /// The events of each unit.
    events: Vec<(String, Vec<RecordedEvent>)>,
}

impl DeliveryBatch {
    fn of(deliveries: Deliveries, late: bool) -> Self {
        let mut units: HashMap<String, usize> = HashMap::new();
        let mut work = Self { batch: Vec::new(), events: Vec::new() };
        for RoutedEvent { instance, route, event } in deliveries.0 {
            let Some(route) = route else {
                work.batch.push((instance.clone(), WorkKind::Resume));
                work.events.push((instance, vec![event]));
                continue;
            };
            let unit = *units.entry(instance.clone()).or_insert(work.batch.len());
            if unit == work.batch.len() {
                work.batch.push((instance.clone(), WorkKind::Deliver { events: Vec::new(), late }));
                work.events.push((instance, Vec::new()));
            }
            if let Some((_, WorkKind::Deliver { events, .. })) = work.batch.get_mut(unit) {
                events.push((event.clone(), route));
            }
            if let Some((_, events)) = work.events.get_mut(unit) {
                events.push(event);
            }
        }
        work
    }
}

impl<P: Process> Sealed for InstanceDelivery<P> {}

impl<P: Process> ReadModel for InstanceDelivery<P> {
    type Transaction = Deliveries;
    type Open = (Deliveries, (Delivery, Vec<ProgressWrite>));

    fn shared(&self) -> bool {
        true
    }

    fn rolls_back(&self) -> bool {
        false
    }

    async fn prepare(&self, store: &Arc<dyn EventStore>) -> Result<(), StoreError> {
        // I12: a copy would send the commands of its original once more, to mailboxes and payments.
        if let Some(advice) = store.info().adoption.problem() {
            let expected = "an adopted event store, to run processes on".into();
            let found = "a copied or moved one".into();
            return Err(StoreError::Incompatible { expected, found, advice });
        }
        self.progress.prepare(store).await
    }

    async fn projection(&self, name: &str) -> Result<StoredProjection, StoreError> {
        self.progress.projection(name).await
    }

    async fn checkpoint(&self, key: &CheckpointKey) -> Result<Checkpoint, StoreError> {
        self.progress.checkpoint(key).await
    }

    async fn parked(
        &self,
        key: &CheckpointKey,
        from: Position,
        limit: usize,
    ) -> Result<Vec<ParkedEvent>, StoreError> {
        self.progress.parked(key, from, limit).await
    }

    async fn requests(
        &self,
        projection: &str,
        from: Request,
        limit: usize,
    ) -> Result<Vec<StoredRequest>, StoreError> {
        self.progress.requests(projection, from, limit).await
    }

    async fn begin(
        &self,
        projection: &str,
        from: Checkpoint,
        limit: Option<std::time::Duration>,
    ) -> Result<Self::Open, StoreError> {
        Ok((Deliveries::default(), self.progress.begin(projection, from, limit).await?))
    }

    fn transaction<'a>(&self, open: &'a mut Self::Open) -> &'a mut Deliveries {
        &mut open.0
    }

    async fn adopt(&self, open: &mut Self::Open, name: &str) -> Result<StoredProgress, StoreError> {
        self.progress.adopt(&mut open.1, name).await
    }

    async fn write(&self, open: &mut Self::Open, write: ProgressWrite) -> Result<(), CheckpointError> {
        if forgets_parked(&write) { Ok(()) } else { self.progress.write(&mut open.1, write).await }
    }

    async fn commit(&self, open: Self::Open, mut writes: Vec<ProgressWrite>) -> Result<(), CheckpointError> {
        let (deliveries, mut progress) = open;
        writes.retain(|write| !forgets_parked(write));
        if !deliveries.0.is_empty() {
            // `write` has kept the removal of a parked event.
            writes.append(&mut progress.1);
            self.deliver(deliveries, &mut writes).await?;
        }
        self.progress.commit(progress, writes).await
    }

    async fn rollback(&self, open: Self::Open) -> Result<(), StoreError> {
        self.progress.rollback(open.1).await
    }
}
