//! One command on its way to other nodes: whom to ask next, and what may be said to its caller.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use ractor::concurrency::{OneshotReceiver, OneshotSender, oneshot};
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use uuid::Uuid;

use super::Shared;
use super::calls::{Ear, Heard};
use super::link::{Link, Others};
use super::presence::Candidate;
use super::serve::{deadline as frame_deadline, take};
use crate::bus::OpenLine;
use crate::codec::to_cbor;
use crate::command::envelope::Deadline;
use crate::command::wire::{Answered, Code, CommandFrame, Failure, Kind, Outcome, Reply, Says};

/// Room for what is around a command's content.
const HEADROOM: usize = 1_024;

type Accepted = Result<(), Failure>;
type Ended = (Outcome, Duration);

/// Sends a command around until somebody has answered it. Goes on without anybody who waits.
pub(super) fn attempts(
    shared: Arc<Shared>,
    frame: CommandFrame,
    assign: Deadline,
    deadline: Deadline,
    place: OwnedSemaphorePermit,
) -> (OneshotReceiver<Accepted>, OneshotReceiver<Ended>) {
    let (accepted, is_accepted) = oneshot();
    let (done, is_done) = oneshot();
    let attempts = Attempts {
        ear: shared.calls.ear(),
        link: shared.link.subscribe(),
        frame,
        assign,
        deadline,
        tried: HashSet::new(),
        asked: Vec::new(),
        unanswered: BTreeMap::new(),
        refusal: None,
        accepted: Some(accepted),
        shared,
    };
    tokio::spawn(async move {
        let started = Instant::now();
        let (accepted, outcome, runtime) = attempts.run().await;
        if let Some(accepted) = accepted {
            let _ = accepted.send(match &outcome {
                Outcome::Error(failure) if !failure.is_answer() => Err(failure.clone()),
                _ => Ok(()),
            });
        }
        if let Err((Outcome::Error(failure), _)) = done.send((outcome, runtime.unwrap_or(started.elapsed())))
        {
            tracing::warn!(?failure, "a command failed, and nobody waited for its answer");
        }
        drop(place);
    });
    (is_accepted, is_done)
}

struct Attempts {
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
    /// Who may have the command and has not said what became of it, and why that is so.
    unanswered: BTreeMap<Uuid, String>,
    /// What was said by the last one that did not take it.
    refusal: Option<Failure>,
    /// Told once, when somebody has accepted it.
    accepted: Option<OneshotSender<Accepted>>,
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

impl Attempts {
    async fn run(mut self) -> (Option<OneshotSender<Accepted>>, Outcome, Option<Duration>) {
        let answered = loop {
            if self.deadline.is_over() {
                break Err(self.give_up("there was no answer in time"));
            }
            if self.accepted.is_some() && self.assign.is_over() {
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
                    self.wait().await;
                    Attempt::Next
                }
            };
            match attempt {
                Attempt::Answered(answered) => break Ok(answered),
                Attempt::Next | Attempt::Again => {}
            }
        };
        let (outcome, runtime) = match answered {
            Ok(Answered { outcome, runtime }) => {
                (self.certain(outcome), Some(Duration::from_micros(runtime)))
            }
            Err(failure) => (Outcome::Error(failure), None),
        };
        (self.accepted, outcome, runtime)
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

    /// Nobody to ask right now: waits until something is different, for a while.
    async fn wait(&mut self) {
        let mut news = self.shared.table.watch();
        let until = self.deadline.instant().min(Instant::now() + self.shared.beat);
        tokio::select! {
            _ = news.changed() => {}
            _ = self.link.changed() => {}
            () = sleep_until(until) => {}
        }
        // Others may have waited for the same.
        sleep(Duration::from_millis(5)).await;
    }

    /// This node's turn.
    async fn here(&mut self, own: Candidate) -> Attempt {
        self.tried.insert(own.incarnation);
        let deadline = frame_deadline(&self.frame);
        let started = Instant::now();
        match take(&self.shared, self.frame.clone(), deadline).await {
            Ok(answer) => {
                self.is_accepted();
                match timeout_at(self.deadline.instant(), answer).await {
                    Ok(outcome) => {
                        self.unanswered.remove(&own.incarnation);
                        let runtime = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
                        Attempt::Answered(Answered { runtime, outcome })
                    }
                    Err(_) => {
                        self.unanswered.insert(own.incarnation, "this node did not finish in time".into());
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

    /// Asks another node, and waits for what it says.
    async fn ask(
        &mut self,
        candidate: Candidate,
        line: &OpenLine,
        inbox: &str,
        session: u64,
    ) -> Result<Attempt, Failure> {
        let attempt = self.send(&candidate, line, inbox).await?;
        let Some(attempt) = attempt else { return Ok(Attempt::Next) };
        let mut silent_at = Instant::now() + self.shared.beat * 2;
        loop {
            let until = match self.accepted {
                Some(_) => self.assign.instant().min(self.deadline.instant()),
                None => self.deadline.instant(),
            };
            let (of, heard) = tokio::select! {
                heard = self.ear.hear() => heard,
                () = sleep_until(silent_at.min(until)) => {
                    self.tried.insert(candidate.incarnation);
                    let reason = format!("{} fell silent", candidate.node);
                    self.unanswered.insert(candidate.incarnation, reason);
                    return Ok(Attempt::Next);
                }
                link = self.link.wait_for(|link| link.session().is_some_and(|now| now != session)) => {
                    drop(link);
                    let reason = format!("the connection was lost while {} had it", candidate.node);
                    self.unanswered.insert(candidate.incarnation, reason);
                    return Ok(Attempt::Again);
                }
            };
            let current = of == attempt;
            match heard {
                Heard::Nobody if current => {
                    self.shared.table.gone(candidate.incarnation);
                    self.tried.insert(candidate.incarnation);
                    return Ok(Attempt::Next);
                }
                Heard::Nobody => {}
                Heard::Reply(Reply { incarnation, says, .. }) => {
                    // Only whoever was asked may answer.
                    let asked = usize::try_from(of).ok().and_then(|of| self.asked.get(of.checked_sub(1)?));
                    if asked.is_none_or(|asked| asked.incarnation != incarnation) {
                        continue;
                    }
                    match says {
                        Says::Executed(answered) => {
                            self.unanswered.remove(&incarnation);
                            return Ok(Attempt::Answered(answered));
                        }
                        Says::Refused(refusal) if current => {
                            self.tried.insert(candidate.incarnation);
                            self.refusal = Some(refusal);
                            return Ok(Attempt::Next);
                        }
                        Says::Accepted | Says::Alive if current => {
                            self.is_accepted();
                            silent_at = Instant::now() + self.shared.silence();
                        }
                        Says::Refused(_) | Says::Accepted | Says::Alive => {}
                    }
                }
            }
        }
    }

    /// Sends the command. Its number, if it was handed over at all.
    async fn send(
        &mut self,
        candidate: &Candidate,
        line: &OpenLine,
        inbox: &str,
    ) -> Result<Option<u32>, Failure> {
        let attempt = u32::try_from(self.asked.len() + 1).unwrap_or(u32::MAX);
        self.frame.attempt = attempt;
        let encoded = to_cbor(&self.frame).map_err(|error| Failure::new(Code::Failed, error.to_string()))?;
        let limit = line.client().server_info().max_payload.saturating_sub(HEADROOM);
        if encoded.len() > limit {
            let reason = format!(
                "the command has {} bytes, and a message on this NATS server at most {limit}",
                encoded.len()
            );
            return Err(Failure::new(Code::Failed, reason));
        }
        // While it is down, async-nats would keep the command and send it whenever it comes back.
        if let Err(error) = line.check() {
            if self.unanswered.is_empty() {
                return Err(Failure::new(Code::Unavailable, error.to_string()));
            }
            self.wait().await;
            return Ok(None);
        }
        self.asked.push(candidate.clone());
        let reply = format!("{inbox}.{}", self.ear.token(attempt));
        let subject = self.shared.subjects.node(candidate.incarnation);
        let published = line.client().publish_with_reply(subject, reply, encoded.into()).await;
        match published {
            Ok(()) => Ok(Some(attempt)),
            Err(error) => {
                self.refusal = Some(Failure::new(Code::Unavailable, error.to_string()));
                self.tried.insert(candidate.incarnation);
                Ok(None)
            }
        }
    }

    fn is_accepted(&mut self) {
        if let Some(accepted) = self.accepted.take() {
            // Only who has dispatched the command waits for this.
            let _ = accepted.send(Ok(()));
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

    /// What may be said of an answer. That nothing happened is not certain while somebody else has the command, too: an
    /// aggregate's refusal leaves no trace that would stop them. A handler's is recorded, and binds everybody.
    fn certain(&self, outcome: Outcome) -> Outcome {
        match outcome {
            Outcome::Error(failure)
                if self.frame.kind == Kind::Aggregate
                    && !failure.is_unknown()
                    && !self.unanswered.is_empty() =>
            {
                let reason =
                    format!("{}, and another node answered: {}", self.who_is_silent(), failure.message);
                Outcome::Error(Failure::new(Code::OutcomeUnknown, reason))
            }
            outcome => outcome,
        }
    }
}
