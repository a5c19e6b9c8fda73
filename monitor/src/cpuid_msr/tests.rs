//! What guests see on an invented host that has everything, and on the real one.

use super::*;
use crate::trap::Trap;

fn vendor_words(name: &[u8; 12]) -> [u32; 3] {
    let word = |i: usize| u32::from_le_bytes([name[i], name[i + 1], name[i + 2], name[i + 3]]);
    [word(0), word(8), word(4)]
}

/// A host with every bit set in every leaf.
fn everything(name: &'static [u8; 12]) -> impl Fn(u32, u32) -> [u32; 4] {
    move |leaf, sub| {
        let [b, c, d] = vendor_words(name);
        match leaf {
            0 => [0x1f, b, c, d],
            1 => [0x000a_0f11, u32::MAX, u32::MAX, u32::MAX],
            4 if sub < 4 => [0xfc00_4121 + sub, 1, 2, 3],
            4 => [0; 4],
            0x8000_0000 => [0x8000_0021, b, c, d],
            _ => [u32::MAX; 4],
        }
    }
}

fn amd() -> CpuPolicy {
    CpuPolicy::new(&everything(b"AuthenticAMD"), &HostFacts { microcode: 0xa10, arch_capabilities: 0x21 })
}

fn intel(arch_capabilities: u64) -> CpuPolicy {
    CpuPolicy::new(&everything(b"GenuineIntel"), &HostFacts { microcode: 0xa10, arch_capabilities })
}

fn cpu() -> CpuState {
    CpuState::reset()
}

#[test]
fn a_bit_has_one_row_only() {
    for (i, a) in FEATURES.iter().enumerate() {
        for b in &FEATURES[i + 1..] {
            assert!((a.leaf, a.register, a.bit) != (b.leaf, b.register, b.bit), "{} and {}", a.name, b.name);
        }
    }
    for (i, a) in MSRS.iter().enumerate() {
        assert!(MSRS[i + 1..].iter().all(|b| a.msr != b.msr), "{}", a.name);
    }
}

#[test]
fn shown_bits_are_exactly_those_with_a_row_that_shows_them() {
    for policy in [amd(), intel(0), intel(1)] {
        for (leaf, register) in FEATURES.iter().map(|f| (f.leaf, f.register)) {
            for bit in 0..32 {
                let row = FEATURES.iter().find(|f| (f.leaf, f.register, f.bit) == (leaf, register, bit));
                let mut expected = row.is_some_and(|r| matches!(policy.decide(r), Rule::Host | Rule::Always));
                if policy.vendor == Vendor::Amd
                    && (leaf, register) == (0x8000_0001, Register::Edx)
                    && AMD_MIRRORED >> bit & 1 != 0
                {
                    expected = policy.shows(1, Register::Edx, bit);
                }
                assert_eq!(policy.shows(leaf, register, bit), expected, "{leaf:x} {register} {bit}");
            }
        }
    }
}

#[test]
fn what_deprivileged_code_cannot_have_is_hidden() {
    let policy = amd();
    let [_, ebx, ecx, edx] = policy.cpuid(&cpu(), 1, 0);
    // SEP, APIC, MCE, MTRR, VME; XSAVE, OSXSAVE, AVX, x2APIC, MONITOR.
    assert_eq!(edx & (1 << 11 | 1 << 9 | 1 << 7 | 1 << 12 | 1 << 1), 0);
    assert_eq!(ecx & (1 << 26 | 1 << 27 | 1 << 28 | 1 << 21 | 1 << 3), 0);
    assert_eq!(edx & 0x0700_0179, 0x0700_0179, "FPU, PSE.., FXSR, SSE, SSE2");
    assert_eq!(ebx, 0x0001_ff00, "one processor, APIC ID 0");
    assert_eq!(policy.cpuid(&cpu(), 0x8000_0001, 0)[3] & (1 << 29 | 1 << 11 | 1 << 27), 0);
    assert_eq!(policy.cpuid(&cpu(), 0xd, 0), [0; 4]);
    assert_eq!(policy.cpuid(&cpu(), 7, 1), [0; 4]);
}

#[test]
fn a_poor_host_gives_only_what_it_has() {
    let host = |leaf, _| match leaf {
        0 => {
            let [b, c, d] = vendor_words(b"GenuineIntel");
            [1, b, c, d]
        }
        1 => [0x633, 0, 0, 1 << 0 | 1 << 4],
        _ => [0; 4],
    };
    let policy = CpuPolicy::new(&host, &HostFacts::default());
    assert_eq!(policy.cpuid(&cpu(), 0, 0)[0], 1);
    assert_eq!(policy.cpuid(&cpu(), 1, 0), [0x633, 0x0001_0000, 1 << 31, 1 << 0 | 1 << 4 | 1 << 5]);
    assert_eq!(policy.cpuid(&cpu(), 0x8000_0001, 0), [0; 4]);
    assert_eq!(policy.rdmsr(&cpu(), 0xc000_0080, 0), Err(Trap::gp(0)), "no NX, no EFER");
}

#[test]
fn the_signature_vendor_and_limits_are_right() {
    let policy = amd();
    assert_eq!(policy.cpuid(&cpu(), 1, 0)[0], 0x000a_0f11);
    let [max, b, c, d] = policy.cpuid(&cpu(), 0, 0);
    assert_eq!((max, [b, c, d]), (7, vendor_words(b"AuthenticAMD")));
    assert_eq!(policy.cpuid(&cpu(), 0x8000_0000, 0)[0], 0x8000_0021);
    assert_eq!(policy.cpuid(&cpu(), 0x8000_0021, 0), [0, 0, 6, 0]);
    assert_eq!(policy.cpuid(&cpu(), 0x8000_0008, 0), [0x2024, 0, 0, 0]);
    for (leaf, last, want) in
        [(0x4000_0000, 0x4000_0001, b"KVMKVMKVM\0\0\0"), (0x4000_0100, 0x4000_0100, b"subring\0\0\0\0\0")]
    {
        let [max, b, c, d] = policy.cpuid(&cpu(), leaf, 0);
        let name: Vec<u8> = [b, c, d].into_iter().flat_map(u32::to_le_bytes).collect();
        assert_eq!((max, &name[..]), (last, &want[..]));
    }
}

#[test]
fn kvms_clock_is_shown_where_the_hosts_counter_is_invariant_and_nothing_else_of_kvm() {
    const NOP_IO_DELAY: u32 = 1 << 1;
    const CLOCK: u32 = 1 << 3 | 1 << 24;
    assert_eq!(amd().cpuid(&cpu(), 0x4000_0001, 0), [NOP_IO_DELAY | CLOCK, 0, 0, 0]);
    let everything = everything(b"GenuineIntel");
    let variant =
        |leaf, sub| if leaf == 0x8000_0007 { [!0, !0, !0, !(1 << 8)] } else { everything(leaf, sub) };
    let poor = CpuPolicy::new(&variant, &HostFacts::default());
    assert_eq!(poor.cpuid(&cpu(), 0x4000_0001, 0), [NOP_IO_DELAY, 0, 0, 0]);
    for msr in [0x4b56_4d00, 0x4b56_4d01] {
        assert_eq!(poor.wrmsr(&mut cpu(), msr, 1, 0), Err(Trap::gp(0)));
        assert_eq!(poor.rdmsr(&cpu(), msr, 0), Err(Trap::gp(0)));
    }
    let mut cpu = cpu();
    assert_eq!(amd().wrmsr(&mut cpu, 0x4b56_4d00, u64::MAX, 0), Ok(WrmsrEffect::WallClock));
    assert_eq!(amd().wrmsr(&mut cpu, 0x4b56_4d01, 0x1001, 0), Ok(WrmsrEffect::SystemTime));
    assert_eq!(amd().rdmsr(&cpu, 0x4b56_4d00, 0), Ok(u64::MAX));
    assert_eq!(amd().rdmsr(&cpu, 0x4b56_4d01, 0), Ok(0x1001));
    for msr in [0x11, 0x12, 0x4b56_4d02, 0x4b56_4d03, 0x4b56_4d04, 0x4b56_4d05] {
        assert_eq!(amd().wrmsr(&mut cpu, msr, 0, 0), Err(Trap::gp(0)), "{msr:#x}");
    }
}

#[test]
fn intel_cache_leaves_count_one_core() {
    let policy = intel(0);
    assert_eq!(policy.cpuid(&cpu(), 4, 1), [0x0122, 1, 2, 3]);
    assert_eq!(policy.cpuid(&cpu(), 4, 4), [0; 4]);
    assert_eq!(amd().cpuid(&cpu(), 4, 0), [0; 4]);
}

#[test]
fn only_an_intel_host_that_is_not_affected_says_so_in_arch_capabilities() {
    for (policy, expected) in [(intel(1), Ok(1)), (intel(0), Err(Trap::gp(0))), (amd(), Err(Trap::gp(0)))] {
        assert_eq!(policy.rdmsr(&cpu(), 0x10a, 0), expected);
        assert_eq!(policy.shows(7, Register::Edx, 29), expected.is_ok());
        assert_eq!(policy.wrmsr(&mut cpu(), 0x10a, 0, 0), Err(Trap::gp(0)));
    }
}

#[test]
fn host_facts_come_from_the_hosts_text() {
    let facts = HostFacts::from_text("processor\t: 0\nmicrocode\t: 0x1000065\n", |name| match name {
        "meltdown" | "mmio_stale_data" => Some("Not affected\n".into()),
        "mds" => Some("Mitigation: Clear CPU buffers; SMT vulnerable\n".into()),
        _ => None,
    });
    assert_eq!(facts, HostFacts { microcode: 0x0100_0065, arch_capabilities: 0xe001 });
    assert_eq!(HostFacts::from_text("", |_| None), HostFacts::default());
}

#[test]
fn efer_takes_nxe_alone_and_tells_the_pager() {
    let (policy, mut cpu) = (amd(), cpu());
    assert_eq!(policy.wrmsr(&mut cpu, 0xc000_0080, 1 << 11, 0), Ok(WrmsrEffect::PagingMode));
    assert_eq!(policy.wrmsr(&mut cpu, 0xc000_0080, 1 << 11, 0), Ok(WrmsrEffect::None));
    assert_eq!(policy.rdmsr(&cpu, 0xc000_0080, 0), Ok(1 << 11));
    let before = cpu.clone();
    for bad in [1, 1 << 8, 1 << 12, 1 << 14] {
        assert_eq!(policy.wrmsr(&mut cpu, 0xc000_0080, bad, 0), Err(Trap::gp(0)));
    }
    assert_eq!(cpu, before);
}

#[test]
fn the_tsc_is_written_through_its_offset() {
    let (policy, mut cpu) = (amd(), cpu());
    cpu.msr.tsc_offset = -100;
    // The guest sees 1000 now, so the host is at 1100.
    assert_eq!(policy.wrmsr(&mut cpu, 0x10, 0, 1000), Ok(WrmsrEffect::TscOffset));
    assert_eq!(cpu.msr.tsc_offset, -1100);
    assert_eq!(policy.rdmsr(&cpu, 0x10, 7), Ok(7));
}

#[test]
fn pat_refuses_reserved_memory_types() {
    let (policy, mut cpu) = (intel(0), cpu());
    assert_eq!(policy.wrmsr(&mut cpu, 0x277, 0x0407_0500_0106_0004, 0), Ok(WrmsrEffect::None));
    assert_eq!(policy.rdmsr(&cpu, 0x277, 0), Ok(0x0407_0500_0106_0004));
    for bad in [2, 3, 8, 0x0200_0000_0000_0000] {
        assert_eq!(policy.wrmsr(&mut cpu, 0x277, bad, 0), Err(Trap::gp(0)));
    }
}

#[test]
fn what_linux_reads_without_a_net_exists_on_its_vendor_only() {
    for msr in [0xc001_0015, 0xc001_001f, 0xc001_0010, 0xc001_1029] {
        assert!(amd().rdmsr(&cpu(), msr, 0).is_ok(), "{msr:#x}");
        assert!(amd().wrmsr(&mut cpu(), msr, u64::MAX, 0).is_ok(), "{msr:#x}");
        assert_eq!(intel(0).rdmsr(&cpu(), msr, 0), Err(Trap::gp(0)));
    }
    assert_eq!(amd().rdmsr(&cpu(), 0x8b, 0), Ok(0xa10));
    assert_eq!(intel(0).rdmsr(&cpu(), 0x8b, 0), Ok(0xa10 << 32));
    assert!(intel(0).rdmsr(&cpu(), 0x1a0, 0).is_ok());
    assert_eq!(amd().rdmsr(&cpu(), 0x1a0, 0), Err(Trap::gp(0)));
}

#[test]
fn unknown_and_hidden_msrs_fault() {
    for msr in [0x1b, 0x48, 0x179, 0xfe, 0x200, 0xc000_0081, 0xdead_beef] {
        assert_eq!(amd().rdmsr(&cpu(), msr, 0), Err(Trap::gp(0)), "{msr:#x}");
        assert_eq!(amd().wrmsr(&mut cpu(), msr, 0, 0), Err(Trap::gp(0)), "{msr:#x}");
    }
}

#[test]
fn the_policy_of_this_host_prints_every_row() {
    let policy = CpuPolicy::host();
    let text = policy.to_string();
    assert_eq!(text.lines().count(), FEATURES.len() + MSRS.len() + 3);
    assert!(policy.shows(1, Register::Edx, 26), "every x86-64 host has SSE2");
    assert!(!policy.shows(1, Register::Ecx, 27));
}

#[test]
fn a_feature_that_is_taken_away_is_gone_from_both_its_places() {
    let mut policy = amd();
    assert!(policy.shows(1, Register::Edx, 13) && policy.shows(0x8000_0001, Register::Edx, 13));
    policy.take_away(CpuModel::parse("host,-pge").unwrap().hidden);
    assert!(!policy.shows(1, Register::Edx, 13) && !policy.shows(0x8000_0001, Register::Edx, 13));
    assert!(policy.shows(1, Register::Edx, 6), "the neighbours stay");
}
