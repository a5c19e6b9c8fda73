//! KVM's paravirtual clock: the two structures a guest asks for by MSR (Linux, Documentation/virt/kvm/x86/msr.rst).
//!
//! The guest's time-stamp counter is the host's and invariant, so what they say stays true: each is written once, when
//! its MSR is. Linux takes the counter's frequency from the first and its time of day from the second. The address is the
//! guest's word: what does not lie in RAM is not written.

use crate::cpum::CpuState;
use crate::machine::Machine;
use crate::tape::Input;
use crate::tm::{Moment, NS_PER_SEC};
use csam::GuestPhys;
use std::time::Duration;

/// The frequency is measured over at least this time: two readings good to some 50 ns make 5 parts in a million. Linux
/// asks after about a tenth of a second.
const LEAST: Duration = Duration::from_millis(10);
/// In MSR_KVM_SYSTEM_TIME_NEW: the structure is wanted.
const ENABLE: u64 = 1;
/// In `flags`: the clock does not go backwards from one virtual CPU to another.
const TSC_STABLE: u8 = 1;

/// How counts become ns: `((counts << shift) * mul) >> 32`, where a negative shift is one to the right.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Scale {
    /// With its highest bit set, so that it is good to 1 part in 2^31.
    mul: u32,
    shift: i8,
}

impl Scale {
    /// For a counter of this frequency, which is not 0.
    fn of(hz: u64) -> Scale {
        // ns a count, times 2^96. 10^9 has 30 bits, so the quotient has 63 to 126.
        let ratio = (u128::from(NS_PER_SEC) << 96) / u128::from(hz.max(1));
        let bits = 128 - ratio.leading_zeros();
        Scale { mul: (ratio >> (bits - 32)) as u32, shift: (bits as i32 - 96) as i8 }
    }
}

/// `struct pvclock_vcpu_time_info`: at `moment` (the guest's counter, guest time).
fn system_time(version: u32, moment: Moment, scale: Scale) -> [u8; 32] {
    let mut b = [0; 32];
    b[0..4].copy_from_slice(&version.to_le_bytes());
    b[8..16].copy_from_slice(&moment.tsc.to_le_bytes());
    b[16..24].copy_from_slice(&moment.ns.to_le_bytes());
    b[24..28].copy_from_slice(&scale.mul.to_le_bytes());
    b[28] = scale.shift as u8;
    b[29] = TSC_STABLE;
    b
}

/// `struct pvclock_wall_clock`: UTC at guest time 0. A host whose clock stands before 1970 or after 2106 gets the bounds.
fn wall_clock(version: u32, utc_ns: i64) -> [u8; 12] {
    let utc_ns = u64::try_from(utc_ns).unwrap_or(0);
    let seconds = u32::try_from(utc_ns / NS_PER_SEC).unwrap_or(u32::MAX);
    let mut b = [0; 12];
    b[0..4].copy_from_slice(&version.to_le_bytes());
    b[4..8].copy_from_slice(&seconds.to_le_bytes());
    b[8..12].copy_from_slice(&((utc_ns % NS_PER_SEC) as u32).to_le_bytes());
    b
}

/// An even version that differs from the one that is there. The guest does not run meanwhile and never sees an odd one.
fn next_version(m: &Machine, at: GuestPhys) -> u32 {
    let mut old = [0; 4];
    m.read_ram(at, &mut old);
    (u32::from_le_bytes(old) | 1).wrapping_add(1)
}

/// All of it, or nothing if a part lies outside RAM.
fn put(m: &mut Machine, at: GuestPhys, bytes: &[u8]) {
    if at.0.checked_add(bytes.len() as u64).is_none_or(|end| end > m.ram.size()) {
        return;
    }
    let first = bytes.len().min(0x1000 - (at.0 & 0xfff) as usize);
    let mut write = |at: GuestPhys, part: &[u8]| {
        m.write_ram(at, part);
        m.tape.note(|| Input::Ram { at, bytes: part.to_vec() });
    };
    write(at, &bytes[..first]);
    if first < bytes.len() {
        write(at.wrapping_add(first as u64), &bytes[first..]);
    }
}

/// Fills the place MSR_KVM_SYSTEM_TIME_NEW names, if it is wanted.
pub fn write_system_time(m: &mut Machine, cpu: &CpuState) {
    let msr = cpu.msr.kvm_system_time;
    if msr & ENABLE == 0 {
        return;
    }
    // Without a frequency the guest finds zeros, or what it put there, and a scale it cannot use.
    let Some(hz) = m.clock.tsc_hz(LEAST) else { return };
    let mut moment = m.clock.moment();
    moment.tsc = moment.tsc.wrapping_add_signed(cpu.msr.tsc_offset);
    let at = GuestPhys(msr & !ENABLE);
    let bytes = system_time(next_version(m, at), moment, Scale::of(hz));
    put(m, at, &bytes);
}

/// Fills the place MSR_KVM_WALL_CLOCK_NEW names.
pub fn write_wall_clock(m: &mut Machine, cpu: &CpuState) {
    let at = GuestPhys(cpu.msr.kvm_wall_clock);
    let bytes = wall_clock(next_version(m, at), m.clock.utc_ns());
    put(m, at, &bytes);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::env::Env;
    use crate::machine::tests::machine;
    use crate::tm::{Clock, ManualTime};

    const WALL: u32 = 0x4b56_4d00;
    const SYSTEM: u32 = 0x4b56_4d01;
    const UTC: i64 = 1_700_000_000_123_456_789;

    /// A machine with 1 MiB whose counter runs at 3 GHz and stands at guest time 1 s, if this host shows the clock.
    fn at_one_second() -> Option<(Machine, ManualTime)> {
        let mut m = machine(1);
        let t = ManualTime::default();
        t.advance(12345);
        m.clock = Clock::new(Box::new(t.clone()), UTC);
        t.advance(NS_PER_SEC);
        m.policy.has_kvm_clock().then_some((m, t))
    }

    fn u32_at(m: &Machine, at: u64) -> u32 {
        m.ram.read_u32(at).unwrap()
    }

    /// As the guest does it (Linux, arch/x86/include/asm/pvclock.h).
    fn guest_ns(m: &Machine, at: u64, tsc: u64) -> u64 {
        let delta = tsc - m.ram.read_u64(at + 8).unwrap();
        let shift = m.ram.read_u8(at + 28).unwrap() as i8;
        let delta = if shift < 0 { delta >> -shift } else { delta << shift };
        let ns = (u128::from(delta) * u128::from(u32_at(m, at + 24))) >> 32;
        m.ram.read_u64(at + 16).unwrap() + ns as u64
    }

    #[test]
    fn scales_are_good_to_a_part_in_a_thousand_million_at_every_frequency() {
        for hz in [1, 1_000_000, 999_999_999, 1_000_000_000, 2_445_428_123, 5_800_000_000, 1 << 40, u64::MAX]
        {
            let Scale { mul, shift } = Scale::of(hz);
            assert!(mul >> 31 == 1, "{hz}");
            let ns = f64::from(mul) * f64::from(shift).exp2() / f64::from(32).exp2();
            let want = 1e9 / hz as f64;
            assert!((ns / want - 1.0).abs() < 1e-9, "{hz} Hz: {ns} ns, not {want}");
        }
    }

    #[test]
    fn the_guest_finds_a_clock_that_agrees_with_guest_time() {
        let Some((mut m, t)) = at_one_second() else { return };
        let mut cpu = CpuState::reset();
        // Across a page boundary, which the interface does not forbid.
        m.wrmsr(&mut cpu, SYSTEM, 0x4ff0 | 1).unwrap();
        assert_eq!(m.rdmsr(&cpu, SYSTEM), Ok(0x4ff1));
        assert_eq!(guest_ns(&m, 0x4ff0, 3 * (12345 + NS_PER_SEC)), NS_PER_SEC);
        t.advance(NS_PER_SEC);
        let later = guest_ns(&m, 0x4ff0, 3 * (12345 + 2 * NS_PER_SEC));
        assert!(later.abs_diff(m.clock.now()) <= 2, "{later} ns");
        assert_eq!(u32_at(&m, 0x4ff0), 2, "an even version");
        assert_eq!(m.ram.read_u8(0x4ff0 + 29), Some(TSC_STABLE));
        m.wrmsr(&mut cpu, SYSTEM, 0x4ff0 | 1).unwrap();
        assert_eq!(u32_at(&m, 0x4ff0), 4);
        // A counter that was moved moves the clock's base with it.
        m.wrmsr(&mut cpu, 0x10, 0).unwrap();
        assert_eq!(u32_at(&m, 0x4ff0), 6);
    }

    #[test]
    fn the_wall_clock_is_utc_at_guest_time_zero() {
        let Some((mut m, _)) = at_one_second() else { return };
        let mut cpu = CpuState::reset();
        m.wrmsr(&mut cpu, WALL, 0x8000).unwrap();
        assert_eq!([0, 4, 8].map(|o| u32_at(&m, 0x8000 + o)), [2, 1_700_000_000, 123_456_789]);
        for (utc, want) in [(-1, [0, 0]), (i64::MAX, [u32::MAX, 854_775_807])] {
            let b = wall_clock(0, utc);
            assert_eq!([4, 8].map(|o| u32::from_le_bytes(b[o..o + 4].try_into().unwrap())), want);
        }
    }

    #[test]
    fn nothing_is_written_where_it_is_not_wanted_or_no_ram_is() {
        let Some((mut m, _)) = at_one_second() else { return };
        let mut cpu = CpuState::reset();
        m.wrmsr(&mut cpu, SYSTEM, 0x8000).unwrap();
        for at in [(1 << 20) - 4, 1 << 20, 0xfee0_0000, 1 << 36, u64::MAX - 2, u64::MAX - 31, 1 << 63] {
            m.wrmsr(&mut cpu, WALL, at).unwrap();
            m.wrmsr(&mut cpu, SYSTEM, at | 1).unwrap();
        }
        let mut all = vec![0; 1 << 20];
        m.read_ram(GuestPhys(0), &mut all);
        assert!(all.iter().all(|b| *b == 0));
    }

    #[test]
    fn a_clock_written_over_code_is_seen_as_a_write_to_code() {
        let Some((mut m, _)) = at_one_second() else { return };
        let mut cpu = CpuState::reset();
        m.track(5);
        m.wrmsr(&mut cpu, SYSTEM, 0x4ff0 | 1).unwrap();
        let writes = m.take_code_writes();
        assert_eq!(writes.iter().map(|w| (w.at.0, w.len)).collect::<Vec<_>>(), [(0x5000, 16)]);
    }
}
