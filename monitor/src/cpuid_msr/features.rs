//! The CPUID feature bits: one row each, with the decision and its reason.

use std::fmt;

/// A CPUID result register; the value indexes `[EAX, EBX, ECX, EDX]`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[allow(missing_docs)]
pub enum Register {
    Eax = 0,
    Ebx = 1,
    Ecx = 2,
    Edx = 3,
}

impl Register {
    /// Its name in lower case.
    #[must_use]
    pub fn name(self) -> &'static str {
        ["eax", "ebx", "ecx", "edx"][self as usize]
    }
}

impl fmt::Display for Register {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What the guest sees of a feature bit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rule {
    /// What the host has.
    Host,
    /// Set, whatever the host has: the monitor provides it.
    Always,
    /// Set exactly when IA32_ARCH_CAPABILITIES has something to say (Intel).
    ArchCapabilities,
    /// Set exactly when the host's time-stamp counter is invariant (CPUID 8000_0007h EDX bit 8).
    InvariantTsc,
    /// Clear.
    Hidden,
}

/// One feature bit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FeatureBit {
    /// CPUID leaf (subleaf 0).
    pub leaf: u32,
    /// Result register.
    pub register: Register,
    /// Bit number, 0..=31.
    pub bit: u32,
    /// The manuals' name.
    pub name: &'static str,
    /// The decision.
    pub rule: Rule,
    /// Its reason.
    pub why: &'static str,
}

use Register::{Eax, Ebx, Ecx, Edx};
use Rule::{Always, ArchCapabilities, Hidden, Host, InvariantTsc};

const fn row(
    leaf: u32,
    register: Register,
    bit: u32,
    name: &'static str,
    rule: Rule,
    why: &'static str,
) -> FeatureBit {
    FeatureBit { leaf, register, bit, name, rule, why }
}

const KVM: u32 = super::KVM_FEATURES;
const EXT: u32 = 0x8000_0001;

/// Every bit decided on (SDM Vol. 2, CPUID; AMD APM Vol. 3, appendix E; leaf 4000_0001h: Linux,
/// Documentation/virt/kvm/x86/cpuid.rst). A bit without a row is hidden.
pub const FEATURES: &[FeatureBit] = &[
    row(1, Edx, 0, "FPU", Host, "runs natively"),
    row(1, Edx, 1, "VME", Hidden, "VIF/VIP are not emulated"),
    row(1, Edx, 2, "DE", Host, "CR4.DE is state of the monitor's"),
    row(1, Edx, 3, "PSE", Host, "the guest's page walk knows 4 MiB pages"),
    row(1, Edx, 4, "TSC", Host, "rdtsc runs natively"),
    row(1, Edx, 5, "MSR", Always, "the MSR table below"),
    row(1, Edx, 6, "PAE", Host, "the guest's page walk knows PAE"),
    row(1, Edx, 7, "MCE", Hidden, "machine checks are the host's"),
    row(1, Edx, 8, "CX8", Host, "runs natively"),
    row(1, Edx, 9, "APIC", Hidden, "no local APIC: the machine has a pair of 8259A"),
    row(1, Edx, 11, "SEP", Hidden, "a SYSENTER the host kernel takes loses the guest's EIP"),
    row(1, Edx, 12, "MTRR", Hidden, "memory types are the host's"),
    row(1, Edx, 13, "PGE", Host, "the shadow honours global pages"),
    row(1, Edx, 14, "MCA", Hidden, "goes with MCE"),
    row(1, Edx, 15, "CMOV", Host, "runs natively"),
    row(1, Edx, 16, "PAT", Host, "the MSR is stored; memory types have no effect"),
    row(1, Edx, 17, "PSE36", Hidden, "4 MiB pages above 4 GiB are not needed beside PAE"),
    row(1, Edx, 19, "CLFSH", Host, "runs natively"),
    row(1, Edx, 21, "DS", Hidden, "needs performance monitoring"),
    row(1, Edx, 22, "ACPI", Hidden, "thermal MSRs are the host's"),
    row(1, Edx, 23, "MMX", Host, "runs natively"),
    row(1, Edx, 24, "FXSR", Host, "the FPU state is carried in this format"),
    row(1, Edx, 25, "SSE", Host, "runs natively"),
    row(1, Edx, 26, "SSE2", Host, "runs natively"),
    row(1, Edx, 27, "SS", Hidden, "concerns memory types"),
    row(1, Edx, 28, "HTT", Hidden, "one virtual CPU, no topology"),
    row(1, Edx, 29, "TM", Hidden, "thermal monitor is the host's"),
    row(1, Ecx, 0, "SSE3", Host, "runs natively"),
    row(1, Ecx, 1, "PCLMULQDQ", Host, "runs natively"),
    row(1, Ecx, 2, "DTES64", Hidden, "needs performance monitoring"),
    row(1, Ecx, 3, "MONITOR", Hidden, "mwait is privileged and would not sleep on the host's object"),
    row(1, Ecx, 5, "VMX", Hidden, "no nested virtualization"),
    row(1, Ecx, 9, "SSSE3", Host, "runs natively"),
    row(1, Ecx, 12, "FMA", Hidden, "needs AVX"),
    row(1, Ecx, 13, "CX16", Hidden, "64-bit mode only"),
    row(1, Ecx, 15, "PDCM", Hidden, "performance monitoring"),
    row(1, Ecx, 17, "PCID", Hidden, "64-bit mode only"),
    row(1, Ecx, 19, "SSE4.1", Host, "runs natively"),
    row(1, Ecx, 20, "SSE4.2", Host, "runs natively"),
    row(1, Ecx, 21, "x2APIC", Hidden, "goes with APIC"),
    row(1, Ecx, 22, "MOVBE", Host, "runs natively"),
    row(1, Ecx, 23, "POPCNT", Host, "runs natively"),
    row(1, Ecx, 24, "TSC-Deadline", Hidden, "goes with APIC"),
    row(1, Ecx, 25, "AES", Host, "runs natively"),
    row(1, Ecx, 26, "XSAVE", Hidden, "the carried FPU state is FXSAVE's"),
    row(1, Ecx, 27, "OSXSAVE", Hidden, "CR4.OSXSAVE cannot be set; the host's own bit must not show"),
    row(1, Ecx, 28, "AVX", Hidden, "needs XSAVE state"),
    row(1, Ecx, 29, "F16C", Hidden, "needs AVX"),
    row(1, Ecx, 30, "RDRAND", Host, "runs natively"),
    row(
        1,
        Ecx,
        31,
        "hypervisor",
        Always,
        "true; and Linux then skips its microcode loader, errata work-arounds and complaints about missing MSRs",
    ),
    row(7, Ebx, 0, "FSGSBASE", Hidden, "64-bit mode only"),
    row(
        7,
        Ebx,
        1,
        "TSC_ADJUST",
        Always,
        "with it and InvariantTSC Linux trusts the TSC unwatched (the PIT, which loses ticks on a busy host, would \
         watch it) and can sleep without a periodic tick",
    ),
    row(7, Ebx, 3, "BMI1", Hidden, "VEX-encoded: the scanner decodes no VEX"),
    row(7, Ebx, 5, "AVX2", Hidden, "needs AVX"),
    row(7, Ebx, 6, "FDP_EXCPTN", Host, "tells how the host's x87 behaves"),
    row(7, Ebx, 7, "SMEP", Hidden, "guest supervisor mode is not the hardware's"),
    row(7, Ebx, 8, "BMI2", Hidden, "VEX-encoded"),
    row(7, Ebx, 9, "ERMS", Host, "tells how fast rep movsb is"),
    row(7, Ebx, 10, "INVPCID", Hidden, "goes with PCID"),
    row(7, Ebx, 11, "RTM", Hidden, "an exit inside a transaction aborts it"),
    row(7, Ebx, 13, "FCS_FDS_DEPR", Host, "tells how the host's x87 behaves"),
    row(7, Ebx, 18, "RDSEED", Host, "runs natively"),
    row(7, Ebx, 19, "ADX", Hidden, "of use in 64-bit code"),
    row(7, Ebx, 20, "SMAP", Hidden, "guest supervisor mode is not the hardware's"),
    row(7, Ebx, 29, "SHA", Host, "legacy-encoded SSE, runs natively"),
    row(7, Ecx, 2, "UMIP", Hidden, "sgdt and friends are patched or emulated, not trapped, in guest ring 3"),
    row(7, Ecx, 3, "PKU", Hidden, "64-bit paging only"),
    row(7, Ecx, 22, "RDPID", Hidden, "TSC_AUX holds the host's value"),
    row(7, Edx, 4, "FSRM", Host, "tells how fast rep movsb is"),
    row(7, Edx, 10, "MD_CLEAR", Hidden, "verw is emulated and clears no buffers"),
    row(
        7,
        Edx,
        26,
        "IBRS/IBPB",
        Hidden,
        "the MSRs cannot be written by an ordinary process; the host's mitigations hold",
    ),
    row(7, Edx, 27, "STIBP", Hidden, "as IBRS"),
    row(7, Edx, 28, "L1D_FLUSH", Hidden, "as IBRS"),
    row(
        7,
        Edx,
        29,
        "ARCH_CAP",
        ArchCapabilities,
        "says what the host says of Meltdown: a PAE kernel leaves PTI off",
    ),
    row(7, Edx, 31, "SSBD", Hidden, "as IBRS"),
    row(
        KVM,
        Eax,
        0,
        "CLOCKSOURCE",
        Hidden,
        "the old MSR numbers, 11h and 12h; who knows them knows the new ones",
    ),
    row(
        KVM,
        Eax,
        1,
        "NOP_IO_DELAY",
        Always,
        "a write to port 80h between port accesses is an exit and slows nothing",
    ),
    row(
        KVM,
        Eax,
        3,
        "CLOCKSOURCE2",
        InvariantTsc,
        "tells the frequency of the TSC, which a guest that calibrates it on a busy host gets wrong",
    ),
    row(KVM, Eax, 4, "ASYNC_PF", Hidden, "the host's page faults are not shown to the guest"),
    row(KVM, Eax, 5, "STEAL_TIME", Hidden, "nobody counts it"),
    row(KVM, Eax, 6, "PV_EOI", Hidden, "goes with APIC"),
    row(KVM, Eax, 7, "PV_UNHALT", Hidden, "one virtual CPU"),
    row(KVM, Eax, 24, "CLOCKSOURCE_STABLE", InvariantTsc, "one virtual CPU, and its TSC is the host's"),
    row(EXT, Ecx, 0, "LAHF", Host, "runs natively"),
    row(EXT, Ecx, 2, "SVM", Hidden, "no nested virtualization"),
    row(EXT, Ecx, 5, "ABM", Host, "lzcnt runs natively, and does so whether shown or not"),
    row(EXT, Ecx, 8, "3DNowPrefetch", Host, "runs natively"),
    row(EXT, Ecx, 9, "OSVW", Hidden, "errata are the host's business"),
    row(EXT, Ecx, 22, "TOPOEXT", Hidden, "one virtual CPU, no topology"),
    row(EXT, Edx, 11, "SYSCALL", Hidden, "as SEP"),
    row(EXT, Edx, 20, "NX", Host, "the guest's page walk knows NX under PAE"),
    row(EXT, Edx, 22, "MMXEXT", Host, "AMD's name for a part of SSE; runs natively"),
    row(EXT, Edx, 25, "FFXSR", Hidden, "EFER.FFXSR is not emulated"),
    row(EXT, Edx, 26, "PDPE1GB", Hidden, "64-bit paging only"),
    row(EXT, Edx, 27, "RDTSCP", Hidden, "TSC_AUX holds the host's value"),
    row(EXT, Edx, 29, "LM", Hidden, "32-bit guests only"),
    row(0x8000_0021, Ecx, 1, "TSA_SQ_NO", Host, "without it Linux runs a verw at every return to ring 3"),
    row(0x8000_0021, Ecx, 2, "TSA_L1_NO", Host, "as TSA_SQ_NO"),
    row(0x8000_0007, Edx, 8, "InvariantTSC", Host, "rdtsc is the host's"),
];
