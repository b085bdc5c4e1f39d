//! The examples with bad input.
//!
//! Each prints a readable sentence within seconds, fails and leaves no files.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::support::example;
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
        ("bank", &["--callers", "18446744073709551615"], "it is a number from 1 to 10000"),
        ("bank", &["--accounts", "18446744073709551615"], "it is a number from 2 to 100000"),
        ("bank", &["--transfers", "18446744073709551615"], "it is a number from 0 to 10000000"),
        ("bank", &["--seconds", "18446744073709551615"], "it is a number from 0 to 604800"),
        ("bank", &["--nodes", "18446744073709551615"], "it is a number from 1 to 64"),
        ("retail", &["--nodes", "18446744073709551615"], "it is a number from 1 to 64"),
        ("bank", &["--transfers", "10", "--journal", "missing/journal"], "missing/journal"),
        ("fulfilment", &["--nonsense"], "unknown option --nonsense"),
        ("fulfilment", &["--orders", "18446744073709551615"], "it is a number from 0 to 1000000"),
        ("courses", &["--nonsense"], "usage: courses [STUDENTS]"),
        ("courses", &["18446744073709551616"], "a number from 1 to 1000"),
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

/// A node waits for its server, which may start later, and reports that within 2 s.
#[test]
fn a_wait_for_a_server_is_reported() {
    for (name, args) in [
        ("guide", &["node"][..]),
        ("guide", &["sell"]),
        ("retail", &["--store", "postgres"]),
        ("bank", &["--store", "postgres"]),
    ] {
        let dir = TempDir::new().unwrap();
        let program = example(name);
        let start = Instant::now();
        let mut child = Command::new(program)
            .args(args)
            .current_dir(dir.path())
            .env("DATABASE_URL", NO_POSTGRES)
            .env("NATS_URL", NO_NATS)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stderr.take().unwrap()).read_line(&mut line).unwrap();
        let took = start.elapsed();
        child.kill().unwrap();
        child.wait().unwrap();
        let shown = format!("{name} {args:?} after {took:?}: {line}");
        assert!(took < PATIENCE, "{shown}");
        for part in ["waiting (127.0.0.1:9: connection refused)", "giving up after 30s"] {
            assert!(line.contains(part), "{shown}");
        }
    }
}

/// A server that accepts connections and never answers.
#[test]
fn a_server_that_does_not_answer_is_reported() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap();
    let (postgres, nats) = (format!("postgres://storied@{address}/storied"), format!("nats://{address}"));
    for (name, args, sentence) in [
        ("guide", &["migrate"][..], "PostgreSQL did not answer within 2 s"),
        ("import_goes", &[&postgres, NO_POSTGRES], "opening FROM failed: no answer within 2 s"),
        ("retail", &["--store", "postgres", "--reset"], "PostgreSQL did not answer within 2s"),
        ("foreign_subscriber", &[&nats], "timed out"),
    ] {
        let dir = TempDir::new().unwrap();
        let mut command = Command::new(example(name));
        command.args(args).current_dir(dir.path()).env("DATABASE_URL", &postgres).stdin(Stdio::null());
        let start = Instant::now();
        let output = command.output().unwrap();
        let took = start.elapsed();
        let shown = format!("{name} {args:?} after {took:?}: {}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.status.code(), Some(1), "{shown}");
        assert!(shown.contains(&format!("error: {sentence}")) && took < PATIENCE, "{shown}");
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
        ("courses", &["10"]),
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
    for name in ["import_goes", "foreign_subscriber", "retail", "bank", "courses"] {
        let Said { output, left, .. } = run(name, &["--help"], Stdio::piped());
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(String::from_utf8_lossy(&output.stdout).to_lowercase().contains("usage"), "{name}");
        assert_eq!(left, [] as [&str; 0], "{name}");
    }
}

/// 100 students enrol at the same time; the program itself checks that both rules hold.
#[test]
fn no_course_and_no_student_has_too_many_enrolments() {
    let Said { output, left, .. } = run("courses", &["100"], Stdio::piped());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said = String::from_utf8_lossy(&output.stdout);
    let lines: Vec<_> = said.lines().collect();
    let [of_students, of_courses] = lines.as_slice() else { panic!("{said}") };
    let number = |line: &str| line.split(' ').next().and_then(|number| number.parse::<u32>().ok()).unwrap();
    assert_eq!(number(of_students), number(of_courses), "{said}");
    // A student with fewer than 3 courses has found 3 of the 5 courses of the group full.
    assert!(number(of_courses) >= 4 * 3 * 15, "{said}");
    assert_eq!(left, [] as [&str; 0], "{said}");
}
