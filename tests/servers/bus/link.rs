//! A proxy to a server that can hold back the client's data, and cut connections.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::bus::fixtures::eventually;
use crate::support::NatsServer;

#[derive(Clone)]
pub struct Link {
    port: u16,
    server: String,
    /// Whether connections are accepted.
    up: watch::Sender<bool>,
    /// Whether data of the client is held back.
    holds: watch::Sender<bool>,
    /// Number of held chunks.
    held: watch::Sender<usize>,
}

impl Link {
    pub async fn to(server: &NatsServer) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let link = Self {
            port: listener.local_addr().unwrap().port(),
            server: server.url().replace("nats://", ""),
            up: watch::Sender::new(true),
            holds: watch::Sender::new(false),
            held: watch::Sender::new(0),
        };
        let shared = link.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let link = shared.clone();
                tokio::spawn(async move {
                    let mut up = link.up.subscribe();
                    tokio::select! {
                        biased;
                        _ = up.wait_for(|up| !up) => {}
                        () = link.carry(client) => {}
                    }
                });
            }
        });
        link
    }

    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// Closes all connections, and accepts none.
    pub fn cut(&self) {
        self.up.send_replace(false);
    }

    pub fn mend(&self) {
        self.up.send_replace(true);
    }

    /// Holds back the client's data. The client still receives the server's data.
    pub fn hold(&self) {
        self.held.send_replace(0);
        self.holds.send_replace(true);
    }

    /// Waits until data of the client is held back.
    pub async fn holds_something(&self) {
        eventually("the client says something", || *self.held.borrow() > 0).await;
    }

    /// Delivers all held data.
    pub fn release(&self) {
        self.holds.send_replace(false);
    }

    async fn carry(&self, client: TcpStream) {
        let Ok(server) = TcpStream::connect(&self.server).await else { return };
        let (mut from_client, mut to_client) = client.into_split();
        let (mut from_server, mut to_server) = server.into_split();
        let up = async {
            let (mut said, mut holds) = (vec![0; 1 << 20], self.holds.subscribe());
            while let Ok(length @ 1..) = from_client.read(&mut said).await {
                if *holds.borrow_and_update() {
                    self.held.send_modify(|held| *held += 1);
                    holds.wait_for(|holds| !holds).await.unwrap();
                }
                if to_server.write_all(&said[..length]).await.is_err() {
                    return;
                }
            }
        };
        let down = tokio::io::copy(&mut from_server, &mut to_client);
        tokio::select! {
            () = up => {}
            _ = down => {}
        }
    }
}
