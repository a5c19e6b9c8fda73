//! `subring doctor`: what the engines need of this host, whether it is there, why it matters and what to do.

use std::fmt::Write;

use host_driver_shim::capabilities::{HostCapabilities, Probe};
use serde::Serialize;

use crate::outcome::ExitCode;
use crate::paint::Paint;

/// Is it there?
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It is.
    Present,
    /// It is, but less than would be good.
    Limited,
    /// It is not.
    Missing,
}

/// Who needs it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Need {
    /// The raw engine cannot do without.
    Required,
    /// The raw engine is faster or more exact with it.
    Helpful,
    /// Only another engine uses it.
    OtherEngine,
}

/// One line of the report.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Finding {
    /// Short name.
    pub name: &'static str,
    /// Is it there?
    pub state: State,
    /// Who needs it.
    pub need: Need,
    /// What was seen.
    pub detail: String,
    /// Why it matters.
    pub why: &'static str,
    /// What to do when it is not there.
    pub remedy: &'static str,
}

/// The whole report.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Diagnosis {
    /// 1; changes as the statistics' version does.
    pub version: u32,
    /// The raw engine can run.
    pub raw_can_run: bool,
    /// Everything looked at.
    pub findings: Vec<Finding>,
}

impl Diagnosis {
    /// The exit code that tells it.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        if self.raw_can_run { ExitCode::Well } else { ExitCode::HostCannot }
    }
}

fn probed(name: &'static str, need: Need, probe: &Probe, why: &'static str, remedy: &'static str) -> Finding {
    let (state, detail) = match probe {
        Probe::Works(detail) => (State::Present, detail.clone()),
        Probe::Fails(detail) => (State::Missing, detail.clone()),
    };
    Finding { name, state, need, detail, why, remedy }
}

/// The least host mappings a world process should be allowed, and the least free memory in KiB for a default guest.
const ENOUGH_MAPPINGS: u64 = 65_530;
const ENOUGH_MEMORY_KIB: u64 = 320 * 1024;

/// Looks at this host.
#[must_use]
pub fn diagnose() -> Diagnosis {
    judge(&HostCapabilities::probe(), &|path| std::fs::read_to_string(path).ok())
}

/// Judges what was probed and what `read` gives for files under /proc.
fn judge(host: &HostCapabilities, read: &dyn Fn(&str) -> Option<String>) -> Diagnosis {
    let mut findings = vec![
        probed(
            "modify_ldt",
            Need::Required,
            &host.modify_ldt,
            "guest code runs in 32-bit segments of its own",
            "use a kernel with CONFIG_MODIFY_LDT_SYSCALL, sysctl kernel.modify_ldt=1 where it exists, and a container \
             profile that allows modify_ldt",
        ),
        probed(
            "seccomp filter",
            Need::Required,
            &host.seccomp,
            "the process that runs guest code is jailed with it; it also catches system calls of guest code",
            "use a kernel with CONFIG_SECCOMP_FILTER",
        ),
        probed(
            "memfd_create",
            Need::Required,
            &host.memfd,
            "guest RAM, code views and the arena are shared memory objects",
            "use Linux 3.17 or later, and a container profile that allows memfd_create",
        ),
        probed(
            "syscall user dispatch",
            Need::Required,
            &host.syscall_user_dispatch,
            "keeps system call instructions of guest code from the host's kernel",
            "use Linux 5.11 or later",
        ),
        probed(
            "cpuid faulting",
            Need::Helpful,
            &host.cpuid_faulting,
            "would show guest user programs the CPU we decide on even where the scan of their pages cannot see a cpuid",
            "nothing: the CPU or the hypervisor below does not offer it; cpuid is found by scanning",
        ),
        probed(
            "fsgsbase",
            Need::Helpful,
            &host.fsgsbase,
            "switching between guest and runtime segments without a system call",
            "use Linux 5.9 or later on a CPU that has it, and no 'nofsgsbase' on its command line",
        ),
    ];
    findings.push(proc_exe());
    findings.push(
        match read("/proc/sys/vm/mmap_min_addr").as_deref().map(str::trim).map(str::parse::<u64>) {
            Some(Ok(bytes)) => Finding {
                name: "vm.mmap_min_addr",
                state: State::Present,
                need: Need::Helpful,
                detail: format!("{bytes}"),
                why: "guest accesses to linear addresses below it are interpreted, which is slow but works",
                remedy: "nothing needs doing",
            },
            _ => unreadable("vm.mmap_min_addr", "tells which low addresses must be interpreted"),
        },
    );
    findings.push(match read("/proc/sys/vm/max_map_count").as_deref().map(str::trim).map(str::parse::<u64>) {
        Some(Ok(count)) => Finding {
            name: "vm.max_map_count",
            state: if count < ENOUGH_MAPPINGS { State::Limited } else { State::Present },
            need: Need::Helpful,
            detail: format!("{count}"),
            why: "each run of contiguous guest pages is a host mapping; with few allowed they are evicted often",
            remedy: "sysctl vm.max_map_count=65530 or more",
        },
        _ => unreadable("vm.max_map_count", "limits the host mappings of a world"),
    });
    findings.push(cpu_flag(read, "nx", "guest kernels with PAE use it, and code views rely on it"));
    findings.push(memory(read));
    findings.push(cores());
    findings.push(probed(
        "userfaultfd",
        Need::Helpful,
        &host.userfaultfd,
        "page faults of guest programs cost a third less where pages can be let in from longer mappings",
        "Linux 5.14 or newer with CONFIG_USERFAULTFD; in Docker a seccomp profile that allows userfaultfd",
    ));
    findings.push(probed(
        "protection keys",
        Need::Helpful,
        &host.protection_keys,
        "--isolation strict costs next to nothing with them; without, system calls of guest programs cost ten times as much",
        "a CPU with PKU that the hypervisor passes on, and Linux 6.12 or newer",
    ));
    findings.push(probed(
        "/dev/kvm",
        Need::OtherEngine,
        &host.kvm,
        "the kvm and ring1 engines; the node alone does not prove that the hardware is there",
        "only for those engines: a CPU with VT-x or SVM, the kvm module, and access to the node",
    ));
    let raw_can_run = findings.iter().all(|f| f.need != Need::Required || f.state != State::Missing);
    Diagnosis { version: 1, raw_can_run, findings }
}

fn unreadable(name: &'static str, why: &'static str) -> Finding {
    Finding {
        name,
        state: State::Limited,
        need: Need::Helpful,
        detail: "cannot be read".into(),
        why,
        remedy: "mount /proc",
    }
}

fn proc_exe() -> Finding {
    let (state, detail) = match std::fs::read_link("/proc/self/exe") {
        Ok(_) => (State::Present, String::new()),
        Err(error) => (State::Missing, error.to_string()),
    };
    Finding {
        name: "/proc/self/exe",
        state,
        need: Need::Required,
        detail,
        why: "a world is this program executed again, through that name",
        remedy: "mount /proc",
    }
}

fn cpu_flag(read: &dyn Fn(&str) -> Option<String>, flag: &'static str, why: &'static str) -> Finding {
    let has = read("/proc/cpuinfo").is_some_and(|text| {
        text.lines().any(|l| l.starts_with("flags") && l.split_ascii_whitespace().any(|f| f == flag))
    });
    Finding {
        name: flag,
        state: if has { State::Present } else { State::Missing },
        need: Need::Helpful,
        detail: if has { String::new() } else { "not among the CPU flags".into() },
        why,
        remedy: "switch it on in the firmware set-up",
    }
}

fn memory(read: &dyn Fn(&str) -> Option<String>) -> Finding {
    let kib = read("/proc/meminfo").and_then(|text| {
        let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?.to_owned();
        line.split_ascii_whitespace().next()?.parse::<u64>().ok()
    });
    Finding {
        name: "memory",
        state: if kib.is_some_and(|k| k >= ENOUGH_MEMORY_KIB) { State::Present } else { State::Limited },
        need: Need::Helpful,
        detail: kib.map_or("unknown".into(), |k| format!("{} MiB available", k / 1024)),
        why: "guest RAM is taken as the guest touches it; the default guest may use 256 MiB and we 64 more",
        remedy: "run a smaller guest with -m",
    }
}

fn cores() -> Finding {
    let count = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    Finding {
        name: "cpus",
        state: State::Present,
        need: Need::Helpful,
        detail: format!("{count}"),
        why: "a virtual CPU and its worlds share one; devices and timers use the others",
        remedy: "nothing needs doing",
    }
}

/// The report for people.
#[must_use]
pub fn render(diagnosis: &Diagnosis, paint: Paint) -> String {
    let mut out = String::new();
    for finding in &diagnosis.findings {
        let blocks = finding.need == Need::Required;
        let mark = match (finding.state, paint.enabled()) {
            (State::Present, true) => paint.good("✔"),
            (State::Present, false) => "yes ".into(),
            (State::Limited, true) => paint.warn("!"),
            (State::Limited, false) => "low ".into(),
            (State::Missing, true) if blocks => paint.bad("✘"),
            (State::Missing, true) => paint.warn("✘"),
            (State::Missing, false) if blocks => "NO  ".into(),
            (State::Missing, false) => "no  ".into(),
        };
        let need = match finding.need {
            Need::Required => "required",
            Need::Helpful => "helpful",
            Need::OtherEngine => "other engines",
        };
        let detail = if finding.detail.is_empty() { String::new() } else { format!(": {}", finding.detail) };
        let _ = writeln!(out, "{mark} {:<22} {need:<14}{detail}", finding.name);
        if finding.state != State::Present {
            let _ = writeln!(out, "       why: {}\n       do:  {}", finding.why, finding.remedy);
        }
    }
    let verdict = if diagnosis.raw_can_run {
        paint.good("the raw engine can run here")
    } else {
        paint.bad("the raw engine cannot run here; --engine interp can")
    };
    let _ = writeln!(out, "\n{verdict}");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(modify_ldt: Probe) -> HostCapabilities {
        let works = || Probe::Works(String::new());
        HostCapabilities {
            modify_ldt,
            syscall_user_dispatch: works(),
            seccomp: works(),
            memfd: works(),
            cpuid_faulting: Probe::Fails("no".into()),
            fsgsbase: works(),
            userfaultfd: works(),
            protection_keys: works(),
            kvm: Probe::Fails("no".into()),
        }
    }

    #[test]
    fn only_what_is_required_keeps_the_raw_engine_from_running() {
        let fine = judge(&host(Probe::Works(String::new())), &|_| None);
        assert!(fine.raw_can_run);
        assert_eq!(fine.exit_code(), ExitCode::Well);
        let without = judge(&host(Probe::Fails("Function not implemented".into())), &|_| None);
        assert_eq!(without.exit_code(), ExitCode::HostCannot);
        let text = render(&without, Paint::PLAIN);
        assert!(text.contains("NO   modify_ldt") && text.contains("Function not implemented"), "{text}");
        assert!(text.contains("CONFIG_MODIFY_LDT_SYSCALL") && text.contains("cannot run here"), "{text}");
    }

    #[test]
    fn a_low_map_count_is_said() {
        let read = |path: &str| path.ends_with("max_map_count").then(|| "1000\n".to_owned());
        let diagnosis = judge(&host(Probe::Works(String::new())), &read);
        let finding = diagnosis.findings.iter().find(|f| f.name == "vm.max_map_count").unwrap();
        assert_eq!((finding.state, finding.detail.as_str()), (State::Limited, "1000"));
    }
}
