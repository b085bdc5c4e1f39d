//! The commands of this node that wait for an answer of another.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::mpsc;

use crate::command::wire::Reply;

/// How many replies to one command may wait to be looked at. More than this only come when nobody looks any more.
const REPLIES: usize = 32;

/// What came back for an attempt.
#[derive(Debug)]
pub(super) enum Heard {
    /// Nobody listens there: nothing was delivered.
    Nobody,
    /// Boxed: a channel has room for many from the start.
    Reply(Box<Reply>),
}

/// Who waits for which reply. Bounded by the commands that may be under way.
#[derive(Debug, Clone)]
pub(super) struct Calls(Arc<Mutex<Waiting>>);

#[derive(Debug)]
struct Waiting {
    last: u64,
    by_token: HashMap<u64, (u32, mpsc::Sender<(u32, Heard)>)>,
}

/// One command's ear: hears what comes back for any of its attempts.
#[derive(Debug)]
pub(super) struct Ear {
    calls: Calls,
    sender: mpsc::Sender<(u32, Heard)>,
    receiver: mpsc::Receiver<(u32, Heard)>,
    tokens: Vec<u64>,
}

impl Calls {
    pub(super) fn new() -> Self {
        Self(Arc::new(Mutex::new(Waiting { last: 0, by_token: HashMap::new() })))
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn ear(&self) -> Ear {
        let (sender, receiver) = mpsc::channel(REPLIES);
        Ear { calls: self.clone(), sender, receiver, tokens: Vec::new() }
    }

    /// Passes on what came for `token`; what nobody waits for any more is dropped.
    pub(super) fn deliver(&self, token: u64, heard: Heard) {
        if let Some((attempt, sender)) = self.waiting().by_token.get(&token) {
            // Full only when the answer is among what waits, or nobody looks any more.
            let _ = sender.try_send((*attempt, heard));
        }
    }
}

impl Ear {
    /// A new token, for the replies to an attempt.
    pub(super) fn token(&mut self, attempt: u32) -> u64 {
        let mut waiting = self.calls.waiting();
        waiting.last += 1;
        let token = waiting.last;
        waiting.by_token.insert(token, (attempt, self.sender.clone()));
        self.tokens.push(token);
        token
    }

    /// What came next, and for which attempt. Cancel-safe.
    pub(super) async fn hear(&mut self) -> (u32, Heard) {
        match self.receiver.recv().await {
            Some(heard) => heard,
            // There is a sender in `self`.
            None => std::future::pending().await,
        }
    }
}

impl Drop for Ear {
    fn drop(&mut self) {
        let mut waiting = self.calls.waiting();
        for token in &self.tokens {
            waiting.by_token.remove(token);
        }
    }
}
