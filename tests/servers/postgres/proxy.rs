//! A TCP proxy that loses messages on request.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::broadcast;

/// The fate of the message that contains a trap's needle. The client loses its connection each
/// time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// The message is dropped.
    Message,
    /// The message arrives, and its answer is dropped.
    Answer,
    /// The message arrives after the client lost its connection and had time to look the append up.
    Late,
    /// The connection carries nothing for this time, in either direction, and then continues.
    Stall(Duration),
}

#[derive(Debug)]
struct State {
    traps: Mutex<VecDeque<(Vec<u8>, Loss)>>,
    /// Target of new connections; without it, none are accepted.
    server: Mutex<Option<String>>,
    cut: broadcast::Sender<()>,
    silence: broadcast::Sender<()>,
    /// Number of times that all connections were cut, and silenced.
    cuts: AtomicU64,
    silences: AtomicU64,
}

impl State {
    fn now(&self) -> [u64; 2] {
        [self.cuts.load(Ordering::SeqCst), self.silences.load(Ordering::SeqCst)]
    }

    /// Never returns if the connections of `began` are cut or silenced. Their tasks end them, and may
    /// be late on a busy machine.
    async fn may_carry(&self, began: [u64; 2]) {
        if self.now() != began {
            std::future::pending().await
        }
    }
}

/// A proxy before a server; it ends with the runtime.
#[derive(Debug)]
pub struct Proxy {
    url: String,
    port: u16,
    state: Arc<State>,
}

impl Proxy {
    /// Starts a proxy before the server of `url`.
    pub async fn start(url: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (user, rest) = url.split_once('@').unwrap();
        let (server, database) = rest.split_once('/').unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = Mutex::new(Some(server.to_owned()));
        let state = Arc::new(State {
            traps: Mutex::default(),
            server,
            cut: broadcast::channel(1).0,
            silence: broadcast::channel(1).0,
            cuts: AtomicU64::new(0),
            silences: AtomicU64::new(0),
        });
        let shared = state.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let state = shared.clone();
                let (mut cut, mut silence) = (state.cut.subscribe(), state.silence.subscribe());
                let began = state.now();
                let Some(server) = state.server.lock().unwrap().clone() else { continue };
                tokio::spawn(async move {
                    // Kept beyond the silence, so that the connection stays open.
                    let mut carrying = pin!(carry(client, &server, &state, began));
                    tokio::select! {
                        biased;
                        _ = cut.recv() => {}
                        _ = silence.recv() => std::future::pending().await,
                        () = &mut carrying => {}
                    }
                });
            }
        });
        Self { url: format!("{user}@127.0.0.1:{port}/{database}"), port, state }
    }

    /// The port of the proxy.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Cuts all connections; routes new ones to the server at `port`, or rejects them.
    pub fn connect_to(&self, port: Option<u16>) {
        *self.state.server.lock().unwrap() = port.map(|port| format!("127.0.0.1:{port}"));
        self.cut_all();
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    /// Loses the next message that contains `needle`.
    pub fn lose(&self, needle: &[u8], loss: Loss) {
        self.state.traps.lock().unwrap().push_back((needle.to_vec(), loss));
    }

    /// Whether all requested losses have happened.
    pub fn done(&self) -> bool {
        self.state.traps.lock().unwrap().is_empty()
    }

    /// Silences all current connections and keeps them open. New ones work.
    pub fn silence_all(&self) {
        self.state.silences.fetch_add(1, Ordering::SeqCst);
        _ = self.state.silence.send(());
    }

    /// Cuts all connections.
    pub fn cut_all(&self) {
        self.state.cuts.fetch_add(1, Ordering::SeqCst);
        _ = self.state.cut.send(());
    }
}

async fn carry(client: TcpStream, server: &str, state: &State, began: [u64; 2]) {
    let Ok(server) = TcpStream::connect(server).await else { return };
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let mut answer = vec![0; 1 << 16];
    let mut message = vec![0; 1 << 16];
    loop {
        tokio::select! {
            read = from_server.read(&mut answer) => match read {
                Ok(length) if length > 0 => {
                    state.may_carry(began).await;
                    if to_client.write_all(&answer[..length]).await.is_err() {
                        return;
                    }
                }
                _ => return,
            },
            read = from_client.read(&mut message) => match read {
                Ok(length) if length > 0 => match trapped(state, &message[..length]) {
                    None => {
                        state.may_carry(began).await;
                        if to_server.write_all(&message[..length]).await.is_err() {
                            return;
                        }
                    }
                    Some(Loss::Stall(time)) => {
                        tokio::time::sleep(time).await;
                        if to_server.write_all(&message[..length]).await.is_err() {
                            return;
                        }
                    }
                    Some(Loss::Message) => return,
                    Some(Loss::Answer) => {
                        to_server.write_all(&message[..length]).await.unwrap();
                        // The answer shows that the message took effect.
                        _ = from_server.read(&mut answer).await;
                        return;
                    }
                    Some(Loss::Late) => {
                        drop((from_client, to_client));
                        tokio::time::sleep(Duration::from_millis(300)).await;
                        _ = to_server.write_all(&message[..length]).await;
                        tokio::time::sleep(Duration::from_millis(300)).await;
                        return;
                    }
                },
                _ => return,
            },
        }
    }
}

fn trapped(state: &State, message: &[u8]) -> Option<Loss> {
    let mut traps = state.traps.lock().unwrap();
    let (needle, loss) = traps.front()?;
    let loss = *loss;
    message.windows(needle.len()).any(|window| window == needle).then(|| traps.pop_front())?;
    Some(loss)
}
