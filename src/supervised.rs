//! Actors around one long-running task.
//!
//! What follows the log spends its life awaiting: the store, the bus, the user's code. A ractor actor that awaited in its
//! handler would answer nobody meanwhile. So the actor only takes messages and supervises, and a task of its own does the
//! work: it is started again (with backoff) when it panics, stopped within a deadline, and torn down with its actor.

use std::fmt;
use std::marker::PhantomData;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use ractor::{Actor, ActorCell, ActorProcessingErr, ActorRef, RpcReplyPort, SpawnErr};
use tokio::sync::{Mutex, OwnedMutexGuard, OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::backoff::Backoff;
use crate::future::BoxFuture;
use crate::panic::panic_text;

/// How many control messages may be under way to one task.
const CONTROLS: usize = 16;

/// A task that has run this long was healthy: the next panic is not held against it as a repetition.
const HEALTHY: Duration = Duration::from_secs(60);

/// A tokio task that ends with its handle.
#[derive(Debug)]
pub(crate) struct Task(JoinHandle<()>);

impl Task {
    pub(crate) fn spawn(future: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(tokio::spawn(future))
    }

    /// Whether it has ended: by itself, or with its tokio runtime.
    pub(crate) fn is_finished(&self) -> bool {
        self.0.is_finished()
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The work of one task.
pub(crate) trait Work: Send + Sync + 'static {
    /// What it may be told while it runs.
    type Control: Send + 'static;

    /// For log lines and errors.
    fn name(&self) -> String;

    /// The work itself. Ends soon after [`Inbox::stopping`] says so, and not before; called again after a panic.
    fn run(&self, inbox: Inbox<Self::Control>) -> BoxFuture<'static, ()>;

    /// The work panicked, and is started again after a while.
    fn panicked(&self, panic: &str);

    /// The work has ended for good.
    fn ended(&self);
}

/// What a task hears.
pub(crate) struct Inbox<C> {
    orders: OwnedMutexGuard<mpsc::Receiver<Order<C>>>,
    stop: watch::Receiver<bool>,
}

/// A control message, and its place among the few that may be under way.
type Order<C> = (C, OwnedSemaphorePermit);

impl<C> Inbox<C> {
    /// The next control message; `None` when the work is to end. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Option<C> {
        let Self { orders, stop } = self;
        tokio::select! {
            biased;
            // An error says that the actor is gone, which is as good a reason.
            _ = stop.wait_for(|stop| *stop) => None,
            order = orders.recv() => order.map(|(control, _)| control),
        }
    }

    /// Whether the work is to end.
    pub(crate) fn is_stopping(&self) -> bool {
        *self.stop.borrow() || self.stop.has_changed().is_err()
    }

    /// Whether the work is to end, for others; closed when the actor is gone.
    pub(crate) fn stop_watch(&self) -> watch::Receiver<bool> {
        self.stop.clone()
    }

    /// Waits until the work is to end, apart from what else the task hears.
    pub(crate) fn stop_signal(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut stop = self.stop.clone();
        async move {
            let _ = stop.wait_for(|stop| *stop).await;
        }
    }

    /// Waits until the work is to end. Cancel-safe.
    pub(crate) async fn stopping(&mut self) {
        let _ = self.stop.wait_for(|stop| *stop).await;
    }
}

/// The handle of a supervised task; cheap to clone. Dropping it changes nothing.
pub(crate) struct Supervised<C: Send + 'static> {
    name: Arc<str>,
    actor: ActorRef<Message<C>>,
    slots: Arc<Semaphore>,
}

impl<C: Send + 'static> Clone for Supervised<C> {
    fn clone(&self) -> Self {
        Self { name: self.name.clone(), actor: self.actor.clone(), slots: self.slots.clone() }
    }
}

impl<C: Send + 'static> fmt::Debug for Supervised<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Supervised").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Why a task gave no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AskError {
    /// Too many questions are under way.
    Overloaded,
    /// It did not answer in time; what was asked may still happen.
    TimedOut,
    /// It ended, or panicked over the question.
    Gone,
}

/// Something that did not end as it should when it was stopped. It does not run any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name} did not end in order: {reason}")]
pub struct StopError {
    /// What was to be stopped.
    pub name: String,
    /// What happened instead.
    pub reason: String,
}

impl<C: Send + 'static> Supervised<C> {
    /// Starts the work, under `supervisor` if there is one.
    pub(crate) async fn spawn<W: Work<Control = C>>(
        work: W,
        supervisor: Option<ActorCell>,
    ) -> Result<Self, SpawnErr> {
        let name = Arc::from(work.name());
        let actor = Shell(PhantomData::<fn() -> W>);
        let (actor, _) = match supervisor {
            Some(supervisor) => Actor::spawn_linked(None, actor, work, supervisor).await?,
            None => Actor::spawn(None, actor, work).await?,
        };
        Ok(Self { name, actor, slots: Arc::new(Semaphore::new(CONTROLS)) })
    }

    /// Tells the task something and waits for the answer.
    pub(crate) async fn ask<T: Send + 'static>(
        &self,
        control: impl FnOnce(RpcReplyPort<T>) -> C,
        patience: Duration,
    ) -> Result<T, AskError> {
        let slot = self.slots.clone().try_acquire_owned().map_err(|_| AskError::Overloaded)?;
        let asked = self.actor.call(|reply| Message::Control(control(reply), slot), Some(patience)).await;
        match asked {
            Ok(ractor::rpc::CallResult::Success(answer)) => Ok(answer),
            Ok(ractor::rpc::CallResult::Timeout) => Err(AskError::TimedOut),
            Ok(ractor::rpc::CallResult::SenderError) | Err(_) => Err(AskError::Gone),
        }
    }

    /// Ends the work in order, or without it when `patience` is over.
    pub(crate) async fn stop(&self, patience: Duration) -> Result<(), StopError> {
        let asked = self.actor.call(|done| Message::Stop(patience, done), None).await;
        match asked {
            Ok(ractor::rpc::CallResult::Success(result)) => result,
            // It was stopped before, or is gone with its supervisor.
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// Tears everything down at once, as the end of the process would.
    #[cfg(feature = "testing")]
    pub(crate) fn kill(&self) {
        self.actor.kill();
    }
}

/// The actor.
struct Shell<W>(PhantomData<fn() -> W>);

enum Message<C> {
    /// For the task.
    Control(C, OwnedSemaphorePermit),
    /// The task is to be started, again.
    Start,
    /// The task has ended; how it panicked, if it did.
    Ended(Option<String>),
    /// The task is to end within this time.
    Stop(Duration, RpcReplyPort<Result<(), StopError>>),
    /// That time is over.
    GiveUp(Duration),
}

struct State<W: Work> {
    work: Arc<W>,
    /// `None` while a panicked task waits for its restart.
    task: Option<Task>,
    /// When it was started, to tell repeated panics from rare ones.
    started: Instant,
    restarts: Backoff,
    orders: mpsc::Sender<Order<W::Control>>,
    /// Outlives the task, so that what was asked of it waits for the next one.
    inbox: Arc<Mutex<mpsc::Receiver<Order<W::Control>>>>,
    stop: watch::Sender<bool>,
    /// Who waits for the end.
    stopping: Vec<RpcReplyPort<Result<(), StopError>>>,
}

impl<W: Work> State<W> {
    fn start(&mut self, myself: ActorRef<Message<W::Control>>) {
        let (work, inbox, stop) = (self.work.clone(), self.inbox.clone(), self.stop.subscribe());
        self.started = Instant::now();
        self.task = Some(Task::spawn(async move {
            let run = async { work.run(Inbox { orders: inbox.lock_owned().await, stop }).await };
            let panic = AssertUnwindSafe(run).catch_unwind().await.err();
            // Without an actor there is nobody to tell, and this task is being torn down.
            let _ = myself.cast(Message::Ended(panic.as_deref().map(panic_text)));
        }));
    }

    /// The end: everybody who waits for it hears how it went.
    fn end(&mut self, myself: &ActorRef<Message<W::Control>>, reason: Option<String>) {
        self.task = None;
        self.work.ended();
        let result = match reason {
            None => Ok(()),
            Some(reason) => Err(StopError { name: self.work.name(), reason }),
        };
        if let Err(error) = &result {
            tracing::error!("{error}");
        }
        for done in self.stopping.drain(..) {
            // Who went away meanwhile does not want to know.
            let _ = done.send(result.clone());
        }
        myself.stop(None);
    }
}

impl<W: Work> Actor for Shell<W> {
    type Msg = Message<W::Control>;
    type State = State<W>;
    type Arguments = W;

    async fn pre_start(&self, myself: ActorRef<Self::Msg>, work: W) -> Result<State<W>, ActorProcessingErr> {
        let (orders, inbox) = mpsc::channel(CONTROLS);
        let mut state = State {
            work: Arc::new(work),
            task: None,
            started: Instant::now(),
            restarts: Backoff::new(Duration::from_millis(100), Duration::from_secs(10)),
            orders,
            inbox: Arc::new(Mutex::new(inbox)),
            stop: watch::Sender::new(false),
            stopping: Vec::new(),
        };
        state.start(myself);
        Ok(state)
    }

    async fn handle(
        &self,
        myself: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut State<W>,
    ) -> Result<(), ActorProcessingErr> {
        let stopping = *state.stop.borrow();
        match message {
            Message::Control(control, slot) => {
                // There are as many places as slots. What is dropped here answers its caller by that.
                let _ = state.orders.try_send((control, slot));
            }
            Message::Start if stopping => {}
            Message::Start => state.start(myself),
            Message::Ended(None) => state.end(&myself, None),
            Message::Ended(Some(panic)) if stopping => {
                state.end(&myself, Some(format!("it panicked: {panic}")))
            }
            Message::Ended(Some(panic)) => {
                state.task = None;
                if state.started.elapsed() > HEALTHY {
                    state.restarts.succeeded();
                }
                let wait = state.restarts.next();
                tracing::error!(
                    task = state.work.name(),
                    panic,
                    ?wait,
                    "a task panicked and is started again"
                );
                state.work.panicked(&panic);
                myself.send_after(wait, || Message::Start);
            }
            Message::Stop(patience, done) => {
                state.stopping.push(done);
                state.stop.send_replace(true);
                if state.task.is_none() {
                    // It panicked, and waits for its restart: that is now, since it has not ended in order yet.
                    state.start(myself.clone());
                }
                myself.send_after(patience, move || Message::GiveUp(patience));
            }
            Message::GiveUp(patience) => {
                state.end(&myself, Some(format!("it was still at work after {patience:?}")))
            }
        }
        Ok(())
    }
}
