use crate::event::Position;

/// What operators control of a projection, on every node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ProjectionControl {
    /// Whether the projection is paused.
    pub paused: bool,
    /// Position up to which manual triggers let the projection apply events.
    pub trigger_position: Position,
    /// Number of manual triggers.
    pub triggers: u64,
    /// Number of changes after which every owner reads its state again.
    pub changes: u64,
}

/// A change of a [`ProjectionControl`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ControlChange {
    /// Pauses the projection.
    Pause,
    /// Resumes the projection, and counts a change.
    Resume,
    /// Counts a trigger up to this position, or up to an earlier trigger's if that is higher.
    Trigger(Position),
    /// Withdraws the position of the triggers, if this many were made so far.
    WithdrawTriggers(u64),
    /// Counts a change.
    Announce,
}

impl ControlChange {
    /// Applies the change.
    pub(super) fn apply(self, control: &mut ProjectionControl) {
        match self {
            Self::Pause => control.paused = true,
            Self::Resume => {
                control.paused = false;
                control.changes += 1;
            }
            Self::Trigger(position) => {
                control.trigger_position = control.trigger_position.max(position);
                control.triggers += 1;
            }
            Self::WithdrawTriggers(triggers) if triggers == control.triggers => {
                control.trigger_position = Position::START;
            }
            Self::WithdrawTriggers(_) => {}
            Self::Announce => control.changes += 1,
        }
    }
}

/// The progress of the publisher: the end of the log stream that it confirmed last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PublisherCheckpoint {
    /// Last published position.
    pub position: Position,
    /// Lease epoch of the write; a publisher with a lower epoch is fenced.
    pub epoch: u64,
    /// Sequence number of the last message in the log stream.
    pub sequence: u64,
}
