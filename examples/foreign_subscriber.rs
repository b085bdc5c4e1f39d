//! Reads storied's events without storied: a NATS client, a CBOR library and `docs/wire-format.md`.
//!
//! Any language can do the same.
//!
//! ```sh
//! cargo run --example foreign_subscriber -- nats://127.0.0.1:4222 storied
//! ```

use std::error::Error;
use std::io::{Write, stdout};
use std::process::ExitCode;
use std::time::Duration;

use async_nats::{ConnectOptions, HeaderMap, Message};
use ciborium::Value;
use futures_util::StreamExt;

/// An event, with the parts that a foreign reader needs.
#[derive(Debug)]
pub struct Seen {
    /// Position in the log.
    pub position: u64,
    /// `category.variant`.
    pub name: String,
    /// `category/id`.
    pub stream: String,
    /// Version in the stream.
    pub version: u64,
    /// The payload; `None` if it was too large for a message.
    pub payload: Option<Value>,
    /// Whether events are missing before it.
    pub hole: bool,
}

/// Follows all events of a namespace, and passes each to `each` until it returns false.
pub async fn follow(
    url: &str,
    namespace: &str,
    mut each: impl FnMut(Seen) -> bool,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    let options = ConnectOptions::new().connection_timeout(Duration::from_secs(2));
    let client = options.connect(url).await?;
    let mut messages = client.subscribe(format!("{namespace}.events.>")).await?;
    client.flush().await?;
    // The position of the last received event.
    let mut last: Option<u64> = None;
    while let Some(message) = messages.next().await {
        let Some(mut seen) = read(&message)? else { continue };
        if last.is_some_and(|last| seen.position <= last) {
            continue;
        }
        let previous: u64 = header(&message, "Storied-Previous")?.parse()?;
        seen.hole = last.is_some_and(|last| previous > last);
        last = Some(seen.position);
        if !each(seen) {
            break;
        }
    }
    Ok(())
}

/// Decodes the event of a message; `None` if it is no event, or has an unknown format.
fn read(message: &Message) -> Result<Option<Seen>, Box<dyn Error + Send + Sync>> {
    if header(message, "Storied-Wire").ok() != Some("1") {
        return Ok(None);
    }
    let omitted = message.headers.as_ref().is_some_and(|headers| headers.get("Storied-Body").is_some());
    let payload = if omitted { None } else { Some(payload(message)?) };
    Ok(Some(Seen {
        position: header(message, "Storied-Position")?.parse()?,
        name: header(message, "Storied-Event")?.to_owned(),
        stream: header(message, "Storied-Stream")?.to_owned(),
        version: header(message, "Storied-Version")?.parse()?,
        payload,
        hole: false,
    }))
}

/// Extracts the payload: the body is a map of `payload` and `metadata`, each a tagged byte string.
fn payload(message: &Message) -> Result<Value, Box<dyn Error + Send + Sync>> {
    let body: Value = ciborium::from_reader(message.payload.as_ref())?;
    let entries = body.as_map().ok_or("the body is no map")?;
    let entry = entries.iter().find(|(key, _)| key.as_text() == Some("payload"));
    let (_, tagged) = entry.ok_or("the body has no payload")?;
    match tagged {
        // An encoded CBOR item.
        Value::Tag(24, bytes) => {
            Ok(ciborium::from_reader(bytes.as_bytes().ok_or("no bytes in tag 24")?.as_slice())?)
        }
        // An embedded JSON text, shown as text.
        Value::Tag(262, bytes) => {
            let bytes = bytes.as_bytes().ok_or("no bytes in tag 262")?;
            Ok(Value::Text(String::from_utf8(bytes.clone())?))
        }
        other => Err(format!("a payload that is neither CBOR nor JSON: {other:?}").into()),
    }
}

fn header<'a>(message: &'a Message, name: &str) -> Result<&'a str, Box<dyn Error + Send + Sync>> {
    let headers: &HeaderMap = message.headers.as_ref().ok_or("a message without headers")?;
    Ok(headers.get(name).ok_or_else(|| format!("no header {name}"))?.as_str())
}

#[tokio::main]
async fn main() -> ExitCode {
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

const USAGE: &str = "usage: foreign_subscriber [URL [NAMESPACE]], by default nats://127.0.0.1:4222 storied";

async fn run() -> Result<(), Box<dyn Error + Send + Sync>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (url, namespace) = match arguments.as_slice() {
        [help] if help == "--help" => return Ok(writeln!(stdout(), "{USAGE}")?),
        [option, ..] if option.starts_with('-') => return Err(USAGE.into()),
        [] => ("nats://127.0.0.1:4222", "storied"),
        [url] => (url.as_str(), "storied"),
        [url, namespace] => (url.as_str(), namespace.as_str()),
        _ => return Err(USAGE.into()),
    };
    writeln!(stdout(), "listening for {namespace}.events.> on {url}")?;
    let mut failed = None;
    let followed = follow(url, namespace, |seen| {
        let printed = print(&seen);
        let go_on = printed.is_ok();
        failed = printed.err();
        go_on
    });
    followed.await?;
    failed.map_or(Ok(()), |error| Err(error.into()))
}

fn print(seen: &Seen) -> std::io::Result<()> {
    if seen.hole {
        writeln!(stdout(), "--- missing events: read them from the store, or from the stream in JetStream")?;
    }
    writeln!(stdout(), "{} {} {}#{} {:?}", seen.position, seen.name, seen.stream, seen.version, seen.payload)
}
