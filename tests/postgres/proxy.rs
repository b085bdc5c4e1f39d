//! A TCP proxy that loses what it is told to lose.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::broadcast;

/// What happens to the message in which a trap's needle travels to the server. The client loses its connection each time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// It never leaves.
    Message,
    /// It arrives, and the answer does not come back.
    Answer,
    /// It arrives after the client was told that its connection is gone, and has had time to look.
    Late,
    /// Its connection carries nothing for this time, in either direction, and then goes on with it.
    Stall(Duration),
}

#[derive(Debug)]
struct State {
    traps: Mutex<VecDeque<(Vec<u8>, Loss)>>,
    /// Where new connections go to; none are taken without.
    server: Mutex<Option<String>>,
    cut: broadcast::Sender<()>,
    silence: broadcast::Sender<()>,
}

/// A proxy in front of a server; it goes with the runtime.
#[derive(Debug)]
pub struct Proxy {
    url: String,
    port: u16,
    state: Arc<State>,
}

impl Proxy {
    /// In front of the server that `url` names.
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
        });
        let shared = state.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let state = shared.clone();
                let Some(server) = state.server.lock().unwrap().clone() else { continue };
                tokio::spawn(async move {
                    let (mut cut, mut silence) = (state.cut.subscribe(), state.silence.subscribe());
                    // Kept beyond the silence: what it carries stays open.
                    let mut carrying = pin!(carry(client, &server, &state));
                    tokio::select! {
                        () = &mut carrying => {}
                        _ = cut.recv() => {}
                        _ = silence.recv() => std::future::pending().await,
                    }
                });
            }
        });
        Self { url: format!("{user}@127.0.0.1:{port}/{database}"), port, state }
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Cuts all connections, and takes new ones to the server at this port, or none.
    pub fn connect_to(&self, port: Option<u16>) {
        *self.state.server.lock().unwrap() = port.map(|port| format!("127.0.0.1:{port}"));
        self.cut_all();
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    /// Loses the next message with this in it.
    pub fn lose(&self, needle: &[u8], loss: Loss) {
        self.state.traps.lock().unwrap().push_back((needle.to_vec(), loss));
    }

    /// Whether everything that was to be lost is.
    pub fn done(&self) -> bool {
        self.state.traps.lock().unwrap().is_empty()
    }

    /// Carries nothing any more on the connections of now, and keeps them open. New ones work.
    pub fn silence_all(&self) {
        _ = self.state.silence.send(());
    }

    /// Cuts all connections, wherever they are.
    pub fn cut_all(&self) {
        _ = self.state.cut.send(());
    }
}

async fn carry(client: TcpStream, server: &str, state: &State) {
    let Ok(server) = TcpStream::connect(server).await else { return };
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let mut answer = vec![0; 1 << 16];
    let mut message = vec![0; 1 << 16];
    loop {
        tokio::select! {
            read = from_server.read(&mut answer) => match read {
                Ok(length) if length > 0 => {
                    if to_client.write_all(&answer[..length]).await.is_err() {
                        return;
                    }
                }
                _ => return,
            },
            read = from_client.read(&mut message) => match read {
                Ok(length) if length > 0 => match trapped(state, &message[..length]) {
                    None => {
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
                        // By the time of the answer, it has happened.
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
