//! TLS, mutual TLS and credentials files, on the connection that carries the data.

use std::fs;
use std::path::Path;
use std::time::Duration;

use nkeys::KeyPair;
use storied::bus::{BusError, NatsOptions};
use tokio::time::timeout;

use crate::bus::fixtures::PATIENCE;
use crate::bus::login::works;
use crate::support::{self, Certificates, NatsServer};

/// Starts a server with these certificates.
async fn server(certificates: &Certificates, more: &str) -> NatsServer {
    let file = |name| certificates.path(name).display().to_string();
    let (cert, key, ca) = (file("server.pem"), file("server.key"), file("ca.pem"));
    let tls = format!("tls {{ cert_file: {cert:?}, key_file: {key:?}, ca_file: {ca:?}, {more} }}");
    NatsServer::start(support::NatsOptions { config: vec![tls], ..support::NatsOptions::core() }).await
}

fn incompatible_or_unavailable(error: &BusError) -> bool {
    matches!(error, BusError::Unavailable { .. } | BusError::Incompatible { .. })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_and_mutual_tls_carry_the_data() {
    let certificates = Certificates::make();
    let plain = server(&certificates, "").await;
    let mutual = server(&certificates, "verify: true").await;
    let first = server(&certificates, "handshake_first: true").await;
    let core = |server: &NatsServer| NatsOptions::core().url(server.url());
    let trusting = |server| core(server).require_tls(true).root_certificates(certificates.path("ca.pem"));
    let known = |server| {
        trusting(server).client_certificate(certificates.path("client.pem"), certificates.path("client.key"))
    };
    works(trusting(&plain)).await.unwrap();
    works(known(&mutual)).await.unwrap();
    works(trusting(&first).tls_first()).await.unwrap();
    for wrong in [
        // Untrusted; without a client certificate; and a server without TLS where TLS is required.
        core(&plain).require_tls(true),
        trusting(&mutual),
        core(&NatsServer::start(support::NatsOptions::core()).await).require_tls(true),
        trusting(&plain).client_certificate("/no/such/file", "/no/such/file"),
    ] {
        let error = works(wrong).await.unwrap_err();
        assert!(incompatible_or_unavailable(&error), "{error}");
    }
}

/// Starts a server that reports TLS as not required. Returns the bytes that it receives.
async fn plain_server() -> (u16, tokio::task::JoinHandle<Vec<u8>>) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let received = tokio::spawn(async move {
        let (mut client, _) = listener.accept().await.unwrap();
        let info = r#"INFO {"server_id":"x","version":"2.11.0","headers":true,"max_payload":1048576,"tls_required":false}"#;
        client.write_all(format!("{info}\r\n").as_bytes()).await.unwrap();
        let mut bytes = vec![0; 4_096];
        let read = client.read(&mut bytes).await.unwrap_or(0);
        bytes.truncate(read);
        bytes
    });
    (port, received)
}

/// A program with certificates requires TLS: the password is never sent in clear.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_login_with_certificates_is_never_sent_in_clear() {
    let certificates = Certificates::make();
    let ca = || certificates.path("ca.pem");
    let client = || (certificates.path("client.pem"), certificates.path("client.key"));
    type With<'a> = Box<dyn Fn(NatsOptions) -> NatsOptions + 'a>;
    let ways: [(&str, With<'_>, bool); 7] = [
        ("nats://", Box::new(|options| options), false),
        ("nats://", Box::new(|options| options.require_tls(true)), true),
        ("nats://", Box::new(|options| options.root_certificates(ca())), true),
        ("nats://", Box::new(|options| options.root_certificates(ca()).require_tls(false)), true),
        ("nats://", Box::new(|options| options.client_certificate(client().0, client().1)), true),
        ("nats://", Box::new(|options| options.tls_first()), true),
        // The other servers of a list are of the same kind.
        ("tls://127.0.0.1:1,nats://", Box::new(|options| options), true),
    ];
    for (scheme, with, secret) in ways {
        let (port, mut received) = plain_server().await;
        let url = format!("{scheme}127.0.0.1:{port}");
        let options = with(NatsOptions::core().url(&url).user_and_password("ann", "hidden"));
        let bus = options.connection_timeout(Duration::from_millis(500)).bus();
        // On a busy machine the timeout may end before the bus has reached the server.
        let reached = async {
            loop {
                bus.connect().await.unwrap_err();
                if let Ok(sent) = timeout(Duration::from_secs(1), &mut received).await {
                    break sent.unwrap();
                }
            }
        };
        let sent = timeout(PATIENCE, reached).await.expect("the bus reaches the server");
        let sent = String::from_utf8_lossy(&sent).into_owned();
        assert_eq!(sent.contains("hidden"), !secret, "{url}: {sent:?}");
        assert!(!sent.is_empty(), "{url}");
    }
    // Web sockets without TLS are refused before anything is sent.
    let error = NatsOptions::core()
        .url("ws://127.0.0.1:1")
        .root_certificates(ca())
        .bus()
        .connect()
        .await
        .unwrap_err();
    assert!(matches!(&error, BusError::Incompatible { reason } if reason.contains("wss://")), "{error}");
}

/// Creates a JWT in the format of nats-server: claims of `subject`, signed by `issuer`.
fn jwt(issuer: &KeyPair, subject: &KeyPair, name: &str, nats: serde_json::Value) -> String {
    let claims = serde_json::json!({
        "jti": name, "iat": 1_700_000_000, "iss": issuer.public_key(), "name": name, "sub": subject.public_key(), "nats": nats,
    });
    let head = serde_json::json!({ "typ": "JWT", "alg": "ed25519-nkey" });
    let signed =
        format!("{}.{}", base64url(head.to_string().as_bytes()), base64url(claims.to_string().as_bytes()));
    let signature = issuer.sign(signed.as_bytes()).unwrap();
    format!("{signed}.{}", base64url(&signature))
}

fn base64url(bytes: &[u8]) -> String {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let bits =
            chunk.iter().fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for digit in 0..=chunk.len() {
            text.push(char::from(DIGITS[(bits >> (18 - 6 * digit)) as usize & 63]));
        }
    }
    text
}

fn credentials(path: &Path, jwt: &str, user: &KeyPair) {
    let seed = user.seed().unwrap();
    fs::write(
        path,
        format!(
            "-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n-----BEGIN USER NKEY \
             SEED-----\n{seed}\n------END USER NKEY SEED------\n"
        ),
    )
    .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_credentials_file_of_an_account() {
    let (operator, account, user) = (KeyPair::new_operator(), KeyPair::new_account(), KeyPair::new_user());
    let unlimited = serde_json::json!({
        "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true, "conn": -1, "leaf": -1,
    });
    let operator_jwt =
        jwt(&operator, &operator, "storied", serde_json::json!({ "type": "operator", "version": 2 }));
    let account_jwt = jwt(
        &operator,
        &account,
        "shop",
        serde_json::json!({ "type": "account", "version": 2, "limits": unlimited }),
    );
    let of = |name: &str, issuer: &KeyPair, user: &KeyPair| {
        let nats = serde_json::json!({ "type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1 });
        jwt(issuer, user, name, nats)
    };
    let config = vec![
        format!("operator: {operator_jwt}"),
        "resolver: MEMORY".into(),
        format!("resolver_preload: {{ {}: {account_jwt} }}", account.public_key()),
    ];
    let server = NatsServer::start(support::NatsOptions { config, ..support::NatsOptions::core() }).await;
    let dir = tempfile::TempDir::new().unwrap();
    let core = || NatsOptions::core().url(server.url());
    let right = dir.path().join("right.creds");
    credentials(&right, &of("ann", &account, &user), &user);
    works(core().credentials_file(&right)).await.unwrap();

    // An account that this server does not know; the key of another user; no credentials.
    let stranger = KeyPair::new_account();
    let wrong = dir.path().join("wrong.creds");
    credentials(&wrong, &of("eve", &stranger, &user), &user);
    let stolen = dir.path().join("stolen.creds");
    credentials(&stolen, &of("ann", &account, &user), &KeyPair::new_user());
    for options in [core().credentials_file(&wrong), core().credentials_file(&stolen), core()] {
        let error = works(options).await.unwrap_err();
        let shown = format!("{error} {error:?}");
        assert!(matches!(error, BusError::Incompatible { .. }) && !shown.contains("SU"), "{shown}");
    }
}
