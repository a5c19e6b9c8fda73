//! What a running guest costs its host: its processes, their CPU time and their memory, by what /proc says.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

/// The name a world process runs under (its first argument).
const WORLD: &[u8] = b"subring-world\0";

/// Ticks a second in /proc/PID/stat: what Linux on x86 always shows to programs.
const USER_HZ: u64 = 100;

/// The worlds of the monitor with this process id.
#[must_use]
pub fn worlds_of(monitor: u32) -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|&pid| is_world(pid) && parent_of(pid) == Some(monitor))
        .collect()
}

/// The process is there and is a world (a zombie is neither).
#[must_use]
pub fn is_world(pid: u32) -> bool {
    fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|cmdline| cmdline == WORLD)
}

/// Fields of /proc/PID/stat from the third on (state, parent, ...): the name before them may hold anything.
fn stat_fields(pid: u32) -> Option<Vec<String>> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    Some(rest.split_whitespace().map(str::to_owned).collect())
}

fn parent_of(pid: u32) -> Option<u32> {
    stat_fields(pid)?.get(1)?.parse().ok()
}

/// User and system time of all threads, dead ones included, with the clock tick (10 ms) as its unit.
#[must_use]
pub fn cpu_time(pid: u32) -> Option<Duration> {
    let fields = stat_fields(pid)?;
    let ticks = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    Some(Duration::from_millis(ticks * 1000 / USER_HZ))
}

/// Voluntary and forced context switches of all living threads: how often a process woke up.
#[must_use]
pub fn context_switches(pid: u32) -> Option<u64> {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten() {
        let status = fs::read_to_string(task.path().join("status")).ok()?;
        let counts = status.lines().filter(|line| line.contains("ctxt_switches:"));
        sum += counts.filter_map(|line| line.split_whitespace().last()?.parse::<u64>().ok()).sum::<u64>();
    }
    Some(sum)
}

/// Memory a guest costs beside its RAM, in bytes.
///
/// Guest RAM is the memory object `subring-ram`; its pages count nowhere here, whoever maps them. Other memory objects
/// (code views, arenas) count with every page they hold, mapped or not, and once, however many processes share them.
/// All other mappings count with their proportional share (Pss). The host's page tables count, those for guest RAM
/// included: the guest would not cost them elsewhere.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Overhead {
    /// Anonymous memory and files of the monitor process.
    pub monitor: u64,
    /// The same of all worlds.
    pub worlds: u64,
    /// Memory objects other than guest RAM.
    pub objects: u64,
    /// Page tables of the monitor and all worlds.
    pub page_tables: u64,
}

impl Overhead {
    /// All together, bytes.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.monitor + self.worlds + self.objects + self.page_tables
    }
}

/// Measures a running guest; None when it is gone or its /proc files are closed to us.
#[must_use]
pub fn overhead(monitor: u32) -> Option<Overhead> {
    let worlds = worlds_of(monitor);
    let mut result = Overhead { monitor: pss_beside_objects(monitor)?, ..Overhead::default() };
    result.page_tables = page_tables(monitor)?;
    let mut objects = objects_of(monitor)?;
    for world in worlds {
        result.worlds += pss_beside_objects(world)?;
        result.page_tables += page_tables(world)?;
        objects.extend(objects_of(world)?);
    }
    result.objects = objects.values().sum();
    Some(result)
}

/// Sum of Pss of all mappings but those of memory objects, bytes.
fn pss_beside_objects(pid: u32) -> Option<u64> {
    Some(pss(&fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?))
}

fn pss(smaps: &str) -> u64 {
    let (mut sum, mut counts) = (0, true);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or("");
        if first == "Pss:" && counts {
            sum += words.next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024;
        } else if !first.ends_with(':') {
            // Address range, permissions, offset, device, inode, name.
            counts = !words.nth(4).is_some_and(|name| name.starts_with("/memfd:"));
        }
    }
    sum
}

fn page_tables(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmPTE:"))?;
    Some(kib.trim().trim_end_matches(" kB").parse::<u64>().ok()? * 1024)
}

/// Bytes held by the memory objects a process has open, guest RAM excepted, by inode.
fn objects_of(pid: u32) -> Option<BTreeMap<u64, u64>> {
    let mut objects = BTreeMap::new();
    for fd in fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten() {
        let Ok(target) = fs::read_link(fd.path()) else { continue };
        let name = target.to_string_lossy().into_owned();
        if name.starts_with("/memfd:")
            && !name.starts_with("/memfd:subring-ram")
            && let Ok(meta) = fs::metadata(fd.path())
        {
            objects.insert(meta.ino(), meta.blocks() * 512);
        }
    }
    Some(objects)
}

/// What an idle guest costs.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Idle {
    /// CPU time of the monitor process, as a share of one CPU.
    pub monitor: f64,
    /// The same of all worlds.
    pub worlds: f64,
    /// Context switches of all of them in a second.
    pub switches: f64,
}

impl Idle {
    /// CPU time altogether, as a share of one CPU.
    #[must_use]
    pub fn share(&self) -> f64 {
        self.monitor + self.worlds
    }
}

/// Watches a guest for so long, in which it should do nothing; None when it goes away meanwhile.
#[must_use]
pub fn watch(monitor: u32, time: Duration) -> Option<Idle> {
    let started = Instant::now();
    let worlds = worlds_of(monitor);
    let used = || {
        let worlds_time = worlds.iter().map(|&pid| cpu_time(pid)).sum::<Option<Duration>>()?;
        let switches = worlds.iter().map(|&pid| context_switches(pid)).sum::<Option<u64>>()?;
        Some((cpu_time(monitor)?, worlds_time, switches + context_switches(monitor)?))
    };
    let before = used()?;
    std::thread::sleep(time);
    let after = used()?;
    let seconds = started.elapsed().as_secs_f64();
    let share = |before: Duration, after: Duration| after.saturating_sub(before).as_secs_f64() / seconds;
    Some(Idle {
        monitor: share(before.0, after.0),
        worlds: share(before.1, after.1),
        switches: after.2.saturating_sub(before.2) as f64 / seconds,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn this_process_has_used_time_and_memory_and_is_no_world() {
        let me = std::process::id();
        assert!(cpu_time(me).is_some());
        assert!(context_switches(me).unwrap() > 0);
        assert!(!is_world(me));
        assert!(worlds_of(me).is_empty());
        let cost = overhead(me).unwrap();
        assert!(cost.monitor > 100 << 10, "{cost:?}");
        assert!(cost.page_tables > 0 && cost.worlds == 0, "{cost:?}");
    }

    #[test]
    fn a_process_that_sleeps_costs_next_to_nothing_and_one_that_spins_a_cpu() {
        let run = |script: &str| Command::new("sh").args(["-c", script]).spawn().unwrap();
        let (mut sleeper, mut spinner) = (run("sleep 30"), run("while :; do :; done"));
        let idle = watch(sleeper.id(), Duration::from_millis(300)).unwrap();
        let busy = watch(spinner.id(), Duration::from_millis(300)).unwrap();
        for child in [&mut sleeper, &mut spinner] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert!(idle.share() < 0.1, "{idle:?}");
        assert!(busy.share() > idle.share(), "{busy:?}");
    }

    #[test]
    fn mappings_of_memory_objects_do_not_count_as_mappings() {
        let smaps = "\
            00010000-00020000 rw-s 00000000 00:01 9 /memfd:subring-ram (deleted)\nPss: 64 kB\nPss_Dirty: 64 kB\n\
            00400000-00500000 r-xp 00000000 08:01 7 /usr/bin/x y\nPss: 8 kB\nVmFlags: rd ex\n\
            7f0000000000-7f0000001000 rw-p 00000000 00:00 0 \nPss: 4 kB\n";
        assert_eq!(pss(smaps), 12 << 10);
    }
}
