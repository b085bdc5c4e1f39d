//! Asynchronous errors of the server, matched with the work that they concern.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::bus::nats::subjects::Pattern;

/// Number of errors that are kept per session. The oldest are dropped first.
const KEPT: usize = 64;

/// Maximum length of a kept error text, in characters.
const LONGEST: usize = 500;

/// The server's errors in the current session of a connection.
#[derive(Debug)]
pub(super) struct ServerErrors {
    /// Prefix of this connection's inboxes, with the dot.
    inboxes: String,
    state: Mutex<State>,
    /// Number of errors so far, over all sessions.
    count: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    kept: VecDeque<Kept>,
}

#[derive(Debug)]
struct Kept {
    /// Number of the error, from 1.
    number: u64,
    sentence: String,
    /// Subject that the login may not use, if the error names one.
    subject: Option<String>,
}

impl ServerErrors {
    pub(super) fn new(inbox_prefix: &str) -> Self {
        Self { inboxes: format!("{inbox_prefix}."), state: Mutex::default(), count: watch::Sender::new(0) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an error.
    pub(super) fn add(&self, sentence: &str) {
        let subject = refused_subject(sentence).map(str::to_owned);
        let sentence = sentence.chars().take(LONGEST).collect();
        let mut state = self.state();
        let number = *self.count.borrow() + 1;
        if state.kept.len() >= KEPT {
            state.kept.pop_front();
        }
        state.kept.push_back(Kept { number, sentence, subject });
        self.count.send_replace(number);
    }

    /// Removes the errors of the last session.
    pub(super) fn clear(&self) {
        self.state().kept.clear();
    }

    /// Number of errors so far.
    pub(super) fn count(&self) -> u64 {
        *self.count.borrow()
    }

    /// The last error of this session.
    pub(super) fn last(&self) -> Option<String> {
        self.state().kept.back().map(|kept| kept.sentence.clone())
    }

    /// The kept errors after number `since`, oldest first.
    pub(super) fn after(&self, since: u64) -> Vec<String> {
        let state = self.state();
        state.kept.iter().filter(|kept| kept.number > since).map(|kept| kept.sentence.clone()).collect()
    }

    /// The first refusal after number `since` of one of `subjects` (patterns) or of an own inbox.
    pub(super) fn refusal(&self, since: u64, subjects: &[String]) -> Option<String> {
        let state = self.state();
        let concerns = |kept: &&Kept| {
            let Some(subject) = kept.subject.as_deref().filter(|_| kept.number > since) else { return false };
            subject.starts_with(&self.inboxes)
                || subjects.iter().any(|pattern| {
                    pattern == subject || Pattern::new(pattern).is_ok_and(|pattern| pattern.covers(subject))
                })
        };
        state.kept.iter().find(concerns).map(|kept| kept.sentence.clone())
    }

    /// The refusal of the inbox for the answers to all requests of a session.
    /// async-nats subscribes to it once, so no later request is answered either.
    pub(super) fn no_answers(&self) -> Option<String> {
        let state = self.state();
        let all = |subject: &String| subject.starts_with(&self.inboxes) && subject.ends_with(".*");
        state
            .kept
            .iter()
            .find(|kept| kept.subject.as_ref().is_some_and(all))
            .map(|kept| kept.sentence.clone())
    }

    /// Waits for a [`refusal`](Self::refusal). Cancel-safe.
    pub(super) async fn refused(&self, since: u64, subjects: &[String]) -> String {
        let mut count = self.count.subscribe();
        loop {
            count.mark_unchanged();
            if let Some(sentence) = self.refusal(since, subjects) {
                return sentence;
            }
            if count.changed().await.is_err() {
                // The sender is in `self`.
                std::future::pending::<()>().await;
            }
        }
    }
}

/// The subject in `Permissions Violation for Publish to "subject"`, or the same for a subscription.
fn refused_subject(sentence: &str) -> Option<&str> {
    let start = sentence.get(.."permissions violation".len())?;
    if !start.eq_ignore_ascii_case("permissions violation") {
        return None;
    }
    let (_, quoted) = sentence.split_once('"')?;
    quoted.split_once('"').map(|(subject, _)| subject)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_found_by_its_subject_and_errors_are_bounded() {
        let errors = ServerErrors::new("_INBOX");
        let find = |since, subject: &str| errors.refusal(since, &[subject.to_owned()]);
        errors.add("Permissions Violation for Publish to \"shop.events.order.placed\"");
        errors.add("Permissions Violation for Subscription to \"shop.head\" using queue \"q\"");
        errors.add("Maximum Payload Violation");
        assert!(find(0, "shop.events.>").is_some_and(|sentence| sentence.contains("order.placed")));
        assert!(find(1, "shop.events.>").is_none(), "an error from before");
        assert!(find(0, "shop.head").is_some() && find(0, "shop.hint").is_none());
        assert_eq!(errors.last().as_deref(), Some("Maximum Payload Violation"));
        errors.add("Permissions Violation for Subscription to \"_INBOX.x.*\"");
        assert!(find(3, "else").is_some(), "inboxes concern every request");
        (0..1_000).for_each(|_| errors.add(&"x".repeat(5_000)));
        let kept = errors.after(0);
        assert!(kept.len() == KEPT && kept.iter().all(|sentence| sentence.len() == LONGEST));
        assert_eq!(errors.count(), 1_004);
        errors.clear();
        assert_eq!((errors.last(), errors.count()), (None, 1_004));
    }
}
