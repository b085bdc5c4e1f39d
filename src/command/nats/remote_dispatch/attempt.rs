//! One attempt: sends the command to a node and receives its replies.

use tokio::time::{Instant, sleep_until, timeout_at};

use super::dispatch_loop::{Attempt, DispatchLoop};
use crate::bus::CommandConnection;
use crate::codec::to_cbor;
use crate::command::nats::peer_table::Candidate;
use crate::command::nats::pending_replies::ReplyEvent;
use crate::command::wire::{Code, Failure, Reply, ReplyKind, Sent};

impl DispatchLoop {
    /// Sends the command to another node and waits for the end of the attempt.
    pub(super) async fn ask(
        &mut self,
        candidate: Candidate,
        connection: &CommandConnection,
        inbox: &str,
        session: u64,
    ) -> Result<Attempt, Failure> {
        // While the connection is down, async-nats would queue the command until the reconnect.
        if let Err(error) = connection.check() {
            if self.unresolved.is_empty() {
                return Err(Failure::new(Code::Unavailable, error.to_string()));
            }
            return Ok(self.wait().await);
        }
        let (since, subject) = (connection.errors(), self.shared.subjects.node(candidate.incarnation));
        let attempt = self.send(&candidate, connection, inbox).await?;
        let Some(attempt) = attempt else { return Ok(Attempt::Next) };
        let mut silent_at = Instant::now() + self.shared.beat * 2;
        loop {
            let until = self.until();
            let (of, event) = tokio::select! {
                event = self.replies.recv() => event,
                error = connection.refused("sending a command to another node", since, &subject) => {
                    // The server did not deliver the command: nothing happened on that node.
                    self.refusal = Some(Failure::new(Code::Unavailable, error.to_string()));
                    self.excluded.insert(candidate.incarnation);
                    return Ok(Attempt::Next);
                }
                () = sleep_until(silent_at.min(until)) => {
                    self.excluded.insert(candidate.incarnation);
                    let reason = format!("{} stopped replying", candidate.node);
                    self.unresolved.insert(attempt, reason);
                    return Ok(Attempt::Next);
                }
                link = self.link.wait_for(|link| link.session().is_some_and(|now| now != session)) => {
                    drop(link);
                    let reason = format!("connection lost while {} had the command", candidate.node);
                    self.unresolved.insert(attempt, reason);
                    return Ok(Attempt::Retry);
                }
            };
            let current = of == attempt;
            match event {
                ReplyEvent::NoResponders if current => {
                    self.shared.table.remove(candidate.incarnation);
                    self.excluded.insert(candidate.incarnation);
                    return Ok(Attempt::Next);
                }
                ReplyEvent::NoResponders => {}
                ReplyEvent::Reply(reply) => {
                    let Reply { incarnation, says, .. } = *reply;
                    if !self.was_asked(of, incarnation) {
                        continue;
                    }
                    match says {
                        ReplyKind::Executed(answered) => {
                            self.unresolved.remove(&of);
                            if !current {
                                let reason = format!("{} received the command too", candidate.node);
                                self.unresolved.insert(attempt, reason);
                            }
                            return Ok(Attempt::Answered(answered));
                        }
                        ReplyKind::Refused(refusal) if current => {
                            self.excluded.insert(candidate.incarnation);
                            self.refusal = Some(refusal);
                            return Ok(Attempt::Next);
                        }
                        ReplyKind::Accepted | ReplyKind::Alive if current => {
                            self.is_accepted();
                            silent_at = Instant::now() + self.shared.silence();
                        }
                        ReplyKind::Refused(_) | ReplyKind::Accepted | ReplyKind::Alive => {}
                    }
                }
            }
        }
    }

    /// Sends the command. Returns the number of the attempt if the connection took the message.
    async fn send(
        &mut self,
        candidate: &Candidate,
        connection: &CommandConnection,
        inbox: &str,
    ) -> Result<Option<u32>, Failure> {
        let attempt = u32::try_from(self.attempts.len() + 1).unwrap_or(u32::MAX);
        self.frame.attempt = attempt;
        self.frame.left = self.deadline.left_millis();
        self.frame.sent = Some(Sent { node: self.shared.incarnation, clock: self.shared.clock() });
        let encoded = to_cbor(&self.frame).map_err(|error| Failure::new(Code::Failed, error.to_string()))?;
        let (size, limit) = (encoded.len(), connection.client().max_payload());
        if size > limit {
            let reason =
                format!("command too large: {size} bytes exceed a NATS message (limit {limit} bytes)");
            if !self.unresolved.is_empty() {
                return Err(self.give_up(&reason));
            }
            let (size, number) = (size as u64, limit as u64);
            return Err(Failure { size, number, ..Failure::new(Code::CommandTooLarge, reason) });
        }
        self.attempts.push(candidate.clone());
        let reply = format!("{inbox}.{}", self.replies.token(attempt));
        let subject = self.shared.subjects.node(candidate.incarnation);
        // If the server stops reading, the connection's buffer fills and publishing blocks.
        let publishing = connection.client().publish_with_reply(subject, reply, encoded.into());
        let error = match timeout_at(self.until(), publishing).await {
            Ok(Ok(())) => return Ok(Some(attempt)),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "publishing the command timed out".to_owned(),
        };
        self.refusal = Some(Failure::new(Code::Unavailable, error));
        self.excluded.insert(candidate.incarnation);
        Ok(None)
    }
}
