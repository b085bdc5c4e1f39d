//! The state machine of a projection's task.
//!
//! ```text
//!                 no rebuild
//! Starting ─┬────────────────────▶ Dormant
//!           │ shared, no lease
//!           ├────────────────────▶ Standby
//!           │                         │ lease acquired
//!           │ lease, or local         ▼          checkpoint claimed
//!           └────────────────────▶ Claiming ─────────────────────────▶ Owning
//!
//!                      subscribed               end of the log
//! Owning:  Idle ──────────────────▶ CatchingUp ◀──────────────▶ Live     Paused, Waiting, Stopped
//!                                                    gap
//!
//! from                   event                                       transition        to
//! ─────────────────────  ──────────────────────────────────────────  ────────────────  ──────────
//! Starting               the read model fits; lease held, or local   prepared          Claiming
//! Starting               the read model fits; shared, no lease       prepared          Standby
//! Starting               a rebuild task finds no rebuild             sleep             Dormant
//! Standby                the lease is acquired                       acquired          Claiming
//! Claiming               the checkpoint is claimed                   begin_at          Idle
//! Idle, Waiting          the live source is subscribed               begin_reading     CatchingUp
//! CatchingUp             a page ends at the end of the log           reached_end       Live
//! Live                   the feed has a gap or fails, or the store   catch_up          CatchingUp
//!                        must be read again
//! Live                   the live source ends                        end_reading       Idle
//! active                 the target of the triggers is reached       wait_for_trigger  Waiting
//! active                 an operator pauses the projection           pause             Paused
//! Paused                 an operator resumes the projection          resume            Idle
//! active                 an event cannot be applied                  stop              Stopped
//! active                 a commit fails, or has an unknown outcome   lose_checkpoint   Claiming
//! not failed             the store or the read model cannot be used  reload, stop,     Failed
//!                                                                    leave
//! Stopped                an operator acts                            retry             Idle
//! Failed                 an operator acts                            retry             Starting
//! not failed             a node has changed shared state             reload            Starting
//! not failed             loss or handover of the lease               leave             Starting
//! Stopped                one of the last two, or a failed commit     (the same)        Failed
//! ```
//!
//! *Active* is Owning except Stopped. *Failed* ends only with `retry`. At the shutdown, a task leaves
//! any state and releases its lease.
//!
//! Two conditions hold up a task in any state and leave the state unchanged: the backoff after an
//! outage ([`Retry`](super::retry::Retry)), and, for the live version, a change by any node that is in
//! progress ([`Changes`](super::operators::Changes)).

use super::live::Follower;
use super::reading::{Pending, Reading, Suspect};
use crate::event::Position;
use crate::lease::HeldLease;
use crate::projection::ProjectionState;
use crate::store::Checkpoint;

/// The state of a task, with a lease `L` and a live source `F`.
///
/// In `Claiming` and `Owning`, `lease` is `None` only if this node keeps the read model for itself.
pub(super) enum State<L = HeldLease, F = Follower> {
    /// The layout and the version of the read model must be checked.
    Starting { lease: Option<L> },
    /// A rebuild task has nothing to build.
    Dormant,
    /// Another node owns, or should own, the read model.
    Standby,
    /// This node owns the read model; its checkpoint must be read and claimed.
    Claiming { lease: Option<L> },
    /// This node owns the read model from a checkpoint on.
    Owning(Owning<L, F>),
    /// Stopped until an operator acts. In memory only: a restart clears it.
    Failed { lease: Option<L> },
}

/// A claimed read model.
pub(super) struct Owning<L = HeldLease, F = Follower> {
    pub(super) lease: Option<L>,
    /// The checkpoint of the read model.
    pub(super) saved: Checkpoint,
    /// Position up to which everything is applied.
    ///
    /// Ahead of `saved` only by events of other projections.
    pub(super) applied: Position,
    pub(super) activity: Activity<F>,
}

/// The activity of an owner.
pub(super) enum Activity<F = Follower> {
    /// Nothing is read yet.
    Idle,
    /// Paused by an operator.
    Paused,
    /// Waiting for a trigger.
    Waiting,
    /// Reads and applies events.
    Reading(Box<Reading<F>>),
    /// Stopped before an event until an operator acts. In memory only: a restart clears it.
    Stopped,
}

impl<L, F> State<L, F> {
    pub(super) fn starting() -> Self {
        Self::Starting { lease: None }
    }

    /// The read model fits; its owner needs a lease if it is `shared`.
    pub(super) fn prepared(&mut self, shared: bool) {
        let lease = self.take_lease();
        *self = if shared && lease.is_none() { Self::Standby } else { Self::Claiming { lease } };
    }

    /// There is nothing to build; returns the lease to release.
    pub(super) fn sleep(&mut self) -> Option<L> {
        let lease = self.take_lease();
        *self = Self::Dormant;
        lease
    }

    pub(super) fn acquired(&mut self, lease: L) {
        debug_assert!(matches!(self, Self::Standby), "a lease is acquired on standby");
        *self = Self::Claiming { lease: Some(lease) };
    }

    pub(super) fn begin_at(&mut self, saved: Checkpoint) {
        debug_assert!(matches!(self, Self::Claiming { .. }), "a checkpoint is claimed once");
        let lease = self.take_lease();
        *self = Self::Owning(Owning { lease, saved, applied: saved.position, activity: Activity::Idle });
    }

    pub(super) fn begin_reading(&mut self, follower: F, live_after: Position) {
        debug_assert!(self.owning().is_some(), "only an owner reads");
        if let Self::Owning(Owning { activity, .. }) = self {
            *activity = Activity::Reading(Box::new(Reading::new(follower, live_after)));
        }
    }

    pub(super) fn end_reading(&mut self) {
        self.rest(Activity::Idle);
    }

    pub(super) fn wait_for_trigger(&mut self) {
        self.rest(Activity::Waiting);
    }

    pub(super) fn pause(&mut self) {
        self.rest(Activity::Paused);
    }

    pub(super) fn resume(&mut self) {
        if let Self::Owning(Owning { activity: activity @ Activity::Paused, .. }) = self {
            *activity = Activity::Idle;
        }
    }

    /// Drops the work in progress of an owner that is not stopped.
    fn rest(&mut self, next: Activity<F>) {
        if !self.is_failed()
            && let Self::Owning(Owning { activity, .. }) = self
        {
            *activity = next;
        }
    }

    /// Stops until an operator acts. An owner keeps its checkpoint.
    pub(super) fn stop(&mut self) {
        match self {
            Self::Owning(Owning { activity, .. }) => *activity = Activity::Stopped,
            _ => *self = Self::Failed { lease: self.take_lease() },
        }
    }

    /// Ends a failure; returns whether there was one.
    pub(super) fn retry(&mut self) -> bool {
        match self {
            Self::Failed { lease } => *self = Self::Starting { lease: lease.take() },
            Self::Owning(Owning { activity: activity @ Activity::Stopped, .. }) => *activity = Activity::Idle,
            _ => return false,
        }
        true
    }

    /// The checkpoint must be read again.
    pub(super) fn lose_checkpoint(&mut self) {
        match self {
            _ if self.is_failed() => self.reload(),
            Self::Owning(Owning { lease, .. }) => *self = Self::Claiming { lease: lease.take() },
            _ => {}
        }
    }

    /// Version, layout and checkpoint must be read again; the lease and a failure stay.
    pub(super) fn reload(&mut self) {
        let (failed, lease) = (self.is_failed(), self.take_lease());
        *self = if failed { Self::Failed { lease } } else { Self::Starting { lease } };
    }

    /// Ends the ownership; drops the work in progress before the returned lease can be released.
    pub(super) fn leave(&mut self) -> Option<L> {
        self.reload();
        self.take_lease()
    }

    fn take_lease(&mut self) -> Option<L> {
        self.lease_slot()?.take()
    }

    /// Returns the lease of this node as the owner of a shared read model.
    pub(super) fn lease(&self) -> Option<&L> {
        match self {
            Self::Starting { lease }
            | Self::Claiming { lease }
            | Self::Owning(Owning { lease, .. })
            | Self::Failed { lease } => lease.as_ref(),
            Self::Dormant | Self::Standby => None,
        }
    }

    pub(super) fn lease_mut(&mut self) -> Option<&mut L> {
        self.lease_slot()?.as_mut()
    }

    fn lease_slot(&mut self) -> Option<&mut Option<L>> {
        match self {
            Self::Starting { lease }
            | Self::Claiming { lease }
            | Self::Owning(Owning { lease, .. })
            | Self::Failed { lease } => Some(lease),
            Self::Dormant | Self::Standby => None,
        }
    }

    pub(super) fn owning(&self) -> Option<&Owning<L, F>> {
        if let Self::Owning(owning) = self { Some(owning) } else { None }
    }

    pub(super) fn owning_mut(&mut self) -> Option<&mut Owning<L, F>> {
        if let Self::Owning(owning) = self { Some(owning) } else { None }
    }

    pub(super) fn reading(&self) -> Option<&Reading<F>> {
        match self {
            Self::Owning(Owning { activity: Activity::Reading(reading), .. }) => Some(reading),
            _ => None,
        }
    }

    pub(super) fn reading_mut(&mut self) -> Option<&mut Reading<F>> {
        match self {
            Self::Owning(Owning { activity: Activity::Reading(reading), .. }) => Some(reading),
            _ => None,
        }
    }

    pub(super) fn suspect(&self) -> Option<&Suspect> {
        self.reading()?.suspect.as_ref()
    }

    /// Applies these events next.
    pub(super) fn set_pending(&mut self, pending: Pending) {
        if let Some(reading) = self.reading_mut() {
            reading.pending = Some(pending);
        }
    }

    /// A transaction has moved the checkpoint.
    pub(super) fn committed(&mut self, to: Checkpoint) {
        let Self::Owning(Owning { saved, applied, activity, .. }) = self else { return };
        (*saved, *applied) = (to, to.position);
        if let Activity::Reading(reading) = activity {
            reading.committed(to.position);
        }
    }

    pub(super) fn is_live(&self) -> bool {
        self.reading().is_some_and(Reading::is_live)
    }

    pub(super) fn is_failed(&self) -> bool {
        matches!(self, Self::Failed { .. } | Self::Owning(Owning { activity: Activity::Stopped, .. }))
    }

    /// Returns whether the status shows a pause: a starting or failed task shows its own state.
    pub(super) fn shows_pause(&self, shared: bool) -> bool {
        match self {
            Self::Standby => true,
            Self::Starting { lease } => shared && lease.is_none(),
            Self::Owning(_) => !self.is_failed(),
            Self::Dormant | Self::Claiming { .. } | Self::Failed { .. } => false,
        }
    }

    /// Returns the state in the status of the projection.
    pub(super) fn shown(&self, paused: bool) -> ProjectionState {
        match self {
            Self::Starting { lease: None } | Self::Standby if paused => ProjectionState::Paused,
            Self::Starting { .. } | Self::Claiming { .. } => ProjectionState::Starting,
            Self::Dormant | Self::Standby => ProjectionState::Standby,
            Self::Failed { .. } => ProjectionState::Failed,
            Self::Owning(Owning { activity, .. }) => match activity {
                Activity::Idle => ProjectionState::Starting,
                Activity::Paused => ProjectionState::Paused,
                Activity::Waiting => ProjectionState::Waiting,
                Activity::Stopped => ProjectionState::Failed,
                Activity::Reading(reading) => reading.shown(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Machine = State<u8, ()>;

    fn at(position: u64) -> Checkpoint {
        Checkpoint { position: Position::new(position), ..Checkpoint::default() }
    }

    fn owner() -> Machine {
        let mut state = Machine::starting();
        state.prepared(true);
        state.acquired(1);
        state.begin_at(at(7));
        state
    }

    fn reader() -> Machine {
        let mut state = owner();
        state.begin_reading((), Position::new(9));
        state
    }

    fn shown(state: &Machine) -> ProjectionState {
        state.shown(false)
    }

    #[test]
    fn a_task_waits_on_standby_only_if_it_needs_a_lease() {
        let mut local = Machine::starting();
        local.prepared(false);
        assert!(matches!(local, State::Claiming { lease: None }));
        let mut shared = Machine::starting();
        assert_eq!(shown(&shared), ProjectionState::Starting);
        shared.prepared(true);
        assert_eq!((shown(&shared), shared.shown(true)), (ProjectionState::Standby, ProjectionState::Paused));
        shared.acquired(1);
        assert!(matches!(shared, State::Claiming { lease: Some(1) }));
    }

    #[test]
    fn a_rebuild_task_without_a_rebuild_gives_its_lease_back() {
        let mut state = owner();
        state.reload();
        assert_eq!((state.sleep(), shown(&state)), (Some(1), ProjectionState::Standby));
        state.reload();
        assert!(matches!(state, State::Starting { lease: None }));
    }

    #[test]
    fn a_commit_moves_the_checkpoint() {
        let mut state = reader();
        state.owning_mut().unwrap().applied = Position::new(9);
        state.committed(at(10));
        let owning = state.owning().unwrap();
        assert_eq!((owning.saved, owning.applied), (at(10), Position::new(10)));
        state.end_reading();
        assert!(state.reading().is_none() && state.owning().is_some());
    }

    #[test]
    fn a_pause_ends_the_work_but_not_the_ownership() {
        let mut state = reader();
        state.pause();
        assert_eq!((shown(&state), state.lease()), (ProjectionState::Paused, Some(&1)));
        state.resume();
        assert_eq!(state.owning().unwrap().saved, at(7));
        assert_eq!(shown(&state), ProjectionState::Starting);
        // A resumption of a running projection interrupts nothing.
        let mut running = reader();
        running.resume();
        assert!(running.reading().is_some());
    }

    #[test]
    fn a_stopped_owner_keeps_lease_and_checkpoint_until_an_operator_acts() {
        let mut state = reader();
        assert!(!state.retry());
        state.stop();
        for transition in [State::pause, State::resume, State::wait_for_trigger, State::end_reading] {
            transition(&mut state);
            assert_eq!(shown(&state), ProjectionState::Failed);
        }
        assert!(!state.shows_pause(true));
        assert!(state.retry());
        assert_eq!((state.lease(), state.owning().unwrap().saved), (Some(&1), at(7)));
    }

    #[test]
    fn without_a_claim_a_failure_starts_over() {
        let mut state = owner();
        state.reload();
        state.stop();
        assert!(matches!(state, State::Failed { lease: Some(1) }));
        assert_eq!((shown(&state), state.shows_pause(true)), (ProjectionState::Failed, false));
        assert!(state.retry());
        assert!(matches!(state, State::Starting { lease: Some(1) }));
        assert!(!state.shows_pause(true) && owner().shows_pause(true));
    }

    #[test]
    fn the_work_in_progress_is_dropped_before_the_lease_is_returned() {
        let follower = std::rc::Rc::new(());
        let mut state: State<u8, std::rc::Rc<()>> = State::starting();
        state.prepared(true);
        state.acquired(1);
        state.begin_at(at(7));
        state.begin_reading(follower.clone(), Position::new(9));
        assert_eq!((state.leave(), std::rc::Rc::strong_count(&follower)), (Some(1), 1));
    }

    #[test]
    fn a_failure_outlasts_the_checkpoint_and_the_lease() {
        for transition in [State::reload, State::lose_checkpoint] {
            let mut state = reader();
            state.stop();
            transition(&mut state);
            assert!(matches!(state, State::Failed { lease: Some(1) }));
            assert_eq!(state.leave(), Some(1));
            assert!(matches!(state, State::Failed { lease: None }));
            assert!(state.retry());
            assert!(matches!(state, State::Starting { lease: None }));
        }
    }

    #[test]
    fn the_lease_outlasts_the_checkpoint() {
        let mut state = reader();
        state.lose_checkpoint();
        assert!(matches!(state, State::Claiming { lease: Some(1) }));
        state.begin_at(at(7));
        state.reload();
        assert!(matches!(state, State::Starting { lease: Some(1) }));
        state.prepared(true);
        assert!(matches!(state, State::Claiming { lease: Some(1) }));
        assert_eq!(state.leave(), Some(1));
        assert!(matches!(state, State::Starting { lease: None }));
        assert_eq!(state.leave(), None);
    }
}
