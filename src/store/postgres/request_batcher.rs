//! Batches concurrent requests into one call.
//!
//! As with appends, requests that arrive while calls are in flight are queued for the next call,
//! which takes all of them. There is no timer, and a lone caller never waits.

use std::collections::VecDeque;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::FutureExt;
use tokio::sync::oneshot;

use super::super::StoreError;
use crate::panic::panic_text;

/// Maximum number of calls in flight.
///
/// Two, as with appends: one is in transit while the server commits the other.
const CALLS: usize = 2;
/// Maximum number of requests in a call.
const REQUESTS: usize = 512;
/// Maximum size of a call in bytes, unless a single request is larger.
const BYTES: usize = 1 << 20;

/// A batcher for requests of one kind.
#[derive(Debug)]
pub(super) struct RequestBatcher<Q, A> {
    queue: Mutex<Queue<Q, A>>,
}

#[derive(Debug)]
struct Queue<Q, A> {
    /// Requests that are not in a call yet; empty while no task calls.
    waiting: VecDeque<Waiting<Q, A>>,
    /// Number of calling tasks.
    ///
    /// Callers do not call themselves: a caller that is cancelled or has a short deadline would
    /// fail the requests of others.
    calling: usize,
}

#[derive(Debug)]
struct Waiting<Q, A> {
    request: Q,
    bytes: usize,
    answer: oneshot::Sender<Result<A, StoreError>>,
}

type Batch<Q, A> = (Vec<Q>, Vec<oneshot::Sender<Result<A, StoreError>>>);

impl<Q, A> Default for RequestBatcher<Q, A> {
    fn default() -> Self {
        Self { queue: Mutex::new(Queue { waiting: VecDeque::new(), calling: 0 }) }
    }
}

impl<Q, A> RequestBatcher<Q, A>
where
    Q: Send + 'static,
    A: Send + 'static,
{
    /// Submits `request`, which counts as `bytes` bytes, and waits for its result.
    ///
    /// The request goes out with all other queued requests, in this caller's `call` or another's.
    /// The call must end, with one result for each request. If the future is dropped, the request
    /// may or may not be sent.
    pub(super) async fn submit<F, C>(
        self: &Arc<Self>,
        request: Q,
        bytes: usize,
        call: F,
    ) -> Result<A, StoreError>
    where
        F: Fn(Vec<Q>) -> C + Send + Sync + 'static,
        C: Future<Output = Vec<Result<A, StoreError>>> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let task = {
            let mut queue = self.queue();
            queue.waiting.push_back(Waiting { request, bytes, answer });
            (queue.calling < CALLS).then(|| {
                queue.calling += 1;
                Calling { batcher: self.clone(), counts: true }
            })
        };
        if let Some(task) = task {
            tokio::spawn(task.run(call));
        }
        answered.await.unwrap_or_else(|_| {
            let reason = "the runtime that the call was made in has ended".into();
            Err(StoreError::Unavailable { reason, source: None })
        })
    }
}

impl<Q, A> RequestBatcher<Q, A> {
    fn queue(&self) -> MutexGuard<'_, Queue<Q, A>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A task that calls until the queue is empty.
struct Calling<Q, A> {
    batcher: Arc<RequestBatcher<Q, A>>,
    /// Whether the task counts in [`Queue::calling`].
    counts: bool,
}

impl<Q, A> Drop for Calling<Q, A> {
    fn drop(&mut self) {
        // The task is dropped with its runtime.
        if self.counts {
            let mut queue = self.batcher.queue();
            queue.calling -= 1;
            if queue.calling == 0 {
                queue.waiting.clear();
            }
        }
    }
}

impl<Q, A> Calling<Q, A> {
    async fn run<F, C>(mut self, call: F)
    where
        F: Fn(Vec<Q>) -> C,
        C: Future<Output = Vec<Result<A, StoreError>>>,
    {
        while let Some((requests, callers)) = self.take() {
            // A caller that is gone needs no answer.
            match AssertUnwindSafe(async { call(requests).await }).catch_unwind().await {
                Ok(answers) => {
                    for (caller, answer) in callers.into_iter().zip(answers) {
                        let _ = caller.send(answer);
                    }
                }
                Err(panic) => {
                    let reason = format!("a call to the store panicked: {}", panic_text(&*panic));
                    for caller in callers {
                        let _ = caller
                            .send(Err(StoreError::Unavailable { reason: reason.clone(), source: None }));
                    }
                }
            }
        }
    }

    /// Takes the requests of the next call.
    ///
    /// Returns `None` if the queue is empty; the task then no longer counts.
    fn take(&mut self) -> Option<Batch<Q, A>> {
        let (mut batch, mut size): (Batch<Q, A>, usize) = Default::default();
        let mut queue = self.batcher.queue();
        while let Some(next) = queue.waiting.front() {
            if !batch.0.is_empty() && (batch.0.len() == REQUESTS || size.saturating_add(next.bytes) > BYTES) {
                break;
            }
            let Some(next) = queue.waiting.pop_front() else { break };
            // Requests of callers that are gone are skipped.
            if !next.answer.is_closed() {
                size = size.saturating_add(next.bytes);
                batch.0.push(next.request);
                batch.1.push(next.answer);
            }
        }
        if batch.0.is_empty() {
            // In the same lock as the look at the queue: a later request starts a new task.
            queue.calling -= 1;
            self.counts = false;
            return None;
        }
        Some(batch)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use futures_util::future::join_all;
    use tokio::time::sleep;

    use super::*;

    type Numbers = RequestBatcher<usize, usize>;

    /// Returns a call that takes a while and answers with twice the number.
    fn twice(
        calls: &Arc<AtomicUsize>,
    ) -> impl Fn(Vec<usize>) -> futures_util::future::BoxFuture<'static, Vec<Result<usize, StoreError>>>
    + Send
    + Sync
    + use<> {
        let calls = calls.clone();
        move |numbers| {
            calls.fetch_add(1, Ordering::Relaxed);
            async move {
                sleep(Duration::from_millis(10)).await;
                numbers.into_iter().map(|number| Ok(2 * number)).collect()
            }
            .boxed()
        }
    }

    fn idle(batcher: &Numbers) -> bool {
        let queue = batcher.queue();
        queue.calling == 0 && queue.waiting.is_empty()
    }

    #[tokio::test]
    async fn callers_get_their_own_answers_from_few_calls() {
        let (batcher, calls) = (Arc::new(Numbers::default()), Arc::new(AtomicUsize::new(0)));
        for _ in 0..3 {
            let before = calls.load(Ordering::Relaxed);
            let answers = join_all((0..100).map(|number| batcher.submit(number, 1, twice(&calls)))).await;
            for (number, answer) in answers.into_iter().enumerate() {
                assert_eq!(answer.unwrap(), 2 * number);
            }
            // The first call, the second, and one for all requests that arrived meanwhile.
            assert!(calls.load(Ordering::Relaxed) <= before + 3, "{calls:?}");
            tokio::task::yield_now().await;
            assert!(idle(&batcher));
        }
    }

    #[tokio::test]
    async fn a_call_is_bounded() {
        let batcher = Arc::new(Numbers::default());
        let call = |numbers: Vec<usize>| async move {
            assert!(numbers.len() <= 4);
            sleep(Duration::from_millis(1)).await;
            numbers.into_iter().map(Ok).collect()
        };
        let answers = join_all((0..30).map(|number| batcher.submit(number, BYTES / 4, call))).await;
        assert!(answers.iter().all(Result::is_ok), "{answers:?}");
        assert!(batcher.submit(1, usize::MAX, call).await.is_ok());
    }

    #[tokio::test]
    async fn a_cancelled_caller_does_not_affect_others() {
        let (batcher, calls) = (Arc::new(Numbers::default()), Arc::new(AtomicUsize::new(0)));
        let asking: Vec<_> = (0..200)
            .map(|number| {
                let (batcher, call) = (batcher.clone(), twice(&calls));
                tokio::spawn(async move { batcher.submit(number, 1, call).await })
            })
            .collect();
        for task in asking.iter().step_by(2) {
            sleep(Duration::from_micros(100)).await;
            task.abort();
        }
        for (number, task) in asking.into_iter().enumerate() {
            match task.await {
                Ok(answer) => assert_eq!(answer.unwrap(), 2 * number),
                Err(error) => assert!(error.is_cancelled() && number % 2 == 0),
            }
        }
        sleep(Duration::from_millis(30)).await;
        assert!(idle(&batcher));
    }

    #[tokio::test]
    async fn a_panic_is_an_error_for_the_requests_of_the_call() {
        let batcher = Arc::new(Numbers::default());
        let call = |numbers: Vec<usize>| async move {
            assert!(numbers.iter().all(|number| *number < 10), "too much");
            numbers.into_iter().map(Ok).collect()
        };
        let error = batcher.submit(10, 1, call).await.unwrap_err();
        assert!(error.to_string().contains("too much"), "{error}");
        assert_eq!(batcher.submit(9, 1, call).await.unwrap(), 9);
    }

    /// Two tokio runtimes may share a store, and one of them may end.
    #[test]
    fn a_runtime_that_ends_leaves_no_caller_waiting() {
        let start =
            || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (one, other) = (start(), start());
        let batcher = Arc::new(Numbers::default());
        let never = |_| std::future::pending();
        for number in 0..CALLS {
            let batcher = batcher.clone();
            one.spawn(async move { batcher.submit(number, 1, never).await });
        }
        while !(batcher.queue().calling == CALLS && batcher.queue().waiting.is_empty()) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let asking = {
            let batcher = batcher.clone();
            other.spawn(async move { batcher.submit(7, 1, never).await })
        };
        while batcher.queue().waiting.is_empty() {
            std::thread::sleep(Duration::from_millis(1));
        }
        one.shutdown_timeout(Duration::from_secs(5));
        let answer = other.block_on(async { tokio::time::timeout(Duration::from_secs(10), asking).await });
        let error = answer.expect("an answer").unwrap().unwrap_err();
        assert!(matches!(error, StoreError::Unavailable { .. }), "{error}");
        assert!(idle(&batcher));
        let answer = other.block_on(
            batcher.submit(8, 1, |numbers: Vec<_>| async { numbers.into_iter().map(Ok).collect() }),
        );
        assert_eq!(answer.unwrap(), 8);
    }
}
