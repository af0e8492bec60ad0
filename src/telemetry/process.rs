//! What Linux tells of this process, under the names that every Prometheus client uses for it.

use std::fs;

/// Memory in use that is in RAM, in bytes.
pub fn resident_memory_bytes() -> Option<f64> {
    field_of("/proc/self/status", "VmRSS:").map(|kib| kib * 1024.0)
}

/// Open file descriptors.
pub fn open_fds() -> Option<f64> {
    // The directory that is read is open too, and gone afterwards.
    Some(fs::read_dir("/proc/self/fd").ok()?.count().saturating_sub(1) as f64)
}

/// How many may be open: the soft limit.
pub fn max_fds() -> Option<f64> {
    field_of("/proc/self/limits", "Max open files")
}

/// CPU time of all threads, user and system, in seconds.
pub fn cpu_seconds() -> Option<f64> {
    Some((stat(14)? + stat(15)?) / TICKS_PER_SECOND)
}

/// When the process started, in seconds since the Unix epoch.
pub fn start_time_seconds() -> Option<f64> {
    Some(field_of("/proc/stat", "btime")? + stat(22)? / TICKS_PER_SECOND)
}

/// The first number behind `name` at the start of a line.
fn field_of(file: &str, name: &str) -> Option<f64> {
    let text = fs::read_to_string(file).ok()?;
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    rest.split_whitespace().next()?.parse().ok()
}

/// A field of `/proc/self/stat`, numbered from 1 as in proc(5).
fn stat(number: usize) -> Option<f64> {
    let text = fs::read_to_string("/proc/self/stat").ok()?;
    // The second field, the name, is in parentheses and may hold anything.
    let (_, rest) = text.rsplit_once(')')?;
    rest.split_whitespace().nth(number - 3)?.parse().ok()
}

/// `USER_HZ`: 100 on every architecture of Linux that Rust compiles for, whatever the kernel's own tick.
const TICKS_PER_SECOND: f64 = 100.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linux_tells() {
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_secs_f64();
        assert!(resident_memory_bytes().unwrap() > 1e5);
        assert!(open_fds().unwrap() >= 3.0 && max_fds().unwrap() >= open_fds().unwrap());
        assert!(cpu_seconds().unwrap() < 1e6);
        let age = now - start_time_seconds().unwrap();
        assert!((-2.0..1e6).contains(&age), "{age}");
    }
}
