//! The one table that decides which CPUID leaves, feature bits and MSRs a guest sees, on every engine.
//!
//! 1. `features`: every CPUID bit with a decision and its reason. What no row names is hidden.
//! 2. `msrs`: every MSR that exists for the guest, and those a guest may look for in vain, with reasons.
//! 3. `model`: what a run's user takes away from it.
//! 4. `host`: what the policy is built from: the host's CPUID, its microcode revision, what it says about Meltdown.
//!
//! The rule behind the rows: what runs natively at CPL 3 without state of its own is shown as far as the host has it;
//! what needs state the engines do not carry (AVX), privileged machinery they do not emulate (APIC, MCE, VMX), or
//! behaves differently when deprivileged (SYSENTER, RDTSCP) is hidden. `Display` prints the table for the host at hand.

mod features;
mod host;
mod model;
mod msrs;

pub use features::{FEATURES, FeatureBit, Register, Rule};
pub use host::{HostFacts, Vendor};
pub use model::CpuModel;
pub use msrs::{MSRS, MsrKind, MsrRow, VendorSet, WrmsrEffect};

use crate::cpum::CpuState;
use host_driver_shim::world::CpuidRow;
use std::collections::BTreeMap;
use std::fmt;

/// Guest physical address width in bits, as CPUID 8000_0008h reports it: what PAE has had since the Pentium Pro.
pub const PHYS_BITS: u32 = 36;

/// The last basic leaf shown. Above lie XSAVE (0Dh), topology (0Bh) and TSC frequency (15h), all hidden.
const LAST_BASIC: u32 = 7;
/// The signature of KVM's interface, of which the guest gets the clock, and the last leaf of it.
const HYPERVISOR: u32 = 0x4000_0000;
/// KVM's features (Linux, Documentation/virt/kvm/x86/cpuid.rst), in EAX.
const KVM_FEATURES: u32 = 0x4000_0001;
/// Our own name, where a second hypervisor interface would be: it has no leaves of its own.
const OWN_NAME: u32 = 0x4000_0100;
/// QEMU's TCG, where subring itself runs on it: it checks neither limits nor types of segments, on any engine that uses
/// the CPU, and a guest that tests a CPU has to know.
const BELOW: u32 = 0x4000_0200;
const TCG: &[u8; 12] = b"TCGTCGTCGTCG";
/// CPUID 1 ECX: there is a hypervisor.
const HYPERVISOR_PRESENT: u32 = 1 << 31;
/// CPUID 8000_0007h EDX: the time-stamp counter runs at one rate, always.
const INVARIANT_TSC: u32 = 1 << 8;
/// The first and the last extended leaf shown.
const EXTENDED: u32 = 0x8000_0000;
const LAST_EXTENDED: u32 = 0x8000_0021;
/// Feature bits AMD repeats from leaf 1 in leaf 8000_0001h EDX (AMD APM Vol. 3, appendix D).
const AMD_MIRRORED: u32 = 0x0183_f3ff;

/// The policy for the guests of this host.
#[derive(Clone, Debug)]
pub struct CpuPolicy {
    leaves: BTreeMap<(u32, u32), [u32; 4]>,
    vendor: Vendor,
    microcode: u32,
    arch_capabilities: u64,
    invariant_tsc: bool,
}

/// Leaves that look at ECX.
fn has_subleaves(leaf: u32) -> bool {
    matches!(leaf, 4 | 7)
}

impl CpuPolicy {
    /// The policy for the CPU this process runs on.
    #[must_use]
    pub fn host() -> CpuPolicy {
        CpuPolicy::new(&host::native_cpuid, &HostFacts::read())
    }

    /// The policy for a host that answers `cpuid(leaf, subleaf)` with EAX, EBX, ECX, EDX.
    #[must_use]
    pub fn new(cpuid: &dyn Fn(u32, u32) -> [u32; 4], facts: &HostFacts) -> CpuPolicy {
        let identity = cpuid(0, 0);
        let vendor = Vendor::of(identity);
        let arch_capabilities = if vendor == Vendor::Intel { facts.arch_capabilities } else { 0 };
        let invariant_tsc =
            cpuid(EXTENDED, 0)[0] >= 0x8000_0007 && cpuid(0x8000_0007, 0)[3] & INVARIANT_TSC != 0;
        let microcode = facts.microcode;
        let mut policy =
            CpuPolicy { leaves: BTreeMap::new(), vendor, microcode, arch_capabilities, invariant_tsc };
        policy.build(cpuid, identity);
        policy
    }

    /// Hides what answers differently each time, so that two machines with the same inputs do the same.
    pub fn hide_randomness(&mut self) {
        self.take_away(FEATURES.iter().filter(|feature| matches!(feature.name, "RDRAND" | "RDSEED")));
    }

    /// Hides features, whatever their rows say.
    pub fn take_away<'a>(&mut self, features: impl IntoIterator<Item = &'a FeatureBit>) {
        let mut clear = |leaf, register: Register, bits: u32| {
            if let Some(values) = self.leaves.get_mut(&(leaf, 0)) {
                values[register as usize] &= !bits;
            }
        };
        for feature in features {
            let bit = 1 << feature.bit;
            clear(feature.leaf, feature.register, bit);
            if (feature.leaf, feature.register) == (1, Register::Edx) {
                clear(0x8000_0001, Register::Edx, bit & AMD_MIRRORED);
            }
        }
    }

    fn build(&mut self, cpuid: &dyn Fn(u32, u32) -> [u32; 4], identity: [u32; 4]) {
        let last_basic = identity[0].min(LAST_BASIC);
        let mut put = |leaf, sub, value| self.leaves.insert((leaf, sub), value);
        put(0, 0, [last_basic, identity[1], identity[2], identity[3]]);

        let mut one = cpuid(1, 0);
        // EBX: brand index 0, the CLFLUSH line size, one logical processor with APIC ID 0.
        one[1] = one[1] & 0xff00 | 0x0001_0000;
        put(1, 0, one);
        if self.vendor == Vendor::Intel {
            if last_basic >= 2 {
                put(2, 0, cpuid(2, 0));
            }
            if last_basic >= 4 {
                // Caches, without the counts of cores and of threads that share them.
                for sub in 0..8 {
                    let [eax, ebx, ecx, edx] = cpuid(4, sub);
                    if eax & 0x1f == 0 {
                        break;
                    }
                    put(4, sub, [eax & 0x3fff, ebx, ecx, edx]);
                }
            }
        }
        if last_basic >= 7 {
            let [_, ebx, ecx, edx] = cpuid(7, 0);
            put(7, 0, [0, ebx, ecx, edx]);
        }

        put(HYPERVISOR, 0, signature(KVM_FEATURES, b"KVMKVMKVM\0\0\0"));
        put(KVM_FEATURES, 0, [0; 4]);
        put(OWN_NAME, 0, signature(OWN_NAME, b"subring\0\0\0\0\0"));
        let below = signature(BELOW, TCG);
        if one[2] & HYPERVISOR_PRESENT != 0 && cpuid(HYPERVISOR, 0)[1..] == below[1..] {
            put(BELOW, 0, below);
        }

        let host_last = cpuid(EXTENDED, 0)[0];
        let last = if host_last >= EXTENDED { host_last.min(LAST_EXTENDED) } else { 0 };
        put(EXTENDED, 0, [last, identity[1], identity[2], identity[3]]);
        for leaf in EXTENDED + 1..=last {
            let value = cpuid(leaf, 0);
            put(
                leaf,
                0,
                match leaf {
                    // Brand string and caches as they are; 8000_0007h goes through the feature table.
                    0x8000_0001..=0x8000_0007 => value,
                    // Linear 32 bits, physical PHYS_BITS; no speculation controls, one core.
                    0x8000_0008 => [32 << 8 | PHYS_BITS, 0, 0, 0],
                    // What the CPU is not vulnerable to, through the feature table.
                    0x8000_0021 => [0, 0, value[2], 0],
                    _ => [0; 4],
                },
            );
        }
        if last > EXTENDED && self.vendor != Vendor::Amd {
            // Intel reserves EAX of this leaf; AMD repeats the signature there.
            if let Some(value) = self.leaves.get_mut(&(EXTENDED + 1, 0)) {
                value[0] = 0;
            }
        }
        self.apply_features();
    }

    /// Masks the registers that hold feature bits with [`FEATURES`].
    fn apply_features(&mut self) {
        let mut masks: BTreeMap<(u32, Register), (u32, u32)> = BTreeMap::new();
        for feature in FEATURES {
            let (keep, set) = masks.entry((feature.leaf, feature.register)).or_default();
            match self.decide(feature) {
                Rule::Host => *keep |= 1 << feature.bit,
                Rule::Always => *set |= 1 << feature.bit,
                Rule::ArchCapabilities | Rule::InvariantTsc | Rule::Hidden => {}
            }
        }
        for ((leaf, register), (keep, set)) in masks {
            if let Some(value) = self.leaves.get_mut(&(leaf, 0)) {
                let slot = &mut value[register as usize];
                *slot = *slot & keep | set;
            }
        }
        // Leaf 8000_0007h holds features in EDX only.
        if let Some([eax, ebx, ecx, _]) = self.leaves.get_mut(&(0x8000_0007, 0)) {
            (*eax, *ebx, *ecx) = (0, 0, 0);
        }
        if let Some([_, ebx, _, _]) = self.leaves.get_mut(&(0x8000_0001, 0)) {
            *ebx = 0;
        }
        if self.vendor == Vendor::Amd {
            let shown = self.leaves.get(&(1, 0)).map_or(0, |one| one[3]) & AMD_MIRRORED;
            if let Some(extended) = self.leaves.get_mut(&(0x8000_0001, 0)) {
                extended[3] |= shown;
            }
        }
    }

    /// The row's rule, with the conditional ones decided for this host.
    fn decide(&self, feature: &FeatureBit) -> Rule {
        match feature.rule {
            Rule::ArchCapabilities if self.arch_capabilities != 0 => Rule::Always,
            Rule::ArchCapabilities => Rule::Hidden,
            Rule::InvariantTsc if self.invariant_tsc => Rule::Always,
            Rule::InvariantTsc => Rule::Hidden,
            rule => rule,
        }
    }

    /// CPUID: EAX, EBX, ECX, EDX. Leaves that are not shown answer zeros.
    #[must_use]
    pub fn cpuid(&self, _cpu: &CpuState, leaf: u32, subleaf: u32) -> [u32; 4] {
        let subleaf = if has_subleaves(leaf) { subleaf } else { 0 };
        self.leaves.get(&(leaf, subleaf)).copied().unwrap_or_default()
    }

    /// All leaves that are not zeros, as worlds answer them.
    #[must_use]
    pub fn rows(&self) -> Vec<CpuidRow> {
        let row = |(&(leaf, subleaf), &registers): (&(u32, u32), &[u32; 4])| CpuidRow {
            leaf,
            subleaf,
            any_subleaf: u32::from(!has_subleaves(leaf)),
            registers,
        };
        self.leaves.iter().map(row).collect()
    }

    /// The bit is set in what the guest sees.
    #[must_use]
    pub fn shows(&self, leaf: u32, register: Register, bit: u32) -> bool {
        self.leaves.get(&(leaf, 0)).is_some_and(|v| v[register as usize] >> bit & 1 != 0)
    }

    /// KVM's clock is shown: its MSRs exist.
    #[must_use]
    pub fn has_kvm_clock(&self) -> bool {
        self.shows(KVM_FEATURES, Register::Eax, 3)
    }

    /// The CPU is QEMU's TCG.
    #[must_use]
    pub fn on_tcg(&self) -> bool {
        self.leaves.contains_key(&(BELOW, 0))
    }

    /// NX is shown: EFER exists.
    #[must_use]
    pub fn has_nx(&self) -> bool {
        self.shows(0x8000_0001, Register::Edx, 20)
    }

    /// The CPU's maker.
    #[must_use]
    pub fn vendor(&self) -> Vendor {
        self.vendor
    }
}

/// A hypervisor's signature leaf: the last leaf of its interface, and 12 bytes of name.
fn signature(last: u32, name: &[u8; 12]) -> [u32; 4] {
    let word = |i: usize| u32::from_le_bytes([name[i], name[i + 1], name[i + 2], name[i + 3]]);
    [last, word(0), word(4), word(8)]
}

impl fmt::Display for CpuPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<9} {:<3} {:>3}  {:<14} {:<7} why", "leaf", "reg", "bit", "feature", "guest")?;
        for row in FEATURES {
            let guest = if self.shows(row.leaf, row.register, row.bit) {
                "yes"
            } else if matches!(row.rule, Rule::Host | Rule::InvariantTsc) {
                "host no"
            } else {
                "hidden"
            };
            writeln!(
                f,
                "{:<9x} {:<3} {:>3}  {:<14} {:<7} {}",
                row.leaf,
                row.register.name(),
                row.bit,
                row.name,
                guest,
                row.why
            )?;
        }
        writeln!(f, "\n{:<9} {:<22} {:<8} why", "msr", "name", "guest")?;
        for row in MSRS {
            let guest = if self.msr_exists(row) { row.kind.describe() } else { "#GP" };
            writeln!(f, "{:<9x} {:<22} {:<8} {}", row.msr, row.name, guest, row.why)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
