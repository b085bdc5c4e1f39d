//! The bookkeeping of an instance: what its stream says, without the types of the user.

use std::collections::{BTreeMap, VecDeque};

use uuid::Uuid;

use super::event::{Due, Effect, EncodedCommand, Ending, ProcessEvent, RecordedInput, Source, Trail, Verb};
use crate::event::{Position, Version};

/// The phase of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Phase {
    #[default]
    Running,
    /// The undo commands run, the last effect first.
    Compensating,
    Ended(Ending),
}

/// The bookkeeping of an instance.
#[derive(Debug, Default)]
pub(crate) struct Record {
    /// Version of the stream.
    pub(super) version: Version,
    pub(super) phase: Phase,
    /// I12: position of the last event consumed in log order. Earlier deliveries are repetitions.
    pub(super) consumed: Position,
    /// Unanswered commands, in order.
    pub(super) effects: Vec<Effect>,
    /// Commands whose rejection is recorded.
    pub(super) rejected: Vec<Effect>,
    /// Undo commands of the effects that took effect, with the effect's id and trail.
    pub(super) undo: Vec<Undo>,
    pub(super) timers: BTreeMap<String, TimerState>,
    /// Inputs without a reaction, oldest first.
    pub(super) held: VecDeque<RecordedInput>,
    /// Reason why the instance is parked, and the command that failed, if any.
    pub(super) parked: Option<(String, Option<Uuid>)>,
    /// Requests of operators, oldest first.
    pub(super) requests: VecDeque<Verb>,
}

/// The undo command of an effect that took effect.
#[derive(Debug, Clone)]
pub(super) struct Undo {
    pub(super) effect: Uuid,
    pub(super) key: String,
    pub(super) command: EncodedCommand,
    pub(super) trail: Trail,
}

/// A timer that is not due yet, as far as the instance knows.
#[derive(Debug, Clone)]
pub(super) struct TimerState {
    /// Version of the event that started it.
    pub(super) version: Version,
    pub(super) due: Due,
    pub(super) trail: Trail,
}

impl Record {
    /// Returns whether the instance has consumed anything.
    pub(super) fn exists(&self) -> bool {
        self.version > Version::NONE
    }

    /// Returns whether an input is recorded without a reaction.
    pub(super) fn holds(&self) -> bool {
        self.parked.is_some() || !self.held.is_empty()
    }

    /// Folds an event. Returns the input that the process folds, if there is one.
    pub(super) fn fold(&mut self, event: &ProcessEvent) -> Option<RecordedInput> {
        self.version = self.version.next();
        match event {
            ProcessEvent::Input(input) => return self.consume(input),
            ProcessEvent::Reacted {} => return self.held.pop_front(),
            ProcessEvent::Effect(effect) => {
                if effect.undoes {
                    self.undo.pop();
                }
                self.effects.push(effect.clone());
            }
            ProcessEvent::TimerStarted { name, due, trail } => {
                let timer = TimerState { version: self.version, due: *due, trail: trail.clone() };
                self.timers.insert(name.clone(), timer);
            }
            ProcessEvent::TimerCancelled { name } => _ = self.timers.remove(name),
            ProcessEvent::Requested { verb } if self.applies(*verb) => self.requests.push_back(*verb),
            ProcessEvent::Requested { .. } => {}
            ProcessEvent::Parked { reason, effect } => self.parked = Some((reason.clone(), *effect)),
            ProcessEvent::Resumed {} => {
                self.requests.retain(|request| *request != Verb::Retry);
                self.parked = None;
            }
            ProcessEvent::Compensating {} => {
                self.requests.retain(|request| *request == Verb::Cancel);
                self.phase = Phase::Compensating;
                // A command that failed permanently had no effect, and it must not fail again.
                let failed = self.parked.take().and_then(|(_, effect)| effect);
                self.effects.retain(|effect| Some(effect.id) != failed);
                self.timers.clear();
                self.held.clear();
            }
            ProcessEvent::Ended { ending } => {
                self.requests.clear();
                self.phase = Phase::Ended(*ending);
                self.timers.clear();
                self.held.clear();
                self.undo.clear();
                if *ending == Ending::Cancelled {
                    self.effects.clear();
                    self.parked = None;
                }
            }
        }
        None
    }

    /// Returns whether an operator's request can change the instance.
    pub(super) fn applies(&self, verb: Verb) -> bool {
        match verb {
            Verb::Retry => self.parked.is_some(),
            Verb::Cancel => !matches!(self.phase, Phase::Ended(_)) || !self.effects.is_empty(),
            Verb::Compensate => self.phase == Phase::Running,
        }
    }

    fn consume(&mut self, input: &RecordedInput) -> Option<RecordedInput> {
        match &input.source {
            Source::Event(trigger) => self.consumed = self.consumed.max(trigger.position),
            Source::Done { .. } | Source::Rejected { .. } => self.settle(input),
            Source::Due { timer } => _ = self.timers.remove(timer),
        }
        if input.held {
            self.held.push_back(RecordedInput { held: false, ..input.clone() });
            return None;
        }
        (self.phase == Phase::Running).then(|| input.clone())
    }

    /// Removes an answered effect, and keeps its undo command if it took effect.
    fn settle(&mut self, input: &RecordedInput) {
        let of_input = |effect: &Effect| effect.id == input.id;
        let open = self.effects.iter().position(of_input).map(|at| self.effects.remove(at));
        let rejected = || {
            let at = self.rejected.iter().position(of_input)?;
            Some(self.rejected.swap_remove(at))
        };
        let Some(effect) = open.or_else(rejected) else { return };
        if matches!(input.source, Source::Rejected { .. }) {
            self.rejected.push(effect);
            return;
        }
        let Effect { id, key, undo, trail, .. } = effect;
        if let Some(command) = undo
            && !matches!(self.phase, Phase::Ended(_))
        {
            self.undo.push(Undo { effect: id, key, command, trail });
        }
    }
}
