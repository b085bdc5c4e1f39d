//! Every dependency has a reason and a permissive licence.
//!
//! The test needs no network and only packages that building the tests has downloaded. cargo-deny
//! checks other platforms, sources and advisories (`scripts/deny`).

use std::process::Command;

use serde_json::Value;

const MANIFEST: &str = include_str!("../../Cargo.toml");

/// Licences that require no more than keeping a notice.
const PERMITTED: [&str; 11] = [
    "MIT",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-1-Clause",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "ISC",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Returns whether the permitted licences satisfy an SPDX expression.
///
/// Parentheses enclose only alternatives.
fn is_permitted(expression: &str) -> bool {
    let flat = expression.replace(['(', ')'], "").replace('/', " OR ");
    flat.split(" AND ").all(|part| part.split(" OR ").any(|one| PERMITTED.contains(&one.trim())))
}

/// Returns the platform of this test.
fn host() -> String {
    let output = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
        .arg("-vV")
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().find_map(|line| line.strip_prefix("host: ")).unwrap().to_owned()
}

#[test]
fn licences_ask_for_no_more_than_a_notice() {
    assert!(is_permitted("(MIT OR Apache-2.0) AND Unicode-3.0") && is_permitted("MIT OR LGPL-2.1-or-later"));
    assert!(!is_permitted("GPL-3.0-only") && !is_permitted("MIT AND LGPL-2.1-or-later"));
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["metadata", "--locked", "--offline", "--all-features", "--format-version", "1"])
        // Cargo downloads only the packages of the platform that it builds for.
        .args(["--filter-platform", &host()])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    assert!(packages.len() > 100, "{} packages are too few to be all", packages.len());
    for package in packages {
        let (name, version) = (&package["name"], &package["version"]);
        let licence = package["license"].as_str().unwrap_or("none");
        assert!(is_permitted(licence), "{name} {version} is under {licence}");
        let source = package["source"].as_str();
        let registry = source.is_none_or(|source| source.ends_with("github.com/rust-lang/crates.io-index"));
        assert!(registry, "{name} {version} comes from {source:?}, and not from crates.io");
    }
}

#[test]
fn every_dependency_has_a_reason() {
    let mut within = false;
    for line in MANIFEST.lines() {
        if line.starts_with('[') {
            within = line.contains("dependencies");
        } else if within && line.contains(" = ") {
            let reason = line.split_once(" # ").map_or("", |(_, reason)| reason.trim());
            assert!(reason.len() > 5, "no reason: {line}");
        }
    }
}
