//! A future that is not broken off.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::runtime::Handle;

/// `work`, which runs to its end once it was polled: when whoever awaits it goes away, it goes on in a task of its own. It is
/// not in one from the start, because that is a turn of the scheduler's more, there and back.
pub(super) fn to_its_end<F>(work: F) -> ToItsEnd<F>
where
    F: Future<Output: Send> + Send + 'static,
{
    ToItsEnd { work: Some(Box::pin(work)), runtime: None }
}

/// See [`to_its_end`].
pub(super) struct ToItsEnd<F: Future<Output: Send> + Send + 'static> {
    /// `None` at its end, and while it is polled.
    work: Option<Pin<Box<F>>>,
    /// The one that it was begun in.
    runtime: Option<Handle>,
}

impl<F: Future<Output: Send> + Send + 'static> Future for ToItsEnd<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        if self.runtime.is_none() {
            self.runtime = Handle::try_current().ok();
        }
        // Taken out: where it panics, there is nothing left to go on with. As with any future, nobody polls it after its end.
        let Some(mut work) = self.work.take() else { return Poll::Pending };
        let poll = work.as_mut().poll(cx);
        if poll.is_pending() {
            self.work = Some(work);
        }
        poll
    }
}

impl<F: Future<Output: Send> + Send + 'static> Drop for ToItsEnd<F> {
    fn drop(&mut self) {
        // Where the runtime has ended, so has this.
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

    /// What would say that it ran, and the end of what it waits for.
    fn work() -> (impl Future<Output = ()> + Send + 'static, oneshot::Sender<()>, oneshot::Receiver<()>) {
        let ((begin, wait), (tell, told)) = (oneshot::channel(), oneshot::channel());
        let work = async move {
            let _ = wait.await;
            let _ = tell.send(());
        };
        (work, begin, told)
    }

    #[tokio::test]
    async fn what_was_begun_goes_on_when_nobody_awaits_it_any_more() {
        let (work, go_on, told) = work();
        let mut work = to_its_end(work);
        assert!(timeout(Duration::from_millis(1), &mut work).await.is_err());
        drop(work);
        go_on.send(()).unwrap();
        told.await.unwrap();
    }

    #[tokio::test]
    async fn what_was_not_begun_does_not_begin() {
        let (work, go_on, told) = work();
        drop(to_its_end(work));
        assert!(go_on.send(()).is_err() && told.await.is_err());
    }

    #[tokio::test]
    async fn what_panicked_does_not_go_on() {
        let mut panics = Box::pin(to_its_end(async { panic!("enough") }));
        let poll = AssertUnwindSafe(poll_fn(|cx| panics.as_mut().poll(cx))).catch_unwind().await;
        assert!(poll.is_err() && panics.work.is_none());
    }

    #[test]
    fn it_goes_on_where_it_was_begun() {
        let (work, go_on, told) = work();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
        let mut work = to_its_end(work);
        runtime.block_on(async { assert!(futures_util::poll!(&mut work).is_pending()) });
        drop(work);
        go_on.send(()).unwrap();
        runtime.block_on(told).unwrap();
    }

    #[test]
    fn without_a_runtime_it_is_dropped() {
        let (work, go_on, _told) = work();
        let mut work = to_its_end(work);
        let mut cx = Context::from_waker(std::task::Waker::noop());
        assert!(Pin::new(&mut work).poll(&mut cx).is_pending());
        drop(work);
        assert!(go_on.send(()).is_err());
    }
}
