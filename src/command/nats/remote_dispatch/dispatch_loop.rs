//! The loop of a dispatch: it chooses a node, runs the attempt and judges the answer.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ractor::concurrency::OneshotSender;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use uuid::Uuid;

use crate::command::envelope::Deadline;
use crate::command::nats::cluster_link::{ClusterLink, PeerDiscovery};
use crate::command::nats::peer_table::Candidate;
use crate::command::nats::pending_replies::{ReplyEvent, ReplyReceiver};
use crate::command::nats::server::take;
use crate::command::nats::shared::Shared;
use crate::command::wire::{Answered, Code, CommandFrame, Failure, Kind, Outcome, Reply, ReplyKind};

/// The acceptance of a command, or the reason why no node accepted it.
pub(super) type Accepted = Result<(), Failure>;

/// The loop over the nodes that can execute a command.
pub(super) struct DispatchLoop {
    pub(super) shared: Arc<Shared>,
    pub(super) frame: CommandFrame,
    /// Time until which a node must accept the command.
    pub(super) assign: Deadline,
    pub(super) deadline: Deadline,
    pub(super) replies: ReplyReceiver,
    pub(super) link: watch::Receiver<ClusterLink>,
    /// Nodes excluded in this round.
    pub(super) excluded: HashSet<Uuid>,
    /// Node of each attempt, in order.
    pub(super) attempts: Vec<Candidate>,
    /// Unresolved attempts and their causes, by number. This node's own attempt has number 0.
    ///
    /// These attempts may still execute the command. One node can have several of them: a reply to
    /// one says nothing about the others.
    pub(super) unresolved: BTreeMap<u32, String>,
    /// Refusal of the last node that did not accept the command.
    pub(super) refusal: Option<Failure>,
    /// Whether a node has accepted the command.
    pub(super) accepted: bool,
    /// Channel that reports the acceptance once.
    pub(super) on_accept: Option<OneshotSender<Accepted>>,
}

/// The end of an attempt.
pub(super) enum Attempt {
    /// The node answered.
    Answered(Answered),
    /// The node did not answer: try the next one.
    Next,
    /// The connection was lost and is back: send the command to the same node again.
    Retry,
}

impl DispatchLoop {
    pub(super) async fn run(&mut self) -> (Outcome, Option<Duration>) {
        let answered = loop {
            if self.shared.ended.load(Ordering::Acquire) {
                break Err(self.give_up("this node has stopped"));
            }
            if self.deadline.is_over() {
                break Err(self.give_up("no answer before the deadline"));
            }
            if !self.accepted && self.assign.is_over() {
                break Err(self.give_up("no node accepted the command in time"));
            }
            let link = self.link.borrow_and_update().clone();
            let candidate =
                self.candidates(&link).into_iter().find(|one| !self.excluded.contains(&one.incarnation));
            let attempt = match (candidate, link) {
                (Some(own), _) if own.incarnation == self.shared.incarnation => self.here(own).await,
                (Some(candidate), ClusterLink::Up { connection, inbox, session, .. }) => {
                    match self.ask(candidate, &connection, &inbox, session).await {
                        Ok(attempt) => attempt,
                        Err(failure) => break Err(failure),
                    }
                }
                // Keep nothing for later. A command that was not sent fails now. For a sent
                // command, wait for the reconnect and ask again.
                (_, ClusterLink::Down { reason }) if self.unresolved.is_empty() => {
                    break Err(Failure::new(Code::Unavailable, reason));
                }
                (None, ClusterLink::Up { others: PeerDiscovery::Known, .. })
                    if self.unresolved.is_empty() =>
                {
                    break Err(self
                        .refusal
                        .take()
                        .unwrap_or_else(|| Failure::new(Code::NoHandler, "no node handles the command")));
                }
                _ => {
                    self.excluded.clear();
                    self.wait().await
                }
            };
            match attempt {
                Attempt::Answered(answered) => break Ok(answered),
                Attempt::Next | Attempt::Retry => {}
            }
        };
        match answered {
            Ok(Answered { outcome, runtime }) => {
                (self.downgrade_if_uncertain(outcome), Some(Duration::from_micros(runtime)))
            }
            Err(failure) => (Outcome::Error(failure), None),
        }
    }

    fn candidates(&self, link: &ClusterLink) -> Vec<Candidate> {
        let shared = &self.shared;
        let able = shared
            .registry
            .upgrade()
            .is_some_and(|registry| registry.endpoint(self.frame.kind, &self.frame.name).is_some());
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
            ClusterLink::Up { .. } => {
                shared.table.candidates(self.frame.kind, &self.frame.name, key, own, shared.silence())
            }
            ClusterLink::Down { .. } => own
                .map(|(node, incarnation)| Candidate { node: node.into(), incarnation })
                .into_iter()
                .collect(),
        }
    }

    /// Waits while there is no candidate.
    ///
    /// Ends after a change of the nodes or of the connection, an answer to an earlier attempt, or
    /// one heartbeat.
    pub(super) async fn wait(&mut self) -> Attempt {
        let mut news = self.shared.table.watch();
        let until = self.deadline.instant().min(Instant::now() + self.shared.beat);
        tokio::select! {
            (of, event) = self.replies.recv() => {
                if let ReplyEvent::Reply(reply) = event
                    && let Reply { incarnation, says: ReplyKind::Executed(answered), .. } = *reply
                    && self.was_asked(of, incarnation)
                {
                    self.unresolved.remove(&of);
                    return Attempt::Answered(answered);
                }
            }
            _ = news.changed() => {}
            _ = self.link.changed() => {}
            () = sleep_until(until) => {}
        }
        // Other commands may have waited for the same change: pause before the next attempt.
        sleep(Duration::from_millis(5)).await;
        Attempt::Next
    }

    /// Returns whether the attempt was sent to this node. Only its reply counts.
    pub(super) fn was_asked(&self, attempt: u32, incarnation: Uuid) -> bool {
        let asked = usize::try_from(attempt).ok().and_then(|of| self.attempts.get(of.checked_sub(1)?));
        asked.is_some_and(|asked| asked.incarnation == incarnation)
    }

    /// Returns the time until which the current attempt may last.
    pub(super) fn until(&self) -> Instant {
        match self.accepted {
            false => self.assign.instant().min(self.deadline.instant()),
            true => self.deadline.instant(),
        }
    }

    /// Runs the command on this node.
    async fn here(&mut self, own: Candidate) -> Attempt {
        self.excluded.insert(own.incarnation);
        let (deadline, started) = (self.deadline, Instant::now());
        match take(&self.shared, self.frame.clone(), deadline, deadline.instant()).await {
            Ok(answer) => {
                self.is_accepted();
                match timeout_at(self.deadline.instant(), answer).await {
                    Ok(outcome) => {
                        self.unresolved.remove(&0);
                        let runtime = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
                        Attempt::Answered(Answered { runtime, outcome })
                    }
                    Err(_) => {
                        self.unresolved.insert(0, "this node did not finish before the deadline".into());
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

    pub(super) fn is_accepted(&mut self) {
        self.accepted = true;
        if let Some(on_accept) = self.on_accept.take() {
            // A failed send means that the caller has stopped waiting.
            let _ = on_accept.send(Ok(()));
        }
    }

    /// Ends the dispatch, with `OutcomeUnknown` if an attempt is unresolved.
    pub(super) fn give_up(&mut self, reason: &str) -> Failure {
        if self.unresolved.is_empty() {
            let message = self.refusal.take().map(|refusal| refusal.message);
            let reason = message
                .map_or_else(|| reason.to_owned(), |message| format!("{reason}; last refusal: {message}"));
            return Failure::new(Code::Unavailable, reason);
        }
        Failure::new(Code::OutcomeUnknown, format!("{reason}: {}", self.who_is_silent()))
    }

    fn who_is_silent(&self) -> String {
        self.unresolved.values().map(String::as_str).collect::<Vec<_>>().join(", ")
    }

    /// Downgrades an answer to `OutcomeUnknown` while an attempt on another node is unresolved.
    ///
    /// A rejection by an aggregate and a decision without events leave no trace. The other node may
    /// therefore still execute the command. The recorded outcome of a handler binds all nodes; its
    /// other failures do not.
    fn downgrade_if_uncertain(&self, outcome: Outcome) -> Outcome {
        let aggregate = self.frame.kind == Kind::Aggregate;
        let answer = match &outcome {
            _ if self.unresolved.is_empty() => None,
            Outcome::Done(done) => (aggregate && done.events == 0).then(|| "no events".to_owned()),
            Outcome::Error(failure) if failure.is_unknown() => None,
            Outcome::Error(failure) if !aggregate && failure.code == Code::Rejected => None,
            Outcome::Error(failure) => Some(failure.message.clone()),
        };
        match answer {
            Some(answer) => {
                let reason = format!("{}; another node answered: {answer}", self.who_is_silent());
                Outcome::Error(Failure::new(Code::OutcomeUnknown, reason))
            }
            None => outcome,
        }
    }
}
