//! Supervision: the root of a node's actors, and actors that supervise one long-running task.
//!
//! The children of the [`Supervisor`] are the publisher and the projections, and the actor of each
//! aggregate type and handler. Their routers restart the latter.
//!
//! Tasks that read the log mostly await the store, the bus and user code. A ractor actor that
//! awaits in its handler answers no messages meanwhile. Therefore the actor only receives messages
//! and supervises, and a separate task does the work. The actor restarts the task (with backoff)
//! after a panic, stops it within a deadline, and aborts it when the actor itself ends.

use std::fmt;
use std::marker::PhantomData;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures_util::FutureExt;
use ractor::{Actor, ActorCell, ActorProcessingErr, ActorRef, RpcReplyPort, SpawnErr, SupervisionEvent};
use tokio::sync::{Mutex, OwnedMutexGuard, OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::backoff::Backoff;
use crate::future::BoxFuture;
use crate::panic::panic_text;

/// Maximum number of control messages in flight to one task.
const CONTROLS: usize = 16;

/// Run time after which a task is healthy: the next panic restarts the backoff from its minimum.
const HEALTHY: Duration = Duration::from_secs(60);

/// A tokio task that is aborted when its handle is dropped.
#[derive(Debug)]
pub(crate) struct Task(JoinHandle<()>);

impl Task {
    pub(crate) fn spawn(future: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(tokio::spawn(future))
    }

    /// Returns whether the task has ended: by itself, or with its tokio runtime.
    pub(crate) fn is_finished(&self) -> bool {
        self.0.is_finished()
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The root of the supervision tree. Stopping it, or dropping it, stops all actors of the node.
pub(crate) struct Supervisor {
    root: ActorRef<()>,
    alive: Arc<()>,
}

struct Root;

impl Actor for Root {
    type Msg = ();
    type State = ();
    type Arguments = ();

    async fn pre_start(&self, _: ActorRef<()>, (): ()) -> Result<(), ActorProcessingErr> {
        Ok(())
    }

    /// Replaces the default of ractor, which ends the root with the first child that ends.
    async fn handle_supervisor_evt(
        &self,
        _: ActorRef<()>,
        event: SupervisionEvent,
        (): &mut (),
    ) -> Result<(), ActorProcessingErr> {
        if let SupervisionEvent::ActorFailed(_, error) = event {
            tracing::error!(%error, "an actor failed");
        }
        Ok(())
    }
}

impl Supervisor {
    pub(crate) async fn start() -> Result<Self, SpawnErr> {
        let (root, _) = Actor::spawn(None, Root, ()).await?;
        Ok(Self { root, alive: Arc::new(()) })
    }

    /// Becomes dead as soon as the supervisor is dropped; the actors end later.
    pub(crate) fn alive(&self) -> Weak<()> {
        Arc::downgrade(&self.alive)
    }

    pub(crate) fn cell(&self) -> ActorCell {
        self.root.get_cell()
    }

    pub(crate) fn stop(&self) {
        self.root.stop(None);
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The work of one task.
pub(crate) trait Work: Send + Sync + 'static {
    /// Control messages that the work accepts while it runs.
    type Control: Send + 'static;

    /// Returns the name for log lines and errors.
    fn name(&self) -> String;

    /// Does the work. Ends soon after [`Inbox::stopping`] resolves, and not before.
    ///
    /// The actor calls it again after a panic.
    fn run(&self, inbox: Inbox<Self::Control>) -> BoxFuture<'static, ()>;

    /// Reports a panic of the work. The actor restarts the work after the backoff.
    fn panicked(&self, panic: &str);

    /// Reports that the work has ended and is not restarted.
    fn ended(&self);
}

/// The control messages and the stop signal of a task.
pub(crate) struct Inbox<C> {
    orders: OwnedMutexGuard<mpsc::Receiver<Order<C>>>,
    stop: watch::Receiver<bool>,
}

/// A control message with its permit: at most [`CONTROLS`] are in flight.
type Order<C> = (C, OwnedSemaphorePermit);

impl<C> Inbox<C> {
    /// Receives the next control message, or `None` when the work must end. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Option<C> {
        let Self { orders, stop } = self;
        tokio::select! {
            biased;
            // An error means that the actor has ended, which also ends the work.
            _ = stop.wait_for(|stop| *stop) => None,
            order = orders.recv() => order.map(|(control, _)| control),
        }
    }

    /// Returns whether the work must end.
    pub(crate) fn is_stopping(&self) -> bool {
        *self.stop.borrow() || self.stop.has_changed().is_err()
    }

    /// Returns a watch on the stop signal for other tasks. It closes when the actor ends.
    pub(crate) fn stop_watch(&self) -> watch::Receiver<bool> {
        self.stop.clone()
    }

    /// Returns a future that resolves when the work must end, independent of this inbox.
    pub(crate) fn stop_signal(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut stop = self.stop.clone();
        async move {
            let _ = stop.wait_for(|stop| *stop).await;
        }
    }

    /// Waits until the work must end. Cancel-safe.
    pub(crate) async fn stopping(&mut self) {
        let _ = self.stop.wait_for(|stop| *stop).await;
    }
}

/// A handle to a supervised task. Cloning is cheap; dropping has no effect on the task.
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

/// A control message that got no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AskError {
    /// Too many control messages are in flight.
    Overloaded,
    /// The task did not answer in time. It may still act on the message.
    TimedOut,
    /// The task ended, or panicked on the message.
    Ended,
}

/// A component that did not stop in order. It no longer runs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unclean stop of {name}: {reason}")]
pub struct StopError {
    /// Name of the component.
    pub name: String,
    /// Cause.
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

    /// Sends a control message to the task and waits at most `patience` for the answer.
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
            Ok(ractor::rpc::CallResult::SenderError) | Err(_) => Err(AskError::Ended),
        }
    }

    /// Stops the work in order. Aborts it when `patience` is over.
    pub(crate) async fn stop(&self, patience: Duration) -> Result<(), StopError> {
        let asked = self.actor.call(|done| Message::Stop(patience, done), None).await;
        match asked {
            Ok(ractor::rpc::CallResult::Success(result)) => result,
            // The task was stopped before, or ended with its supervisor.
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// Aborts the task at once, as the end of the process would.
    #[cfg(feature = "testing")]
    pub(crate) fn kill(&self) {
        self.actor.kill();
    }
}

/// The actor that supervises the task.
struct Shell<W>(PhantomData<fn() -> W>);

enum Message<C> {
    /// Forward a control message to the task.
    Control(C, OwnedSemaphorePermit),
    /// Restart the task.
    Start,
    /// The task has ended, with the message of its panic, if it panicked.
    Ended(Option<String>),
    /// Stop the task within this time.
    Stop(Duration, RpcReplyPort<Result<(), StopError>>),
    /// The time for the stop is over.
    GiveUp(Duration),
}

struct State<W: Work> {
    work: Arc<W>,
    /// Running task. `None` while a panicked task waits for its restart.
    task: Option<Task>,
    /// Time of the last start, to distinguish repeated panics from rare ones.
    started: Instant,
    restarts: Backoff,
    orders: mpsc::Sender<Order<W::Control>>,
    /// Queued control messages. They outlive the task and wait for the next one.
    inbox: Arc<Mutex<mpsc::Receiver<Order<W::Control>>>>,
    stop: watch::Sender<bool>,
    /// Reply ports of the callers that wait for the end.
    stopping: Vec<RpcReplyPort<Result<(), StopError>>>,
}

impl<W: Work> State<W> {
    fn start(&mut self, myself: ActorRef<Message<W::Control>>) {
        let (work, inbox, stop) = (self.work.clone(), self.inbox.clone(), self.stop.subscribe());
        self.started = Instant::now();
        self.task = Some(Task::spawn(async move {
            let run = async { work.run(Inbox { orders: inbox.lock_owned().await, stop }).await };
            let panic = AssertUnwindSafe(run).catch_unwind().await.err();
            // If the cast fails, the actor has ended and this task is being aborted.
            let _ = myself.cast(Message::Ended(panic.as_deref().map(panic_text)));
        }));
    }

    /// Ends the task and reports the result to all waiting callers.
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
            // A failed send means that the caller has stopped waiting.
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
                // The channel has as many slots as there are permits. Dropping a message
                // reports `Gone` to its caller.
                let _ = state.orders.try_send((control, slot));
            }
            Message::Start if stopping => {}
            Message::Start => state.start(myself),
            Message::Ended(None) => state.end(&myself, None),
            Message::Ended(Some(panic)) if stopping => state.end(&myself, Some(format!("panic: {panic}"))),
            Message::Ended(Some(panic)) => {
                state.task = None;
                if state.started.elapsed() > HEALTHY {
                    state.restarts.succeeded();
                }
                let wait = state.restarts.next();
                tracing::error!(task = state.work.name(), panic, ?wait, "restarting task after panic");
                state.work.panicked(&panic);
                myself.send_after(wait, || Message::Start);
            }
            Message::Stop(patience, done) => {
                state.stopping.push(done);
                state.stop.send_replace(true);
                if state.task.is_none() {
                    // A panicked task waits for its restart. Restart it now, so that it ends in
                    // order.
                    state.start(myself.clone());
                }
                myself.send_after(patience, move || Message::GiveUp(patience));
            }
            Message::GiveUp(patience) => {
                state.end(&myself, Some(format!("still running after {patience:?}")))
            }
        }
        Ok(())
    }
}
