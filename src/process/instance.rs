//! An instance as an aggregate: consumes inputs, reacts, records effects.

use std::fmt;
use std::time::Duration;

use uuid::Uuid;

use super::command::{CommandKind, InstanceCommand, Settlement};
use super::event::{Due, Effect, Ending, ProcessEvent, RecordedInput, Source, Verb};
use super::instance_event::InstanceEvent;
use super::next::{End, Next, Step};
use super::options::Limits;
use super::reaction::{Consumed, Reaction};
use super::record::{Phase, Record};
use super::routes::RouteKind;
use super::{Input, Process, ProcessContext, Rejection, Reply};
use crate::aggregate::{Aggregate, Context, Decided, Decision, NeverRejects};
use crate::event::{EventSet, Position, RecordedEvent, Version};
use crate::panic::caught;
use crate::store::{DueTime, NewTimer, TimerRef};

/// Maximum number of inputs that a parked instance holds.
const MOST_HELD: usize = 10_000;

/// An instance of a process: the state of the user, and the bookkeeping.
pub(crate) struct Instance<P: Process> {
    process: P,
    pub(super) record: Record,
    /// Set if the user's code could not fold an input. The state of the user is then unusable.
    broken: Option<String>,
}

impl<P: Process> Default for Instance<P> {
    fn default() -> Self {
        Self { process: P::default(), record: Record::default(), broken: None }
    }
}

type Decisions = Vec<ProcessEvent>;

impl<P: Process> Aggregate for Instance<P> {
    type Event = InstanceEvent<P>;
    type Command = InstanceCommand;
    type Reply = Reaction;
    type Error = NeverRejects;

    fn handle(&self, command: &InstanceCommand, context: &Context<'_>) -> Decided<Self> {
        let limits = command.limits;
        let (consumed, events) = match &command.kind {
            CommandKind::Deliver { id, trigger, route, trail, late } => {
                match self.refusal(trigger.position, *route, *late) {
                    Some(consumed) => (consumed, Vec::new()),
                    None => {
                        let source = Source::Event(trigger.clone());
                        let input = RecordedInput { id: *id, source, held: false, trail: trail.clone() };
                        self.consume(input, limits, context)
                    }
                }
            }
            CommandKind::Settle { effect, answer } => self.settle(*effect, answer, limits, context),
            CommandKind::Fire { timer, version } => self.fire(timer, *version, limits, context),
            CommandKind::Park { effect, reason } => self.park(*effect, reason),
            CommandKind::Advance => self.advance(limits, context),
        };
        let reaction = self.reaction(command, consumed, &events, context.version());
        let events = events.into_iter().map(InstanceEvent::from);
        Ok(Decision::events(events).reply(reaction))
    }

    fn apply(&mut self, event: &InstanceEvent<P>) {
        let Some(input) = self.record.fold(&event.0) else { return };
        if self.broken.is_some() {
            return;
        }
        let process = &mut self.process;
        let folded = caught(|| with_input(&input, |input, _| process.apply(input)));
        let reason = folded.unwrap_or_else(|panic| Err(format!("the process panicked: {panic}"))).err();
        self.broken = reason.map(|reason| format!("folding input {} failed: {reason}", input.id));
    }
}

impl<P: Process> Instance<P> {
    #[cfg(feature = "testing")]
    pub(super) fn process(&self) -> &P {
        &self.process
    }

    /// Returns why an event is not consumed.
    fn refusal(&self, position: Position, route: RouteKind, late: bool) -> Option<Consumed> {
        let record = &self.record;
        // I12: an instance receives events in log order. The driver has looked for a late one.
        if !late && record.consumed >= position {
            return Some(Consumed::Duplicate);
        }
        match route {
            _ if record.exists() && record.phase != Phase::Running => Some(Consumed::Late),
            RouteKind::Starts if record.exists() => Some(Consumed::Existing),
            RouteKind::Continues if !record.exists() => Some(Consumed::Missing),
            _ if record.held.len() >= MOST_HELD => Some(Consumed::Full),
            _ => None,
        }
    }

    /// Records an input with the reaction to it, or holds it.
    fn consume(&self, input: RecordedInput, limits: Limits, context: &Context<'_>) -> (Consumed, Decisions) {
        let hold = |input: RecordedInput| ProcessEvent::Input(RecordedInput { held: true, ..input });
        if self.record.holds() && self.broken.is_none() || self.record.parked.is_some() {
            return (Consumed::Held, vec![hold(input)]);
        }
        match self.react(&input, limits, context) {
            Ok(mut events) => {
                events.insert(0, ProcessEvent::Input(input));
                (Consumed::Reacted, events)
            }
            Err(reason) => (Consumed::Parked, vec![hold(input), parked(reason)]),
        }
    }

    /// Returns the events of the reaction to an input, without the input.
    fn react(
        &self,
        input: &RecordedInput,
        limits: Limits,
        context: &Context<'_>,
    ) -> Result<Decisions, String> {
        if let Some(reason) = &self.broken {
            return Err(reason.clone());
        }
        if self.record.phase != Phase::Running {
            return Ok(Vec::new());
        }
        if input.trail.depth >= limits.depth {
            let reason = format!(
                "the chain of reactions is too long: depth {} (limit {}); processes may trigger each other",
                input.trail.depth, limits.depth
            );
            return Err(reason);
        }
        let react = |view: Input<'_, P::Event>, recorded: Option<&RecordedEvent>| {
            let (id, input_id, trail, now) = (context.id(), input.id, &input.trail, context.now());
            self.process.react(view, &ProcessContext { id, input_id, recorded, trail, now })
        };
        let next = caught(|| with_input(input, react))
            .unwrap_or_else(|panic| Err(format!("the process panicked: {panic}")))?;
        self.events(next, input, limits, context.id())
    }

    /// Converts the outcome of a reaction into events.
    fn events(
        &self,
        next: Next,
        input: &RecordedInput,
        limits: Limits,
        id: &str,
    ) -> Result<Decisions, String> {
        if let Some(problem) = next.problem {
            return Err(problem);
        }
        // The input ends its command or its timer.
        let is_open = |effect: &&Effect| effect.id != input.id;
        let is_running = |name: &&String| !matches!(&input.source, Source::Due { timer } if timer == *name);
        let mut open = self.record.effects.iter().filter(is_open).count();
        let mut timers = self.record.timers.keys().filter(is_running).count();
        let rejected = matches!(input.source, Source::Rejected { .. });
        let mut events = Vec::with_capacity(next.steps.len() + 1);
        for step in next.steps {
            events.push(match step {
                Step::Execute { key, command, undo } => {
                    open += 1;
                    // Only the last part can have a NUL, so that no two effects have one name.
                    // A contradicting answer has the id of the rejection before it.
                    let kind = if rejected { "process-rejected" } else { "process" };
                    let name = format!("{kind}\0{}\0{id}\0{key}", P::NAME);
                    let effect_id = Uuid::new_v5(&input.id, name.as_bytes());
                    let (cause, trail) = (input.id, input.trail.clone());
                    let undoes = false;
                    ProcessEvent::Effect(Effect { id: effect_id, cause, key, command, undo, undoes, trail })
                }
                Step::Start { timer, due } => {
                    let restarts = self.record.timers.keys().filter(is_running).any(|name| *name == timer);
                    timers += usize::from(!restarts);
                    ProcessEvent::TimerStarted { name: timer, due, trail: input.trail.clone() }
                }
                Step::Cancel { timer } => ProcessEvent::TimerCancelled { name: timer },
            });
        }
        let over = |what, count, limit| format!("too many {what}: {count} (limit {limit})");
        if open > limits.effects {
            return Err(over("open commands", open, limits.effects));
        }
        if timers > limits.timers {
            return Err(over("timers", timers, limits.timers));
        }
        match next.end {
            Some(End::Complete) => events.push(ProcessEvent::Ended { ending: Ending::Completed }),
            Some(End::Compensate) => events.push(ProcessEvent::Compensating {}),
            None => {}
        }
        Ok(events)
    }

    fn settle(
        &self,
        id: Uuid,
        answer: &Settlement,
        limits: Limits,
        context: &Context<'_>,
    ) -> (Consumed, Decisions) {
        let record = &self.record;
        let open = record.effects.iter().find(|effect| effect.id == id);
        // Two nodes may have sent a command, and an aggregate records no rejection: the rejection of
        // one attempt does not exclude that the other one takes effect later.
        let took_effect = matches!(answer, Settlement::Done { .. });
        let contradicted = || record.rejected.iter().find(|effect| took_effect && effect.id == id);
        let Some(effect) = open.or_else(contradicted) else {
            return (Consumed::Duplicate, Vec::new());
        };
        let key = effect.key.clone();
        let source = match answer {
            Settlement::Done { reply } => Source::Done { effect: key, reply: reply.clone() },
            Settlement::Rejected { message, .. } if effect.undoes => {
                return self.park(id, &format!("the undo command {key:?} was rejected: {message}"));
            }
            Settlement::Rejected { message, details } => {
                Source::Rejected { effect: key, message: message.clone(), details: details.clone() }
            }
        };
        let input = RecordedInput { id, source, held: false, trail: effect.trail.clone() };
        if record.phase == Phase::Running {
            return self.consume(input, limits, context);
        }
        let mut events = vec![ProcessEvent::Input(input)];
        if open.is_none() && record.phase != Phase::Compensating {
            let key = &effect.key;
            let reason = format!("the command {key:?} took effect after its rejection was recorded");
            events.push(parked(reason));
            return (Consumed::Parked, events);
        }
        (Consumed::Reacted, events)
    }

    fn fire(
        &self,
        timer: &str,
        version: Version,
        limits: Limits,
        context: &Context<'_>,
    ) -> (Consumed, Decisions) {
        // A timer that was cancelled or replaced is not the one of this version.
        let Some(open) = self.record.timers.get(timer).filter(|open| open.version == version) else {
            return (Consumed::Duplicate, Vec::new());
        };
        let name = format!("timer\0{}\0{}\0{timer}", P::NAME, context.id());
        let id = Uuid::new_v5(&Uuid::from_u128(u128::from(version.get())), name.as_bytes());
        let source = Source::Due { timer: timer.to_owned() };
        self.consume(RecordedInput { id, source, held: false, trail: open.trail.clone() }, limits, context)
    }

    fn park(&self, effect: Uuid, reason: &str) -> (Consumed, Decisions) {
        let open = self.record.effects.iter().any(|open| open.id == effect);
        if !open || self.record.parked.is_some() {
            return (Consumed::Nothing, Vec::new());
        }
        let parked = ProcessEvent::Parked { reason: reason.to_owned(), effect: Some(effect) };
        (Consumed::Parked, vec![parked])
    }

    /// Returns the events of one further step.
    fn advance(&self, limits: Limits, context: &Context<'_>) -> (Consumed, Decisions) {
        let record = &self.record;
        let request = record.requests.front().map(|request| match request {
            Verb::Retry => ProcessEvent::Resumed {},
            Verb::Cancel => ProcessEvent::Ended { ending: Ending::Cancelled },
            Verb::Compensate => ProcessEvent::Compensating {},
        });
        if let Some(request) = request {
            return (Consumed::Nothing, vec![request]);
        }
        if !self.has_next_step() {
            return (Consumed::Nothing, Vec::new());
        }
        if record.phase == Phase::Compensating {
            let end = ProcessEvent::Ended { ending: Ending::Compensated };
            return (Consumed::Nothing, vec![self.next_undo().unwrap_or(end)]);
        }
        let Some(input) = record.held.front() else { return (Consumed::Nothing, Vec::new()) };
        match self.react(input, limits, context) {
            Ok(mut events) => {
                events.insert(0, ProcessEvent::Reacted {});
                (Consumed::Reacted, events)
            }
            Err(reason) => (Consumed::Parked, vec![parked(reason)]),
        }
    }

    /// Returns whether the instance can advance without an input.
    fn has_next_step(&self) -> bool {
        let record = &self.record;
        let undoes = record.phase == Phase::Compensating && record.effects.is_empty();
        let reacts = record.phase == Phase::Running && !record.held.is_empty();
        !record.requests.is_empty() || record.parked.is_none() && (undoes || reacts)
    }

    /// Returns the undo command of the last effect that took effect and is not undone yet.
    fn next_undo(&self) -> Option<ProcessEvent> {
        let undo = self.record.undo.last()?;
        Some(ProcessEvent::Effect(Effect {
            id: Uuid::new_v5(&undo.effect, b"undo"),
            cause: undo.effect,
            key: format!("undo {}", undo.key),
            command: undo.command.clone(),
            undo: None,
            undoes: true,
            trail: undo.trail.clone(),
        }))
    }

    /// Returns what the driver has to do after the events of a command.
    fn reaction(
        &self,
        command: &InstanceCommand,
        consumed: Consumed,
        events: &[ProcessEvent],
        version: Version,
    ) -> Reaction {
        let record = &self.record;
        let mut reaction = Reaction { consumed, ..Reaction::default() };
        let has = |is: fn(&ProcessEvent) -> bool| events.iter().any(is);
        let parks = has(|event| matches!(event, ProcessEvent::Parked { .. }));
        let compensates = has(|event| matches!(event, ProcessEvent::Compensating {}));
        let resumes = compensates || has(|event| matches!(event, ProcessEvent::Resumed {}));
        if command.resend && !parks && (record.parked.is_none() || resumes) {
            // The driver before may have ended before it carried out an earlier reaction.
            let failed = record.parked.as_ref().and_then(|(_, effect)| *effect).filter(|_| compensates);
            let answered = match &command.kind {
                CommandKind::Settle { effect, .. } => Some(*effect),
                _ => None,
            };
            let open = record.effects.iter();
            let open = open.filter(|effect| Some(effect.id) != answered && Some(effect.id) != failed);
            reaction.effects.extend(open.cloned());
            reaction.resent = reaction.effects.len();
            let asks = matches!(command.kind, CommandKind::Advance) || consumed == Consumed::Duplicate;
            let timers = record.timers.iter().filter(|_| asks);
            reaction.put.extend(timers.map(|(name, timer)| new_timer(name, timer.version, timer.due)));
        }
        for (event, version) in events.iter().zip(1..).map(|(event, index)| (event, version.plus(index))) {
            match event {
                ProcessEvent::Effect(effect) => reaction.effects.push(effect.clone()),
                ProcessEvent::TimerStarted { name, due, .. } => {
                    reaction.put.retain(|timer| timer.name != *name);
                    reaction.put.push(new_timer(name, version, *due));
                }
                ProcessEvent::TimerCancelled { name } => {
                    reaction.put.retain(|timer| timer.name != *name);
                    self.remove_timer(name, &mut reaction.remove);
                }
                ProcessEvent::Ended { ending } => {
                    if *ending == Ending::Cancelled {
                        reaction.cancels = true;
                        reaction.effects.clear();
                        reaction.resent = 0;
                    }
                    self.remove_timers(&mut reaction);
                }
                ProcessEvent::Compensating {} => self.remove_timers(&mut reaction),
                ProcessEvent::Parked { reason, .. } => reaction.parked = Some(reason.clone()),
                _ => {}
            }
        }
        if let CommandKind::Fire { timer, .. } = &command.kind {
            // Its row goes when nothing is left to do.
            reaction.remove.retain(|removed| removed.name != *timer);
        }
        // After events, the next command decides: this state is the one before them.
        let acts = record.parked.is_none() && (record.phase != Phase::Running || record.holds());
        let may_step = acts || ends_running(events);
        reaction.more = self.has_next_step() || !parks && !events.is_empty() && may_step;
        reaction
    }

    fn remove_timers(&self, reaction: &mut Reaction) {
        reaction.put.clear();
        for name in self.record.timers.keys() {
            self.remove_timer(name, &mut reaction.remove);
        }
    }

    fn remove_timer(&self, name: &str, remove: &mut Vec<TimerRef>) {
        if let Some(timer) = self.record.timers.get(name) {
            let (name, version) = (name.to_owned(), timer.version);
            remove.push(TimerRef { instance: String::new(), name, version });
        }
    }
}

fn parked(reason: String) -> ProcessEvent {
    ProcessEvent::Parked { reason, effect: None }
}

/// Returns whether the instance does not go on running as before after the events.
fn ends_running(events: &[ProcessEvent]) -> bool {
    events.iter().any(|event| {
        matches!(event, ProcessEvent::Ended { .. } | ProcessEvent::Compensating {} | ProcessEvent::Resumed {})
    })
}

/// Returns a timer without its instance, which the driver adds.
fn new_timer(name: &str, version: Version, due: Due) -> NewTimer {
    let due = match due {
        Due::After(millis) => DueTime::After(Duration::from_millis(millis)),
        Due::At(time) => DueTime::At(time),
    };
    NewTimer { instance: String::new(), name: name.to_owned(), version, due }
}

/// Calls `view` with an input, decoded.
fn with_input<E: EventSet, T>(
    input: &RecordedInput,
    view: impl FnOnce(Input<'_, E>, Option<&RecordedEvent>) -> T,
) -> Result<T, String> {
    Ok(match &input.source {
        Source::Event(trigger) => {
            let recorded = trigger.recorded(input.id)?;
            let event = recorded.decode::<E>().map_err(|error| error.to_string())?;
            view(Input::Event(&event), Some(&recorded))
        }
        Source::Done { effect, reply } => view(Input::Done { effect, reply: Reply { encoded: reply } }, None),
        Source::Rejected { effect, message, details } => {
            view(Input::Rejected { effect, rejection: Rejection { message, encoded: details } }, None)
        }
        Source::Due { timer } => view(Input::Due { timer }, None),
    })
}

impl<P: Process> fmt::Debug for Instance<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Instance").field("record", &self.record).finish_non_exhaustive()
    }
}
