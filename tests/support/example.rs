//! The examples as programs.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

/// Returns the program of an example, built like this test. Cargo decides whether to rebuild.
pub fn example(name: &str) -> PathBuf {
    static BUILT: Mutex<BTreeMap<String, PathBuf>> = Mutex::new(BTreeMap::new());
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    built.entry(name.to_owned()).or_insert_with(|| build(name)).clone()
}

fn build(name: &str) -> PathBuf {
    // target/<profile>/deps/<this test>
    let test = std::env::current_exe().unwrap();
    let profile_dir = test.parent().and_then(Path::parent).unwrap();
    let profile = match profile_dir.file_name().and_then(|name| name.to_str()).unwrap() {
        "debug" => "dev",
        other => other,
    };
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let mut command = Command::new(cargo);
    // Variables that cargo sets for its tests. The build script of ring reads them, so that it
    // would run again with a rebuild of all dependents of ring, here and in the next cargo call.
    let told = |name: &str| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_");
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_str().is_some_and(told)) {
        command.env_remove(name);
    }
    command
        .args(["build", "--quiet", "--example", name, "--profile", profile, "--target-dir"])
        .arg(profile_dir.parent().unwrap())
        .current_dir(env!("CARGO_MANIFEST_DIR"));
    // With the features of this test; otherwise cargo would compile storied again without them.
    for (feature, on) in [("cli", cfg!(feature = "cli")), ("otel", cfg!(feature = "otel"))] {
        command.args(on.then_some(["--features", feature]).into_iter().flatten());
    }
    let built = command.status().unwrap();
    assert!(built.success(), "the example does not build: {built}");
    profile_dir.join("examples").join(name)
}
