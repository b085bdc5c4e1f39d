//! Decides a command, and appends its events; decides it again if other events match its query.

use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::time::{Instant, sleep, timeout_at};
use uuid::Uuid;

use super::{Decide, QueriedView};
use crate::aggregate::{
    Context, DecidedCommand, EncodedDecision, ExecuteError, NotExecutedKind, Receipt, repeat,
};
use crate::backoff::Backoff;
use crate::codec::Codec;
use crate::event::{EventTypes, Metadata, NewEvent, Position, RecordedEvent, StreamId, Version};
use crate::panic::caught;
use crate::store::{Append, AppendError, Appended, EventStore, ExpectedVersion, Query, StoreError};
use crate::telemetry::trace::CommandSpan;
use crate::telemetry::{Metrics, Timer};

/// The encoded events of a decision, and its reply.
type NewEvents<D> = (Vec<NewEvent>, <D as Decide>::Reply);

/// Maximum number of decisions on a command.
const MAX_ATTEMPTS: u32 = 10;

/// Wait before the second attempt; it doubles with each further one.
const FIRST_WAIT: Duration = Duration::from_millis(2);

/// Longest wait before an attempt.
const MAX_WAIT: Duration = Duration::from_millis(250);

/// A receipt, or the error of a decision without one.
pub(crate) type DecisionResult<D> = Result<Receipt<<D as Decide>::Reply>, ExecuteError<<D as Decide>::Error>>;

/// A command to decide, with everything that its attempts need.
pub(crate) struct DecisionRequest<D> {
    pub(crate) decision: D,
    pub(crate) command_id: Uuid,
    /// Stream that gets the events.
    pub(crate) stream: StreamId,
    /// Fingerprint of the content. It detects the reuse of an id for another command.
    pub(crate) content: u64,
    pub(crate) metadata: Metadata,
    /// Time until which the caller waits. No attempt begins after it.
    pub(crate) deadline: Instant,
    /// Arrival time. It is the clock of the attempts.
    pub(crate) now: DateTime<Utc>,
    pub(crate) span: CommandSpan,
}

/// Decides a command and appends its events, in up to [`MAX_ATTEMPTS`].
pub(crate) async fn decide_and_append<D: Decide>(
    store: &dyn EventStore,
    metrics: &Metrics,
    request: DecisionRequest<D>,
) -> DecisionResult<D> {
    let types = EventTypes::of::<D::Event>()?;
    let codec = store.info().codec;
    let mut backoff = Backoff::new(FIRST_WAIT, MAX_WAIT);
    let mut attempts = 0;
    loop {
        let mut view = request.view()?;
        let query = view.query().map_err(|error| NotExecutedKind::Store(error.into()))?;
        // I8: of two attempts at one command, the event of the first crosses the boundary of the
        // second, whatever the views read. The second then finds that event.
        let query = query.or_of_command(request.command_id);
        let read = timeout_at(request.deadline, store.read(query)).await;
        // A read that is ready when its time is over counts as late.
        let Some(read) = read.ok().filter(|_| Instant::now() < request.deadline) else {
            return Err(request.undecided());
        };
        let (events, boundary) = match read {
            Ok(read) => read,
            Err(error) => {
                // I8: the query may match too many events now because of those of this very command.
                let is_refused = matches!(error, StoreError::Invalid { .. });
                let first = if is_refused { find_receipt(store, &request).await? } else { None };
                return first.ok_or_else(|| NotExecutedKind::Store(error).into());
            }
        };
        if events.iter().any(|event| event.command_id == request.command_id)
            && let Some(receipt) = find_receipt(store, &request).await?
        {
            return Ok(receipt);
        }
        // After the look-up: the append that came first may be of this very command.
        if attempts == MAX_ATTEMPTS {
            return Err(NotExecutedKind::RetriesExhausted { stream: request.stream, attempts }.into());
        }
        attempts += 1;
        if attempts > 1 {
            metrics.command_retried(D::NAME);
        }
        let (new, reply) = request.decide(&mut view, &events, &types, codec, attempts)?;
        let count = new.len();
        if new.is_empty() {
            let position = events.last().map_or(Position::START, |event| event.position);
            return Ok(request.receipt(Version::NONE, position, count, reply));
        }
        drop((view, events));
        let span = request.span.append(count);
        // I13: the store refuses the append if an event matches that this attempt has not read.
        let append = Append::one(request.stream.clone(), ExpectedVersion::Any, new).unless(boundary);
        let result = append_one(store, metrics, append, count).await;
        drop(span);
        match result {
            Ok(Appended { versions, positions }) => {
                let (Some(version), Some(position)) = (versions.last(), positions.last()) else {
                    let reason = "the store returned no position for its events".to_owned();
                    return Err(ExecuteError::OutcomeUnknown { command_id: request.command_id, reason });
                };
                return Ok(request.receipt(*version, *position, count, reply));
            }
            Err(AppendError::Store(error)) => {
                return Err(ExecuteError::from_store(error, request.command_id));
            }
            Err(AppendError::Conflict(_) | AppendError::Changed { .. } | AppendError::Exists { .. }) => {}
        }
        sleep(backoff.next()).await;
        if request.deadline <= Instant::now() {
            return Err(request.undecided());
        }
    }
}

impl<D: Decide> DecisionRequest<D> {
    /// Returns the view before its first event.
    fn view(&self) -> Result<QueriedView<D::View>, NotExecutedKind> {
        caught(|| QueriedView::new(self.decision.view())).map_err(|message| self.panicked(message))
    }

    /// Folds the events that were read, decides, and encodes the new events.
    ///
    /// Returns these with the reply. A panic of user code becomes an error.
    fn decide(
        &self,
        view: &mut QueriedView<D::View>,
        events: &[RecordedEvent],
        types: &EventTypes,
        codec: Codec,
        attempt: u32,
    ) -> Result<NewEvents<D>, ExecuteError<D::Error>> {
        let decided = caught(|| -> Result<_, ExecuteError<D::Error>> {
            view.fold(events)?;
            let _span = self.span.decide(attempt);
            let context =
                Context::new(&self.stream, Version::NONE, self.command_id, &self.metadata, self.now);
            let decision = self.decision.decide(view.view(), &context).map_err(ExecuteError::Rejected)?;
            if decision.events.is_empty() {
                return Ok((Vec::new(), decision.reply));
            }
            let (id, content, metadata) = (self.command_id, self.content, &self.metadata);
            let command = DecidedCommand { id, content, metadata };
            let EncodedDecision { events: mut new, reply, .. } =
                EncodedDecision::new(types, codec, &command, decision)?;
            // Before the append: events that the view cannot fold must not become durable.
            let own = new.iter().filter(|event| view.matches(&event.name, &event.tags));
            let own: Vec<_> = own.map(|event| event.to_recorded(self.stream.clone(), codec)).collect();
            view.fold(&own)?;
            // I8: one tagged event suffices, because all events of the command are in one append.
            if let Some(last) = new.last_mut() {
                last.tags = std::mem::take(&mut last.tags).of_command(id);
            }
            Ok((new, reply))
        });
        decided.unwrap_or_else(|message| Err(self.panicked(message).into()))
    }

    fn panicked(&self, message: String) -> NotExecutedKind {
        NotExecutedKind::Panicked { stream: self.stream.clone(), message }
    }

    fn undecided(&self) -> ExecuteError<D::Error> {
        let reason = "dropped because it was not decided before its deadline".to_owned();
        ExecuteError::OutcomeUnknown { command_id: self.command_id, reason }
    }

    fn receipt(
        &self,
        version: Version,
        position: Position,
        events: usize,
        reply: D::Reply,
    ) -> Receipt<D::Reply> {
        let (command_id, stream, events) = (self.command_id, self.stream.clone(), events as u64);
        Receipt { command_id, stream, version, position, events, reply, duplicate: false }
    }
}

/// Returns the first receipt of a command that is already durable; `None` for a new command.
async fn find_receipt<D: Decide>(
    store: &dyn EventStore,
    request: &DecisionRequest<D>,
) -> Result<Option<Receipt<D::Reply>>, ExecuteError<D::Error>> {
    let id = request.command_id;
    // The event may be of a command to an aggregate with the same id: only the tag is of decisions.
    let query = Query::of_command(id);
    let found = store.matching(&query, Position::START, 1).await.map_err(NotExecutedKind::Store)?;
    let Some(event) = found.first() else { return Ok(None) };
    let record = store.command_events(&event.stream, id).await.map_err(NotExecutedKind::Store)?;
    let Some(record) = record else { return Ok(None) };
    repeat(store, &event.stream, id, request.content, record).await.map(Some)
}

/// Appends in a transaction of its own.
async fn append_one(
    store: &dyn EventStore,
    metrics: &Metrics,
    append: Append,
    events: usize,
) -> Result<Appended, AppendError> {
    let timer = Timer::start();
    let result = store.append(vec![append]).await.pop().unwrap_or_else(|| {
        let reason = "the append received no result".to_owned();
        Err(StoreError::OutcomeUnknown { reason, source: None }.into())
    });
    let failed = match &result {
        Err(AppendError::Store(error)) => Some(error.kind()),
        _ => None,
    };
    metrics.appended(timer, events, failed);
    result
}
