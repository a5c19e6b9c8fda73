//! The interpreter and the delivery of events on any code in any state: no panic, and EIP never leaves its width.

use arbitrary::{Arbitrary, Unstructured};
use monitor::cpum::{SegAttr, seg};
use monitor::interp::testing::{FlatEnv, flat_cpu, real_cpu};
use monitor::interp::{Step, step};
use monitor::trpm;

#[derive(Arbitrary, Debug)]
enum Mode {
    Real,
    V86,
    Protected(u8),
}

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    mode: Mode,
    gpr: [u32; 8],
    eflags: u32,
    cr0: u32,
    cr4: u32,
    segments: [(u32, u32, u16); 6],
    tables: [(u32, u16); 2],
    task: (u32, u32, u16),
    odd_segments: bool,
    ins: [u32; 2],
    code: &'a [u8],
}

const SIZE: usize = 0x1_0000;
const STEPS: usize = 200;

/// The body of the fuzz target.
///
/// # Panics
/// When it finds something.
pub fn fuzz(bytes: &[u8]) {
    let Ok(i) = Input::arbitrary_take_rest(Unstructured::new(bytes)) else { return };
    let mut env = FlatEnv::new(0, SIZE);
    // The code twice: where it starts, and around the tables so that descriptors and gates are arbitrary too.
    for at in [0x0u32, 0x1000, 0x8000] {
        let n = i.code.len().min(0x1000);
        env.put(at, &i.code[..n]);
    }
    env.ins = i.ins.into();
    env.msrs.insert(0x174, 0);
    let mut cpu = match i.mode {
        Mode::Protected(cpl) => flat_cpu(cpl & 3, 0x1000, 0x9000),
        Mode::Real | Mode::V86 => real_cpu(0x1000, 0x9000),
    };
    const VM: u32 = 1 << 17;
    cpu.eflags = (i.eflags & 0x7f_7fd5 & !VM) | 2;
    if matches!(i.mode, Mode::V86) {
        cpu.cr0 |= 1;
        cpu.eflags |= VM;
        cpu.cpl = 3;
    } else if matches!(i.mode, Mode::Protected(_)) {
        cpu.cr0 |= i.cr0 & 0x0005_002e;
    }
    cpu.cr4 = i.cr4 & 0xff;
    cpu.gpr = i.gpr.map(|r| if r & 1 == 0 { r & 0xffff } else { r });
    if i.odd_segments && matches!(i.mode, Mode::Protected(_)) {
        for (n, (base, limit, attr)) in i.segments.into_iter().enumerate() {
            if n == seg::CS {
                continue;
            }
            let s = &mut cpu.seg[n];
            s.base = base;
            s.limit = limit;
            s.attr = SegAttr::from_bits_truncate(attr);
        }
    }
    (cpu.gdtr.base, cpu.gdtr.limit) = i.tables[0];
    (cpu.idtr.base, cpu.idtr.limit) = i.tables[1];
    (cpu.tr.base, cpu.tr.limit) = (i.task.0 & 0xffff, i.task.1);
    cpu.tr.selector = i.task.2;
    cpu.tr.attr = SegAttr::from_bits_truncate(i.task.2);
    for _ in 0..STEPS {
        match step(&mut cpu, &mut env) {
            Step::Done => {}
            Step::Halted => break,
            Step::Raise(event) => {
                if trpm::deliver(&mut cpu, &mut env, event).is_err() {
                    break;
                }
            }
        }
        assert!(cpu.cpl <= 3);
        assert!(cpu.eflags & 2 != 0, "EFLAGS bit 1 is always 1");
        assert!(env.memory.len() == SIZE);
    }
}
