//! Exclusive TCP ports.
//!
//! They lie below the ephemeral range. Inside that range, an outgoing connection of any process can
//! occupy the port while its server restarts, and a client of a stopped server can connect to
//! itself.

use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpListener};
use std::sync::atomic::{AtomicU32, Ordering};

/// A port that is reserved until this value is dropped, also while no server listens on it.
#[derive(Debug)]
pub struct Port {
    number: u16,
    /// Lock that other test processes respect; the kernel releases it when this process dies.
    _lock: File,
}

impl Port {
    /// Claims a free port.
    pub fn claim() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        // Locks are advisory and files have owners, so users do not share the directory; between
        // users the bind decides.
        let directory = std::env::temp_dir().join(format!("storied-ports-{}", nix::unistd::geteuid()));
        fs::create_dir_all(&directory).expect("a directory for port locks");
        let range = range();
        let size = u32::from(range.end - range.start);
        for _ in 0..size {
            // Processes start at different numbers, so that they rarely try the same port.
            let step = std::process::id().wrapping_mul(61).wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
            let number = range.start + u16::try_from(step % size).expect("smaller than a u16 range");
            let lock = File::create(directory.join(number.to_string())).expect("a port lock");
            if lock.try_lock().is_ok() && TcpListener::bind((Ipv4Addr::LOCALHOST, number)).is_ok() {
                return Self { number, _lock: lock };
            }
        }
        panic!("no free port in {range:?}");
    }

    /// Returns the number.
    pub fn number(&self) -> u16 {
        self.number
    }
}

fn range() -> std::ops::Range<u16> {
    let ephemeral =
        fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").expect("the ephemeral port range");
    let first: u16 =
        ephemeral.split_whitespace().next().and_then(|low| low.parse().ok()).expect("its lower end");
    first.saturating_sub(12_000).max(1024)..first
}
