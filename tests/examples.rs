//! The examples with bad input.
//!
//! Each prints a readable sentence within seconds, fails and leaves no files.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test reports by panicking")]
#![allow(missing_docs, unreachable_pub, reason = "tests are not part of the API")]

#[path = "support/example.rs"]
mod example;

use std::fs::OpenOptions;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use example::example;
use tempfile::TempDir;

/// Maximum time that a person waits: 2 s on an idle machine.
const PATIENCE: Duration = Duration::from_secs(if cfg!(debug_assertions) { 10 } else { 2 });

/// A URL without a server.
const NO_POSTGRES: &str = "postgres://storied:storied@127.0.0.1:9/storied";
const NO_NATS: &str = "nats://127.0.0.1:9";

/// The output of an example, and its files.
struct Said {
    output: Output,
    took: Duration,
    left: Vec<String>,
}

fn run(name: &str, args: &[&str], stdout: Stdio) -> Said {
    let program = example(name);
    let dir = TempDir::new().unwrap();
    let start = Instant::now();
    let output = Command::new(program)
        .args(args)
        .current_dir(dir.path())
        .env("DATABASE_URL", NO_POSTGRES)
        .env("NATS_URL", NO_NATS)
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(Stdio::piped())
        .spawn()
        .and_then(std::process::Child::wait_with_output)
        .unwrap();
    let took = start.elapsed();
    let left = std::fs::read_dir(dir.path()).unwrap();
    let left = left.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    Said { output, took, left }
}

#[test]
fn bad_input_is_answered_with_a_sentence() {
    for (name, args, sentence) in [
        ("guide", &["nonsense"][..], "nonsense is none of: migrate, node, sell"),
        ("guide", &["migrate"], "refused"),
        ("import_goes", &[], "usage: import_goes FROM TO"),
        ("import_goes", &["--help", "x", "y"], "usage: import_goes FROM TO"),
        ("import_goes", &["a", "b"], "opening FROM failed"),
        ("import_goes", &[NO_POSTGRES, NO_POSTGRES], "opening FROM failed"),
        ("foreign_subscriber", &["--nonsense"], "usage: foreign_subscriber"),
        ("foreign_subscriber", &[NO_NATS], "refused"),
        ("foreign_subscriber", &["a", "b", "c"], "usage: foreign_subscriber"),
        ("retail", &["--nonsense"], "unknown option --nonsense"),
        ("retail", &["--input", "none.csv"], "none.csv"),
        ("retail", &["--bus", "core"], "127.0.0.1:9"),
        ("retail", &["--bus", "jetstream", "--reset"], "127.0.0.1:9"),
        ("bank", &["--nonsense"], "unknown option --nonsense"),
        ("bank", &["--transfers", "10", "--journal", "missing/journal"], "missing/journal"),
    ] {
        let Said { output, took, left } = run(name, args, Stdio::piped());
        let stderr = String::from_utf8(output.stderr).unwrap();
        let shown = format!("{name} {args:?} after {took:?}: {stderr}");
        assert!(matches!(output.status.code(), Some(1 | 2)), "{:?}: {shown}", output.status);
        assert!(stderr.contains(sentence), "{shown}");
        let last = stderr.lines().last().unwrap();
        assert!(
            last.starts_with("error: ") && last.contains(sentence),
            "the reason is the last line: {shown}"
        );
        assert!(
            !stderr.contains("panicked") && !stderr.contains("Error {") && !stderr.contains("Some("),
            "{shown}"
        );
        assert!(took < PATIENCE, "{shown}");
        assert_eq!(left, [] as [&str; 0], "{shown}");
    }
}

#[test]
fn an_input_is_a_regular_file_with_rows_of_bounded_size() {
    let dir = TempDir::new().unwrap();
    let file = |name: &str| dir.path().join(name).display().to_string();
    let (fifo, endless) = (file("fifo"), file("endless.csv"));
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let header = "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country\n";
    std::fs::write(&endless, format!("{header}1,{}", "x".repeat(2 << 20))).unwrap();
    for (path, problem) in [
        (fifo.as_str(), "is not a regular file"),
        ("/dev/null", "is not a regular file"),
        (".", "is not a regular file"),
        (&endless, "a row has more than 1048576 bytes"),
    ] {
        let Said { output, took, .. } = run("retail", &["--input", path], Stdio::piped());
        let shown = format!("{path} after {took:?}: {}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.status.code(), Some(1), "{shown}");
        assert!(shown.contains(&format!("error: {path}")) && shown.contains(problem), "{shown}");
        assert!(took < PATIENCE, "{shown}");
    }
}

#[test]
fn a_full_disk_is_no_panic() {
    for (name, args) in [
        ("quick_start", &[][..]),
        ("guide", &[]),
        ("import_goes", &["--help"]),
        ("foreign_subscriber", &["--help"]),
        ("retail", &["--help"]),
        ("bank", &["--help"]),
        ("bank", &["--transfers", "10"]),
    ] {
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let Said { output, .. } = run(name, args, full.into());
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{name} {args:?}: {stderr}");
        let text = stderr.to_lowercase();
        assert!(!text.contains("panicked") && text.contains("error: "), "{name} {args:?}: {stderr}");
    }
}

#[test]
fn help_is_given_without_a_server() {
    for name in ["import_goes", "foreign_subscriber", "retail", "bank"] {
        let Said { output, left, .. } = run(name, &["--help"], Stdio::piped());
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(String::from_utf8_lossy(&output.stdout).to_lowercase().contains("usage"), "{name}");
        assert_eq!(left, [] as [&str; 0], "{name}");
    }
}
