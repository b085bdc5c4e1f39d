//! A future that runs to completion even if it is dropped.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::runtime::Handle;

/// Wraps `work` so that it runs to completion once it was polled.
///
/// If the future is dropped, the rest of `work` runs in a task of its own. It does not start in a
/// task, because that costs a scheduler hop there and back.
pub(super) fn detach_on_drop<F>(work: F) -> DetachOnDrop<F>
where
    F: Future<Output: Send> + Send + 'static,
{
    DetachOnDrop { work: Some(Box::pin(work)), runtime: None }
}

/// The future that [`detach_on_drop`] returns.
pub(super) struct DetachOnDrop<F: Future<Output: Send> + Send + 'static> {
    /// `None` after completion and during a poll.
    work: Option<Pin<Box<F>>>,
    /// Runtime of the first poll.
    runtime: Option<Handle>,
}

impl<F: Future<Output: Send> + Send + 'static> Future for DetachOnDrop<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        if self.runtime.is_none() {
            self.runtime = Handle::try_current().ok();
        }
        // Taken out, so that nothing is left to continue after a panic. A completed future is not
        // polled.
        let Some(mut work) = self.work.take() else { return Poll::Pending };
        let poll = work.as_mut().poll(cx);
        if poll.is_pending() {
            self.work = Some(work);
        }
        poll
    }
}

impl<F: Future<Output: Send> + Send + 'static> Drop for DetachOnDrop<F> {
    fn drop(&mut self) {
        // If the runtime has ended, the work has ended too.
        if let (Some(work), Some(runtime)) = (self.work.take(), self.runtime.take()) {
            runtime.spawn(work);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::panic::AssertUnwindSafe;
    use std::time::Duration;

    use futures_util::FutureExt;
    use tokio::sync::oneshot;
    use tokio::time::timeout;

    use super::*;

    /// Returns work that reports its run, the trigger it waits for, and the receiver of its report.
    fn work() -> (impl Future<Output = ()> + Send + 'static, oneshot::Sender<()>, oneshot::Receiver<()>) {
        let ((begin, wait), (done, is_done)) = (oneshot::channel(), oneshot::channel());
        let work = async move {
            let _ = wait.await;
            let _ = done.send(());
        };
        (work, begin, is_done)
    }

    #[tokio::test]
    async fn polled_work_completes_after_a_drop() {
        let (work, go_on, is_done) = work();
        let mut work = detach_on_drop(work);
        assert!(timeout(Duration::from_millis(1), &mut work).await.is_err());
        drop(work);
        go_on.send(()).unwrap();
        is_done.await.unwrap();
    }

    #[tokio::test]
    async fn unpolled_work_does_not_start() {
        let (work, go_on, is_done) = work();
        drop(detach_on_drop(work));
        assert!(go_on.send(()).is_err() && is_done.await.is_err());
    }

    #[tokio::test]
    async fn panicked_work_does_not_continue() {
        let mut panics = Box::pin(detach_on_drop(async { panic!("enough") }));
        let poll = AssertUnwindSafe(poll_fn(|cx| panics.as_mut().poll(cx))).catch_unwind().await;
        assert!(poll.is_err() && panics.work.is_none());
    }

    #[test]
    fn work_continues_in_its_first_runtime() {
        let (work, go_on, is_done) = work();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
        let mut work = detach_on_drop(work);
        runtime.block_on(async { assert!(futures_util::poll!(&mut work).is_pending()) });
        drop(work);
        go_on.send(()).unwrap();
        runtime.block_on(is_done).unwrap();
    }

    #[test]
    fn without_a_runtime_work_is_dropped() {
        let (work, go_on, _is_done) = work();
        let mut work = detach_on_drop(work);
        let mut cx = Context::from_waker(std::task::Waker::noop());
        assert!(Pin::new(&mut work).poll(&mut cx).is_pending());
        drop(work);
        assert!(go_on.send(()).is_err());
    }
}
