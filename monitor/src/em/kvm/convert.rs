//! CPUM's state as KVM's structures, and back.
//!
//! What did not change since the vCPU was last looked at is handed back as KVM gave it, bit by bit: KVM's view of a
//! segment differs in ways that do not matter (accessed bits, G) and would cost a call each time.

use crate::cpum::{CpuState, SegAttr, Segment, Shadow, TableRegister, gpr, seg};
use crate::selm::v86_segment;
use host_driver_shim::kvm::{
    KVM_VCPUEVENT_VALID_SHADOW, KVM_X86_SHADOW_INT_MOV_SS, KVM_X86_SHADOW_INT_STI, KvmState, kvm_dtable,
    kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events,
};

fn general(cpu: &CpuState, regs: &mut kvm_regs) {
    let g = cpu.gpr.map(u64::from);
    (regs.rax, regs.rcx, regs.rdx, regs.rbx) = (g[gpr::EAX], g[gpr::ECX], g[gpr::EDX], g[gpr::EBX]);
    (regs.rsp, regs.rbp, regs.rsi, regs.rdi) = (g[gpr::ESP], g[gpr::EBP], g[gpr::ESI], g[gpr::EDI]);
    regs.rip = cpu.eip.into();
    regs.rflags = cpu.eflags.into();
}

fn segment(s: &Segment) -> kvm_segment {
    let attr = s.attr.bits();
    let bit = |n: u16| (attr >> n & 1) as u8;
    let present = s.attr.contains(SegAttr::PRESENT);
    kvm_segment {
        base: s.base.into(),
        limit: s.limit,
        selector: s.selector,
        type_: s.attr.type_bits(),
        present: u8::from(present),
        dpl: s.attr.dpl(),
        db: bit(10),
        s: bit(4),
        l: 0,
        // A VM entry checks that G fits the limit (SDM Vol. 3C, 26.3.1.2).
        g: if s.limit >> 20 != 0 { 1 } else { bit(11) & u8::from(s.limit & 0xfff == 0xfff) },
        avl: bit(8),
        unusable: u8::from(!present),
        padding: 0,
    }
}

fn from_segment(s: &kvm_segment) -> Segment {
    if s.unusable != 0 || s.present == 0 {
        return Segment { selector: s.selector, ..Segment::default() };
    }
    let bit = |value: u8, n: u32| u16::from(value & 1) << n;
    let attr = u16::from(s.type_ & 15)
        | bit(s.s, 4)
        | u16::from(s.dpl & 3) << 5
        | bit(s.present, 7)
        | bit(s.avl, 8)
        | bit(s.db, 10)
        | bit(s.g, 11);
    Segment {
        selector: s.selector,
        base: s.base as u32,
        limit: s.limit,
        attr: SegAttr::from_bits_truncate(attr),
    }
}

fn table(t: TableRegister) -> kvm_dtable {
    kvm_dtable { base: t.base.into(), limit: t.limit, padding: [0; 3] }
}

fn system(cpu: &CpuState, sregs: &mut kvm_sregs) {
    let segments = if cpu.v86() { cpu.seg.map(|s| v86_segment(s.selector)) } else { cpu.seg };
    let [es, cs, ss, ds, fs, gs] = segments.map(|s| segment(&s));
    (sregs.es, sregs.cs, sregs.ss, sregs.ds, sregs.fs, sregs.gs) = (es, cs, ss, ds, fs, gs);
    // KVM takes the CPL from here.
    sregs.ss.dpl = cpu.cpl;
    sregs.ldt = segment(&cpu.ldtr);
    sregs.tr = segment(&cpu.tr);
    // A task register always holds a busy TSS (SDM Vol. 3C, 26.3.1.2).
    sregs.tr.type_ |= 2;
    (sregs.gdt, sregs.idt) = (table(cpu.gdtr), table(cpu.idtr));
    (sregs.cr0, sregs.cr2) = (cpu.cr0.into(), cpu.cr2.into());
    (sregs.cr3, sregs.cr4) = (cpu.cr3.into(), cpu.cr4.into());
    sregs.efer = cpu.msr.efer;
    sregs.interrupt_bitmap = [0; 4];
    // There is no local APIC. While this said that it is enabled, KVM would show it in CPUID whatever the policy says.
    sregs.apic_base = 0;
}

/// Nothing is on its way; the interrupt shadow is CPUM's.
fn events(cpu: &CpuState, events: &mut kvm_vcpu_events) {
    events.exception = Default::default();
    events.exception_has_payload = 0;
    events.exception_payload = 0;
    events.interrupt = Default::default();
    events.interrupt.shadow = match cpu.shadow {
        Shadow::None => 0,
        Shadow::Sti => KVM_X86_SHADOW_INT_STI as u8,
        Shadow::MovSs => KVM_X86_SHADOW_INT_MOV_SS as u8,
    };
    events.nmi.injected = 0;
    events.nmi.pending = 0;
    events.flags |= KVM_VCPUEVENT_VALID_SHADOW;
}

fn same_general(a: &CpuState, b: &CpuState) -> bool {
    (a.gpr, a.eip, a.eflags) == (b.gpr, b.eip, b.eflags)
}

fn same_system(a: &CpuState, b: &CpuState) -> bool {
    let registers = |c: &CpuState| (c.cr0, c.cr2, c.cr3, c.cr4, c.msr.efer, c.cpl, c.v86());
    (a.seg, a.ldtr, a.tr, a.gdtr, a.idtr) == (b.seg, b.ldtr, b.tr, b.gdtr, b.idtr)
        && registers(a) == registers(b)
}

/// CPUM's state for the vCPU, which holds `held`; CPUM saw that as `seen`, if at all.
#[must_use]
pub fn into_kvm(cpu: &CpuState, seen: Option<&CpuState>, held: &KvmState) -> KvmState {
    let mut new = *held;
    if seen.is_none_or(|seen| !same_general(cpu, seen)) {
        general(cpu, &mut new.regs);
    }
    if seen.is_none_or(|seen| !same_system(cpu, seen)) || held.sregs.interrupt_bitmap != [0; 4] {
        system(cpu, &mut new.sregs);
    }
    let e = &held.events;
    let busy =
        e.exception.injected | e.exception.pending | e.interrupt.injected | e.nmi.injected | e.nmi.pending;
    if seen.is_none_or(|seen| cpu.shadow != seen.shadow) || busy != 0 {
        events(cpu, &mut new.events);
    }
    new
}

/// The vCPU's state for CPUM: all but FPU, debug registers and MSRs.
pub fn into_cpu(state: &KvmState, cpu: &mut CpuState) {
    let KvmState { regs, sregs, events } = state;
    let g = [regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi];
    cpu.gpr = g.map(|r| r as u32);
    cpu.eip = regs.rip as u32;
    cpu.eflags = regs.rflags as u32;
    (cpu.cr0, cpu.cr2, cpu.cr3, cpu.cr4) =
        (sregs.cr0 as u32, sregs.cr2 as u32, sregs.cr3 as u32, sregs.cr4 as u32);
    for (number, s) in [
        (seg::ES, &sregs.es),
        (seg::CS, &sregs.cs),
        (seg::SS, &sregs.ss),
        (seg::DS, &sregs.ds),
        (seg::FS, &sregs.fs),
        (seg::GS, &sregs.gs),
    ] {
        cpu.seg[number] = from_segment(s);
    }
    cpu.ldtr = from_segment(&sregs.ldt);
    cpu.tr = from_segment(&sregs.tr);
    cpu.gdtr = TableRegister { base: sregs.gdt.base as u32, limit: sregs.gdt.limit };
    cpu.idtr = TableRegister { base: sregs.idt.base as u32, limit: sregs.idt.limit };
    cpu.cpl = match (cpu.protected(), cpu.v86()) {
        (false, _) => 0,
        (true, true) => 3,
        (true, false) => sregs.ss.dpl & 3,
    };
    // AMD's hardware has one kind of shadow and KVM reports both.
    cpu.shadow = match u32::from(events.interrupt.shadow) {
        0 => Shadow::None,
        KVM_X86_SHADOW_INT_MOV_SS => Shadow::MovSs,
        _ => Shadow::Sti,
    };
    cpu.halted = false;
}
