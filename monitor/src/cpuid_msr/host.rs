//! What the policy is built from: the host's CPUID, microcode revision and vulnerabilities.

use std::fs;

/// Who made the CPU, as far as guests treat it differently.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Vendor {
    /// "GenuineIntel".
    Intel,
    /// "AuthenticAMD" and "HygonGenuine".
    Amd,
    /// Anything else.
    Other,
}

impl Vendor {
    /// From CPUID leaf 0: EAX, EBX, ECX, EDX.
    #[must_use]
    pub fn of([_, ebx, ecx, edx]: [u32; 4]) -> Vendor {
        let mut name = [0u8; 12];
        for (slot, word) in name.chunks_exact_mut(4).zip([ebx, edx, ecx]) {
            slot.copy_from_slice(&word.to_le_bytes());
        }
        match &name {
            b"GenuineIntel" => Vendor::Intel,
            b"AuthenticAMD" | b"HygonGenuine" => Vendor::Amd,
            _ => Vendor::Other,
        }
    }
}

/// The host's own CPUID.
pub(super) fn native_cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let r = x86::cpuid::native_cpuid::cpuid_count(leaf, subleaf);
    [r.eax, r.ebx, r.ecx, r.edx]
}

/// What an ordinary process can learn of the host CPU besides CPUID.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct HostFacts {
    /// Microcode revision; 0 where the host does not tell.
    pub microcode: u32,
    /// IA32_ARCH_CAPABILITIES (SDM Vol. 4, table 2-2) as far as the host says "Not affected".
    pub arch_capabilities: u64,
}

/// Which IA32_ARCH_CAPABILITIES bits say what the host's sysfs says (Linux,
/// Documentation/ABI/testing/sysfs-devices-system-cpu).
const NOT_AFFECTED: &[(&str, u64)] = &[
    // RDCL_NO
    ("meltdown", 1 << 0),
    // SSB_NO
    ("spec_store_bypass", 1 << 4),
    // MDS_NO
    ("mds", 1 << 5),
    // IF_PSCHANGE_MC_NO
    ("itlb_multihit", 1 << 6),
    // TAA_NO
    ("tsx_async_abort", 1 << 8),
    // SBDR_SSDP_NO, FBSDP_NO, PSDP_NO
    ("mmio_stale_data", 7 << 13),
    // GDS_NO
    ("gather_data_sampling", 1 << 26),
    // RFDS_NO
    ("reg_file_data_sampling", 1 << 27),
    // ITS_NO
    ("indirect_target_selection", 1 << 62),
];

impl HostFacts {
    /// From /proc/cpuinfo and /sys/devices/system/cpu/vulnerabilities. What cannot be read counts as unknown.
    #[must_use]
    pub fn read() -> HostFacts {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        HostFacts::from_text(&cpuinfo, |name| {
            fs::read_to_string(format!("/sys/devices/system/cpu/vulnerabilities/{name}")).ok()
        })
    }

    /// From the text of /proc/cpuinfo and of one file per vulnerability.
    #[must_use]
    pub fn from_text(cpuinfo: &str, vulnerability: impl Fn(&str) -> Option<String>) -> HostFacts {
        let microcode = cpuinfo
            .lines()
            .find(|line| line.starts_with("microcode"))
            .and_then(|line| line.split_once("0x"))
            .and_then(|(_, hex)| u32::from_str_radix(hex.trim(), 16).ok())
            .unwrap_or(0);
        let arch_capabilities = NOT_AFFECTED
            .iter()
            .filter(|(name, _)| vulnerability(name).is_some_and(|text| text.trim() == "Not affected"))
            .fold(0, |bits, (_, bit)| bits | bit);
        HostFacts { microcode, arch_capabilities }
    }
}
