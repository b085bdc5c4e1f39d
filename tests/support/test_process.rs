//! Tests in processes of their own.

use std::process::Command;

/// Returns this program, as a process that runs one ignored test of a module.
///
/// `module` is the caller's `module_path!()`.
pub fn test_process(module: &str, test: &str) -> Command {
    // Names of tests do not contain the binary, which is the first part of the path.
    let (_, module) = module.split_once("::").expect("a module of a test binary");
    let mut command = Command::new(std::env::current_exe().expect("the path of this program"));
    command.args(["--exact", &format!("{module}::{test}"), "--ignored", "--nocapture"]);
    command
}

/// Runs an ignored test in a process of its own, where no other test allocates, and fails with it.
pub fn run_alone(module: &str, test: &str) {
    let output = test_process(module, test).output().expect("a process for the test");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{out}{err}");
    assert!(output.status.success() && out.contains("1 passed"), "{test} failed");
}
