//! What several callers ask for at the same time, in one call: as with appends, whoever comes while a call is under way waits
//! for the next one, which takes all who wait. There is no timer, and a lone caller never waits.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::{Mutex, PoisonError};

use tokio::sync::{Semaphore, oneshot};

use super::super::StoreError;

/// How many calls are under way at most. Two, as with appends: one is on its way while the server commits the other.
const CALLS: usize = 2;
/// How much one call takes at most: so many requests, …
const REQUESTS: usize = 512;
/// … and so many bytes of theirs, unless one alone has more.
const BYTES: usize = 1 << 20;

/// Requests of one kind.
#[derive(Debug)]
pub(super) struct Together<Q, A> {
    /// Not yet in a call. No more than there are callers.
    waiting: Mutex<VecDeque<Waiting<Q, A>>>,
    calls: Semaphore,
}

#[derive(Debug)]
struct Waiting<Q, A> {
    request: Q,
    bytes: usize,
    answer: oneshot::Sender<Result<A, StoreError>>,
}

impl<Q, A> Default for Together<Q, A> {
    fn default() -> Self {
        Self { waiting: Mutex::default(), calls: Semaphore::new(CALLS) }
    }
}

impl<Q: Clone, A> Together<Q, A> {
    /// Asks for `request`, which has so many `bytes`, with whatever else waits: in a `call` of this caller's or of another's,
    /// which gives an answer for each request. Dropped, it may have been asked for or not.
    pub(super) async fn ask<F, C>(&self, request: Q, bytes: usize, call: F) -> Result<A, StoreError>
    where
        F: Fn(Vec<Q>) -> C,
        C: Future<Output = Vec<Result<A, StoreError>>>,
    {
        loop {
            let (answer, mut answered) = oneshot::channel();
            self.waiting().push_back(Waiting { request: request.clone(), bytes, answer });
            let told = loop {
                let turn = tokio::select! {
                    biased;
                    told = &mut answered => break told,
                    turn = self.calls.acquire() => turn,
                };
                let batch = self.take();
                if batch.is_empty() {
                    // It is in the other call.
                    drop(turn);
                    break answered.await;
                }
                let (requests, callers): (Vec<_>, Vec<_>) = batch.into_iter().unzip();
                for (caller, answer) in callers.into_iter().zip(call(requests).await) {
                    // Who has gone away needs no answer.
                    let _ = caller.send(answer);
                }
            };
            if let Ok(answer) = told {
                return answer;
            }
            // Whoever made the call went away in the middle of it.
        }
    }

    #[allow(clippy::type_complexity, reason = "a request, and who gets the answer")]
    fn take(&self) -> Vec<(Q, oneshot::Sender<Result<A, StoreError>>)> {
        let (mut batch, mut size) = (Vec::new(), 0_usize);
        let mut waiting = self.waiting();
        while let Some(next) = waiting.front() {
            if !batch.is_empty() && (batch.len() == REQUESTS || size.saturating_add(next.bytes) > BYTES) {
                break;
            }
            size = size.saturating_add(next.bytes);
            // Those whose callers have gone away are left out.
            batch.extend(
                waiting.pop_front().filter(|it| !it.answer.is_closed()).map(|it| (it.request, it.answer)),
            );
        }
        batch
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, VecDeque<Waiting<Q, A>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use futures_util::future::join_all;
    use tokio::time::sleep;

    use super::*;

    type Numbers = Together<usize, usize>;

    /// Takes a while, and answers with twice the number.
    async fn twice(numbers: Vec<usize>, calls: &AtomicUsize) -> Vec<Result<usize, StoreError>> {
        calls.fetch_add(1, Ordering::Relaxed);
        sleep(Duration::from_millis(10)).await;
        numbers.into_iter().map(|number| Ok(2 * number)).collect()
    }

    #[tokio::test]
    async fn everybody_gets_the_own_answer_out_of_few_calls() {
        let (together, calls) = (Numbers::default(), AtomicUsize::new(0));
        let ask = |number| together.ask(number, 1, |numbers| twice(numbers, &calls));
        for (number, answer) in join_all((0..100).map(ask)).await.into_iter().enumerate() {
            assert_eq!(answer.unwrap(), 2 * number);
        }
        // The first, the second, and all who came meanwhile.
        assert!(calls.load(Ordering::Relaxed) <= 3, "{calls:?}");
    }

    #[tokio::test]
    async fn a_call_is_bounded() {
        let together = Numbers::default();
        let ask = |number| {
            together.ask(number, BYTES / 4, |numbers| async move {
                assert!(numbers.len() <= 4);
                sleep(Duration::from_millis(1)).await;
                numbers.into_iter().map(Ok).collect()
            })
        };
        assert!(join_all((0..30).map(ask)).await.into_iter().all(|answer| answer.is_ok()));
        assert!(
            together
                .ask(1, usize::MAX, |numbers| async { numbers.into_iter().map(Ok).collect() })
                .await
                .is_ok()
        );
    }

    /// Callers that go away, in the middle of the calls that they make for others, leave nobody without an answer.
    #[tokio::test]
    async fn who_makes_the_call_may_go_away() {
        let (together, calls) = (Arc::new(Numbers::default()), Arc::new(AtomicUsize::new(0)));
        let tasks: Vec<_> = (0..200)
            .map(|number| {
                let (together, calls) = (together.clone(), calls.clone());
                tokio::spawn(async move { together.ask(number, 1, |numbers| twice(numbers, &calls)).await })
            })
            .collect();
        for task in tasks.iter().step_by(2) {
            tokio::time::sleep(Duration::from_micros(100)).await;
            task.abort();
        }
        for (number, task) in tasks.into_iter().enumerate() {
            match task.await {
                Ok(answer) => assert_eq!(answer.unwrap(), 2 * number),
                Err(error) => assert!(error.is_cancelled() && number % 2 == 0),
            }
        }
        assert!(together.waiting().iter().all(|it| it.answer.is_closed()));
    }
}
