//! What a `/dev/kvm` is worth: a virtual machine is made and runs a few instructions.
//!
//! The node may exist on a host without hardware behind it, where KVM can only emulate: that shows in protected mode, in
//! an `iret` that KVM's emulator does not know.

use super::{KvmError, KvmExit, KvmState, KvmVm, kvm_segment};
use crate::ram::GuestRam;
use std::fmt;

/// What was found.
#[derive(Debug)]
pub enum KvmWorth {
    /// It runs guests.
    Hardware {
        /// Registers go through the shared page.
        shared_registers: bool,
        /// MSR accesses can be made to leave the guest.
        msr_exits: bool,
    },
    /// The virtual machine can be made and does not run the probe: what it did instead.
    DoesNotRun(KvmExit),
    /// It cannot be opened or does not make a virtual machine.
    Unusable(KvmError),
}

impl fmt::Display for KvmWorth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KvmWorth::Hardware { shared_registers, msr_exits } => {
                let has = |on: &bool, what| if *on { "" } else { what };
                let (a, b) =
                    (has(shared_registers, ", no shared registers"), has(msr_exits, ", no MSR exits"));
                write!(f, "hardware, runs protected mode{a}{b}")
            }
            KvmWorth::DoesNotRun(exit) => {
                write!(
                    f,
                    "there is no hardware behind it: a few instructions of protected mode end with {exit:?}"
                )
            }
            KvmWorth::Unusable(error) => error.fmt(f),
        }
    }
}

/// Where the probe's code lies, and its stack ends.
const CODE: u64 = 0x1000;
/// What it writes to which port.
const PORT: u16 = 0x80;
const PROOF: u8 = 0x5a;
/// `pushfd; push 8; push 100dh; iretd; hlt; nop...; mov al, 5ah; out 80h, al; hlt`, at 1000h.
const PROBE: [u8; 18] = [
    0x9c, 0x6a, 0x08, 0x68, 0x0d, 0x10, 0, 0, 0xcf, 0xf4, 0xf4, 0xf4, 0xf4, 0xb0, PROOF, 0xe6, PORT as u8,
    0xf4,
];
/// Null, flat 32-bit code (8), flat data (10h).
const GDT: [u64; 3] = [0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

fn flat(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment { limit: u32::MAX, selector, type_, present: 1, db: 1, s: 1, g: 1, ..kvm_segment::default() }
}

fn try_it() -> Result<(KvmExit, KvmVm), KvmError> {
    let memory = |why| KvmError { what: "memory for the probe", why };
    let ram = GuestRam::new(0x2000).map_err(memory)?;
    let gdt: Vec<u8> = GDT.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    let written = ram.write(0, &gdt).and_then(|()| ram.write(CODE, &PROBE));
    written.ok_or(KvmError::wrong("memory for the probe", "it does not fit"))?;
    let mut vm = KvmVm::new(&ram, &[])?;
    let was = vm.state()?;
    let mut new: KvmState = was;
    new.regs.rip = CODE;
    new.regs.rsp = 0x2000;
    new.regs.rflags = 2;
    new.sregs.cr0 |= 1;
    new.sregs.gdt.base = 0;
    new.sregs.gdt.limit = 23;
    new.sregs.cs = flat(8, 0xb);
    let data = flat(0x10, 3);
    let s = &mut new.sregs;
    (s.ss, s.ds, s.es, s.fs, s.gs) = (data, data, data, data, data);
    vm.set_state(&was, &new)?;
    // A signal of somebody else's is no answer.
    for _ in 0..100 {
        match vm.run()? {
            KvmExit::Interrupted => {}
            exit => return Ok((exit, vm)),
        }
    }
    Ok((KvmExit::Interrupted, vm))
}

/// Tries it.
#[must_use]
pub fn probe() -> KvmWorth {
    match try_it() {
        Err(error) => KvmWorth::Unusable(error),
        Ok((KvmExit::PortOut { port: PORT, size: 1, count: 1 }, vm)) if vm.port_data() == [PROOF] => {
            KvmWorth::Hardware { shared_registers: vm.registers_are_shared(), msr_exits: vm.msrs_leave() }
        }
        Ok((exit, _)) => KvmWorth::DoesNotRun(exit),
    }
}
