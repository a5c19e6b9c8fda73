//! The MSRs: one row each, with what reading and writing do and why.

use super::{CpuPolicy, Vendor};
use crate::cpum::{CpuState, efer};
use crate::trap::Trap;

/// On whose CPUs an MSR exists.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum VendorSet {
    /// All.
    Any,
    /// Intel's.
    Intel,
    /// AMD's and Hygon's.
    Amd,
}

impl VendorSet {
    fn contains(self, vendor: Vendor) -> bool {
        match self {
            VendorSet::Any => true,
            VendorSet::Intel => vendor == Vendor::Intel,
            VendorSet::Amd => vendor == Vendor::Amd,
        }
    }
}

/// How an MSR behaves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MsrKind {
    /// The time-stamp counter; a write moves the guest's offset.
    Tsc,
    /// EFER with NXE alone; exists when NX is shown.
    Efer,
    /// The page attribute table: stored, memory types checked.
    Pat,
    /// IA32_SYSENTER_CS, stored.
    SysenterCs,
    /// IA32_SYSENTER_ESP, stored.
    SysenterEsp,
    /// IA32_SYSENTER_EIP, stored.
    SysenterEip,
    /// IA32_MISC_ENABLE: stored, with BTS and PEBS unavailable.
    MiscEnable,
    /// The microcode revision, in the half where the vendor has it; writes are dropped.
    Microcode,
    /// IA32_ARCH_CAPABILITIES, read-only; exists when its CPUID bit is shown.
    ArchCapabilities,
    /// IA32_DEBUGCTL: reads zero; LBR and BTF may be written and have no effect.
    DebugCtl,
    /// KVM's clock: where the guest wants the scale of its time-stamp counter. Stored; a write fills the place.
    KvmSystemTime,
    /// KVM's clock: where the guest wants the UTC of its power-on. Stored; a write fills the place.
    KvmWallClock,
    /// Always this value; writes are dropped.
    Fixed(u64),
    /// #GP(0), and the reason is worth a row.
    Refused,
}

impl MsrKind {
    /// One word for the printed table.
    #[must_use]
    pub fn describe(self) -> &'static str {
        match self {
            MsrKind::Tsc | MsrKind::Efer | MsrKind::KvmSystemTime | MsrKind::KvmWallClock => "emulated",
            MsrKind::Pat
            | MsrKind::SysenterCs
            | MsrKind::SysenterEsp
            | MsrKind::SysenterEip
            | MsrKind::MiscEnable => "stored",
            MsrKind::Microcode | MsrKind::ArchCapabilities => "host's",
            MsrKind::DebugCtl | MsrKind::Fixed(_) => "fixed",
            MsrKind::Refused => "#GP",
        }
    }
}

/// One MSR.
#[derive(Clone, Copy, Debug)]
pub struct MsrRow {
    /// Its number.
    pub msr: u32,
    /// The manual's name.
    pub name: &'static str,
    /// Where it exists.
    pub vendors: VendorSet,
    /// What it does.
    pub kind: MsrKind,
    /// Why so.
    pub why: &'static str,
}

const fn row(msr: u32, name: &'static str, vendors: VendorSet, kind: MsrKind, why: &'static str) -> MsrRow {
    MsrRow { msr, name, vendors, kind, why }
}

use VendorSet::{Amd, Any, Intel};

/// HWCR.TscFreqSel: the TSC counts at the P0 frequency. Linux warns of a firmware bug where it is clear.
const HWCR_TSC_FREQ_SEL: u64 = 1 << 24;
/// NB_CFG.EnableCf8ExtCfg, which Linux would otherwise set.
const NB_CFG_ENABLE_CF8_EXT: u64 = 1 << 46;
/// DE_CFG: LFENCE serializes. True of every AMD CPU whose kernel runs the usual mitigations, and Linux sets it.
const DE_CFG_LFENCE_SERIALIZE: u64 = 1 << 1;

/// Every MSR decided on (SDM Vol. 4; AMD APM Vol. 2, appendix A; KVM's: Linux, Documentation/virt/kvm/x86/msr.rst). An
/// MSR without a row is #GP(0).
pub const MSRS: &[MsrRow] = &[
    row(0x10, "IA32_TSC", Any, MsrKind::Tsc, "Linux reads it, older firmware resets it"),
    row(0x17, "IA32_PLATFORM_ID", Intel, MsrKind::Fixed(0), "read beside the microcode revision"),
    row(0x1b, "IA32_APIC_BASE", Any, MsrKind::Refused, "no local APIC; not read without its CPUID bit"),
    row(0x3a, "IA32_FEATURE_CONTROL", Intel, MsrKind::Refused, "no VMX; Linux reads it safely"),
    row(0x3b, "IA32_TSC_ADJUST", Any, MsrKind::Fixed(0), "the TSC is the host's and nobody has adjusted it"),
    row(0x48, "IA32_SPEC_CTRL", Any, MsrKind::Refused, "speculation control is the host's"),
    row(0x49, "IA32_PRED_CMD", Any, MsrKind::Refused, "speculation control is the host's"),
    row(0x8b, "IA32_BIOS_SIGN_ID", Any, MsrKind::Microcode, "Linux compares it with lists of bad revisions"),
    row(0xfe, "IA32_MTRRCAP", Any, MsrKind::Refused, "no MTRRs"),
    row(
        0x10a,
        "IA32_ARCH_CAPABILITIES",
        Intel,
        MsrKind::ArchCapabilities,
        "what the host is not affected by",
    ),
    row(0x174, "IA32_SYSENTER_CS", Any, MsrKind::SysenterCs, "harmless state; SEP is hidden"),
    row(0x175, "IA32_SYSENTER_ESP", Any, MsrKind::SysenterEsp, "harmless state; SEP is hidden"),
    row(0x176, "IA32_SYSENTER_EIP", Any, MsrKind::SysenterEip, "harmless state; SEP is hidden"),
    row(0x179, "IA32_MCG_CAP", Any, MsrKind::Refused, "no machine checks"),
    row(
        0x1a0,
        "IA32_MISC_ENABLE",
        Intel,
        MsrKind::MiscEnable,
        "Linux reads it for fast strings and CPUID limits",
    ),
    row(0x1d9, "IA32_DEBUGCTL", Any, MsrKind::DebugCtl, "written when single-stepping branches; no LBR here"),
    row(0x277, "IA32_PAT", Any, MsrKind::Pat, "stored: memory types have no effect"),
    row(
        0x4b56_4d00,
        "MSR_KVM_WALL_CLOCK_NEW",
        Any,
        MsrKind::KvmWallClock,
        "Linux sets its time of day by it where KVM's clock is shown",
    ),
    row(
        0x4b56_4d01,
        "MSR_KVM_SYSTEM_TIME_NEW",
        Any,
        MsrKind::KvmSystemTime,
        "tells the frequency of the TSC: nobody has to measure it against the 8254",
    ),
    row(0xc000_0080, "EFER", Any, MsrKind::Efer, "NXE for PAE kernels"),
    row(0xc000_0081, "STAR", Any, MsrKind::Refused, "SYSCALL is hidden"),
    row(0xc000_0103, "TSC_AUX", Any, MsrKind::Refused, "RDTSCP and RDPID are hidden"),
    row(0xc001_0004, "PERF_CTR0", Amd, MsrKind::Refused, "no performance monitoring; Linux probes it safely"),
    row(0xc001_0010, "SYSCFG", Amd, MsrKind::Fixed(0), "no memory encryption, no extra MTRR types"),
    row(
        0xc001_0015,
        "HWCR",
        Amd,
        MsrKind::Fixed(HWCR_TSC_FREQ_SEL),
        "Linux asks it whether the TSC is constant",
    ),
    row(
        0xc001_001f,
        "NB_CFG",
        Amd,
        MsrKind::Fixed(NB_CFG_ENABLE_CF8_EXT),
        "Linux reads it without a net (amd_bus.c)",
    ),
    row(0xc001_0055, "INT_PENDING", Amd, MsrKind::Fixed(0), "read for erratum 400 on families 0Fh and 10h"),
    row(0xc001_0058, "MMIO_CONF_BASE", Amd, MsrKind::Fixed(0), "no memory-mapped PCI configuration"),
    row(0xc001_011f, "VIRT_SPEC_CTL", Amd, MsrKind::Refused, "speculation control is the host's"),
    row(0xc001_1020, "LS_CFG", Amd, MsrKind::Refused, "else Linux would use it as SSBD; it reads it safely"),
    row(0xc001_1029, "DE_CFG", Amd, MsrKind::Fixed(DE_CFG_LFENCE_SERIALIZE), "Linux sets LFENCE serializing"),
];

/// What a `wrmsr` changed that somebody else must know of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WrmsrEffect {
    /// Nothing beyond [`CpuState::msr`], or nothing at all.
    None,
    /// EFER.NXE changed: tell PGM (`PagingChange::Mode`).
    PagingMode,
    /// `cpu.msr.tsc_offset` changed: what the guest was told of its TSC is to be told anew.
    TscOffset,
    /// `cpu.msr.kvm_system_time` was written: fill the place it names.
    SystemTime,
    /// `cpu.msr.kvm_wall_clock` was written: fill the place it names.
    WallClock,
}

const EFER_NXE: u64 = efer::NXE;
/// MISC_ENABLE: BTS and PEBS unavailable.
const MISC_NO_BTS_PEBS: u64 = 3 << 11;
/// DEBUGCTL bits that may be written: LBR and BTF.
const DEBUGCTL_WRITABLE: u64 = 3;

impl CpuPolicy {
    /// The row of an MSR that exists for the guest.
    fn msr_row(&self, msr: u32) -> Result<&'static MsrRow, Trap> {
        MSRS.iter().find(|row| row.msr == msr && self.msr_exists(row)).ok_or(Trap::gp(0))
    }

    /// The MSR of this row can be read on this host.
    pub(super) fn msr_exists(&self, row: &MsrRow) -> bool {
        row.vendors.contains(self.vendor)
            && match row.kind {
                MsrKind::Refused => false,
                MsrKind::Efer => self.has_nx(),
                MsrKind::KvmSystemTime | MsrKind::KvmWallClock => self.has_kvm_clock(),
                MsrKind::ArchCapabilities => self.arch_capabilities != 0,
                _ => true,
            }
    }

    /// `rdmsr`. `tsc` is the guest's time-stamp counter now.
    ///
    /// # Errors
    /// #GP(0) for an MSR the guest does not have.
    pub fn rdmsr(&self, cpu: &CpuState, msr: u32, tsc: u64) -> Result<u64, Trap> {
        let state = &cpu.msr;
        Ok(match self.msr_row(msr)?.kind {
            MsrKind::Tsc => tsc,
            MsrKind::Efer => state.efer,
            MsrKind::Pat => state.pat,
            MsrKind::SysenterCs => state.sysenter_cs,
            MsrKind::SysenterEsp => state.sysenter_esp,
            MsrKind::SysenterEip => state.sysenter_eip,
            MsrKind::MiscEnable => state.misc_enable | MISC_NO_BTS_PEBS,
            MsrKind::Microcode if self.vendor == Vendor::Intel => u64::from(self.microcode) << 32,
            MsrKind::Microcode => u64::from(self.microcode),
            MsrKind::ArchCapabilities => self.arch_capabilities,
            MsrKind::DebugCtl => 0,
            MsrKind::KvmSystemTime => state.kvm_system_time,
            MsrKind::KvmWallClock => state.kvm_wall_clock,
            MsrKind::Fixed(value) => value,
            MsrKind::Refused => return Err(Trap::gp(0)),
        })
    }

    /// `wrmsr`. `tsc` is the guest's time-stamp counter now.
    ///
    /// # Errors
    /// #GP(0) for an MSR the guest does not have, a read-only one, or a reserved value; nothing has changed then.
    pub fn wrmsr(&self, cpu: &mut CpuState, msr: u32, value: u64, tsc: u64) -> Result<WrmsrEffect, Trap> {
        let kind = self.msr_row(msr)?.kind;
        let state = &mut cpu.msr;
        match kind {
            MsrKind::Tsc => {
                state.tsc_offset = state.tsc_offset.wrapping_add(value.wrapping_sub(tsc) as i64);
                return Ok(WrmsrEffect::TscOffset);
            }
            MsrKind::Efer => {
                if value & !EFER_NXE != 0 {
                    return Err(Trap::gp(0));
                }
                if state.efer != value {
                    state.efer = value;
                    return Ok(WrmsrEffect::PagingMode);
                }
            }
            MsrKind::Pat => {
                // UC, WC, WT, WP, WB, UC-: SDM Vol. 3A, table 12-10.
                if value.to_le_bytes().iter().any(|t| !matches!(t, 0 | 1 | 4..=7)) {
                    return Err(Trap::gp(0));
                }
                state.pat = value;
            }
            MsrKind::SysenterCs => state.sysenter_cs = value,
            MsrKind::SysenterEsp => state.sysenter_esp = value,
            MsrKind::SysenterEip => state.sysenter_eip = value,
            MsrKind::MiscEnable => state.misc_enable = value,
            // Any address will do, as in KVM: one outside RAM is nowhere to write to, and no fault.
            MsrKind::KvmSystemTime => {
                state.kvm_system_time = value;
                return Ok(WrmsrEffect::SystemTime);
            }
            MsrKind::KvmWallClock => {
                state.kvm_wall_clock = value;
                return Ok(WrmsrEffect::WallClock);
            }
            MsrKind::DebugCtl if value & !DEBUGCTL_WRITABLE != 0 => return Err(Trap::gp(0)),
            MsrKind::Microcode | MsrKind::Fixed(_) | MsrKind::DebugCtl => {}
            MsrKind::ArchCapabilities | MsrKind::Refused => return Err(Trap::gp(0)),
        }
        Ok(WrmsrEffect::None)
    }
}
