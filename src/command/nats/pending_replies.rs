//! Pending replies: the commands of this node that wait for an answer of another node.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::mpsc;

use crate::command::wire::Reply;

/// Maximum number of queued replies to one command.
///
/// More arrive only after the caller stops reading.
const REPLIES: usize = 32;

/// A message that arrived for an attempt.
#[derive(Debug)]
pub(super) enum ReplyEvent {
    /// No responder at the subject: the command was not delivered.
    NoResponders,
    /// A reply. Boxed, because a channel allocates its slots at its creation.
    Reply(Box<Reply>),
}

/// The map from reply tokens to waiting commands. The limit of commands in flight bounds it.
#[derive(Debug, Clone)]
pub(super) struct PendingReplies(Arc<Mutex<Waiting>>);

#[derive(Debug)]
struct Waiting {
    last: u64,
    by_token: HashMap<u64, (u32, mpsc::Sender<(u32, ReplyEvent)>)>,
}

/// The receiver of the replies to all attempts of one command.
#[derive(Debug)]
pub(super) struct ReplyReceiver {
    calls: PendingReplies,
    sender: mpsc::Sender<(u32, ReplyEvent)>,
    receiver: mpsc::Receiver<(u32, ReplyEvent)>,
    tokens: Vec<u64>,
}

impl PendingReplies {
    pub(super) fn new() -> Self {
        Self(Arc::new(Mutex::new(Waiting { last: 0, by_token: HashMap::new() })))
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn replies(&self) -> ReplyReceiver {
        let (sender, receiver) = mpsc::channel(REPLIES);
        ReplyReceiver { calls: self.clone(), sender, receiver, tokens: Vec::new() }
    }

    /// Delivers a message for `token`. Drops it if no command waits for it.
    pub(super) fn deliver(&self, token: u64, event: ReplyEvent) {
        if let Some((attempt, sender)) = self.waiting().by_token.get(&token) {
            // The channel is full only if it holds the answer, or if the receiver no longer reads.
            let _ = sender.try_send((*attempt, event));
        }
    }
}

impl ReplyReceiver {
    /// Creates a token for the replies to an attempt.
    pub(super) fn token(&mut self, attempt: u32) -> u64 {
        let mut waiting = self.calls.waiting();
        waiting.last += 1;
        let token = waiting.last;
        waiting.by_token.insert(token, (attempt, self.sender.clone()));
        self.tokens.push(token);
        token
    }

    /// Receives the next message and the number of its attempt. Cancel-safe.
    pub(super) async fn recv(&mut self) -> (u32, ReplyEvent) {
        match self.receiver.recv().await {
            Some(event) => event,
            // `self` holds a sender, so the channel does not close.
            None => std::future::pending().await,
        }
    }
}

impl Drop for ReplyReceiver {
    fn drop(&mut self) {
        let mut waiting = self.calls.waiting();
        for token in &self.tokens {
            waiting.by_token.remove(token);
        }
    }
}
