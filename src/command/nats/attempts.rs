//! One command on its way to other nodes: whom to ask next, and what may be said to its caller.

mod ask;

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ractor::concurrency::{OneshotReceiver, OneshotSender, oneshot};
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use uuid::Uuid;

use super::Shared;
use super::calls::{Ear, Heard};
use super::link::{Link, Others};
use super::presence::Candidate;
use super::serve::take;
use crate::command::envelope::Deadline;
use crate::command::wire::{Answered, Code, CommandFrame, Failure, Kind, Outcome, Reply, Says};

type Accepted = Result<(), Failure>;
type Ended = (Outcome, Duration);

/// A command that is sent around until somebody has answered it.
pub(super) struct Attempts {
    inner: Pursuit,
    place: OwnedSemaphorePermit,
}

impl Attempts {
    pub(super) fn new(
        shared: Arc<Shared>,
        frame: CommandFrame,
        assign: Deadline,
        deadline: Deadline,
        place: OwnedSemaphorePermit,
    ) -> Self {
        let inner = Pursuit {
            ear: shared.calls.ear(),
            link: shared.link.subscribe(),
            frame,
            assign,
            deadline,
            tried: HashSet::new(),
            asked: Vec::new(),
            unanswered: BTreeMap::new(),
            refusal: None,
            accepted: false,
            tell: None,
            shared,
        };
        Self { inner, place }
    }

    /// Sends it around for as long as somebody waits.
    pub(super) async fn run(mut self) -> Ended {
        let started = Instant::now();
        let (outcome, runtime) = self.inner.run().await;
        drop(self.place);
        (outcome, runtime.unwrap_or(started.elapsed()))
    }

    /// Sends it around on its own: told when somebody has accepted it, or nobody will, and when it is over.
    pub(super) fn spawn(mut self) -> (OneshotReceiver<Accepted>, OneshotReceiver<Ended>) {
        let (tell, is_accepted) = oneshot();
        let (done, is_done) = oneshot();
        self.inner.tell = Some(tell);
        tokio::spawn(async move {
            let started = Instant::now();
            let (outcome, runtime) = self.inner.run().await;
            if let Some(tell) = self.inner.tell.take() {
                let _ = tell.send(match &outcome {
                    Outcome::Error(failure) if !failure.is_answer() => Err(failure.clone()),
                    _ => Ok(()),
                });
            }
            if let Err((Outcome::Error(failure), _)) =
                done.send((outcome, runtime.unwrap_or(started.elapsed())))
            {
                tracing::warn!(?failure, "command failed after its caller stopped waiting");
            }
            drop(self.place);
        });
        (is_accepted, is_done)
    }
}

struct Pursuit {
    shared: Arc<Shared>,
    frame: CommandFrame,
    /// Until when somebody must have accepted it.
    assign: Deadline,
    deadline: Deadline,
    ear: Ear,
    link: watch::Receiver<Link>,
    /// Who was asked in this round and is of no use.
    tried: HashSet<Uuid>,
    /// Who was asked, by attempt.
    asked: Vec<Candidate>,
    /// Which attempts may be under way with nobody having said what became of them, by number (this node's own: 0), and why that
    /// is so. Also of one node: it works on several at once, and what it says of one says nothing of the others.
    unanswered: BTreeMap<u32, String>,
    /// What was said by the last one that did not take it.
    refusal: Option<Failure>,
    /// Whether somebody has accepted it.
    accepted: bool,
    /// Who wants to know that, once.
    tell: Option<OneshotSender<Accepted>>,
}

/// How an attempt ended.
enum Attempt {
    /// With an answer.
    Answered(Answered),
    /// Another one may do better.
    Next,
    /// The connection was lost and is back: the same one is asked again.
    Again,
}

impl Pursuit {
    async fn run(&mut self) -> (Outcome, Option<Duration>) {
        let answered = loop {
            if self.shared.ended.load(Ordering::Acquire) {
                break Err(self.give_up("this node has ended"));
            }
            if self.deadline.is_over() {
                break Err(self.give_up("there was no answer in time"));
            }
            if !self.accepted && self.assign.is_over() {
                break Err(self.give_up("nobody took it in time"));
            }
            let link = self.link.borrow_and_update().clone();
            let candidate =
                self.candidates(&link).into_iter().find(|one| !self.tried.contains(&one.incarnation));
            let attempt = match (candidate, link) {
                (Some(own), _) if own.incarnation == self.shared.incarnation => self.here(own).await,
                (Some(candidate), Link::Up { line, inbox, session, .. }) => {
                    match self.ask(candidate, &line, &inbox, session).await {
                        Ok(attempt) => attempt,
                        Err(failure) => break Err(failure),
                    }
                }
                // Nothing is kept for later: what was not sent is over, what was is asked for when there is a way.
                (_, Link::Down { reason }) if self.unanswered.is_empty() => {
                    break Err(Failure::new(Code::Unavailable, reason));
                }
                (None, Link::Up { others: Others::Known, .. }) if self.unanswered.is_empty() => {
                    break Err(self
                        .refusal
                        .take()
                        .unwrap_or_else(|| Failure::new(Code::NoHandler, "no node handles it")));
                }
                _ => {
                    self.tried.clear();
                    self.wait().await
                }
            };
            match attempt {
                Attempt::Answered(answered) => break Ok(answered),
                Attempt::Next | Attempt::Again => {}
            }
        };
        match answered {
            Ok(Answered { outcome, runtime }) => {
                (self.certain(outcome), Some(Duration::from_micros(runtime)))
            }
            Err(failure) => (Outcome::Error(failure), None),
        }
    }

    fn candidates(&self, link: &Link) -> Vec<Candidate> {
        let shared = &self.shared;
        let able = shared.commands.upgrade().is_some_and(|commands| {
            commands.registry().endpoint(self.frame.kind, &self.frame.name).is_some()
        });
        let own = able.then_some((shared.name.as_str(), shared.incarnation));
        let id;
        let key = match &self.frame.key {
            Some(key) => key,
            None => {
                id = self.frame.id.to_string();
                &id
            }
        };
        match link {
            Link::Up { .. } => {
                shared.table.candidates(self.frame.kind, &self.frame.name, key, own, shared.silence())
            }
            Link::Down { .. } => own
                .map(|(node, incarnation)| Candidate { node: node.into(), incarnation })
                .into_iter()
                .collect(),
        }
    }

    /// Nobody to ask right now: waits until something is different, or one who was asked before answers, for a while.
    async fn wait(&mut self) -> Attempt {
        let mut news = self.shared.table.watch();
        let until = self.deadline.instant().min(Instant::now() + self.shared.beat);
        tokio::select! {
            (of, heard) = self.ear.hear() => {
                if let Heard::Reply(reply) = heard
                    && let Reply { incarnation, says: Says::Executed(answered), .. } = *reply
                    && self.was_asked(of, incarnation)
                {
                    self.unanswered.remove(&of);
                    return Attempt::Answered(answered);
                }
            }
            _ = news.changed() => {}
            _ = self.link.changed() => {}
            () = sleep_until(until) => {}
        }
        // Others may have waited for the same.
        sleep(Duration::from_millis(5)).await;
        Attempt::Next
    }

    /// Whether that attempt was that node's: only whoever was asked may answer.
    fn was_asked(&self, attempt: u32, incarnation: Uuid) -> bool {
        let asked = usize::try_from(attempt).ok().and_then(|of| self.asked.get(of.checked_sub(1)?));
        asked.is_some_and(|asked| asked.incarnation == incarnation)
    }

    /// Until when one attempt may last.
    fn until(&self) -> Instant {
        match self.accepted {
            false => self.assign.instant().min(self.deadline.instant()),
            true => self.deadline.instant(),
        }
    }

    /// This node's turn.
    async fn here(&mut self, own: Candidate) -> Attempt {
        self.tried.insert(own.incarnation);
        let (deadline, started) = (self.deadline, Instant::now());
        match take(&self.shared, self.frame.clone(), deadline, deadline.instant()).await {
            Ok(answer) => {
                self.is_accepted();
                match timeout_at(self.deadline.instant(), answer).await {
                    Ok(outcome) => {
                        self.unanswered.remove(&0);
                        let runtime = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
                        Attempt::Answered(Answered { runtime, outcome })
                    }
                    Err(_) => {
                        self.unanswered.insert(0, "this node did not finish in time".into());
                        Attempt::Next
                    }
                }
            }
            Err(refusal) => {
                self.refusal = Some(refusal);
                Attempt::Next
            }
        }
    }

    fn is_accepted(&mut self) {
        self.accepted = true;
        if let Some(tell) = self.tell.take() {
            // Who has gone away does not want to know.
            let _ = tell.send(Ok(()));
        }
    }

    /// No more attempts.
    fn give_up(&mut self, reason: &str) -> Failure {
        if self.unanswered.is_empty() {
            let said = self.refusal.take().map(|refusal| refusal.message);
            let reason =
                said.map_or_else(|| reason.to_owned(), |said| format!("{reason}; the last said: {said}"));
            return Failure::new(Code::Unavailable, reason);
        }
        Failure::new(Code::OutcomeUnknown, format!("{reason}: {}", self.who_is_silent()))
    }

    fn who_is_silent(&self) -> String {
        self.unanswered.values().map(String::as_str).collect::<Vec<_>>().join(", ")
    }

    /// What may be said of an answer. That nothing happened is not certain while somebody else has the command, too: neither
    /// an aggregate's refusal nor its having nothing to do leaves a trace that would stop them. What a handler answers is
    /// recorded and binds everybody, but not its other failures.
    fn certain(&self, outcome: Outcome) -> Outcome {
        let aggregate = self.frame.kind == Kind::Aggregate;
        let said = match &outcome {
            _ if self.unanswered.is_empty() => None,
            Outcome::Done(done) => {
                (aggregate && done.events == 0).then(|| "there was nothing to do".to_owned())
            }
            Outcome::Error(failure) if failure.is_unknown() => None,
            Outcome::Error(failure) if !aggregate && failure.code == Code::Rejected => None,
            Outcome::Error(failure) => Some(failure.message.clone()),
        };
        match said {
            Some(said) => {
                let reason = format!("{}, and another node answered: {said}", self.who_is_silent());
                Outcome::Error(Failure::new(Code::OutcomeUnknown, reason))
            }
            None => outcome,
        }
    }
}
