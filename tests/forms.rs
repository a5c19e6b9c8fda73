//! Single instructions for the interpreter and the real CPU: their operands, and what must be the same afterwards.

use crate::ring0_code::Random;
use host_driver_shim::native32::{BATCH, CODE, CODE16, CODE32, Case, DATA, DATA16, DATA32, Native32, PAGE};
use host_driver_shim::undefined_flags::{self, Overflow};
use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, Formatter, Instruction, Mnemonic, NasmFormatter, OpKind,
    Register, RflagsBits,
};
use monitor::cpum::{CpuState, SegAttr, Segment, cr4, eflags, gpr, seg};
use monitor::interp::testing::{FlatEnv, flat_cpu};
use monitor::interp::{Step, step};
use monitor::trap::{Event, Trap};

/// ES in the low byte of the x87 status word: an exception that is not masked waits.
const FSW_ES: u8 = 0x80;
/// Offset of the instruction in the code page.
const START: u32 = 0x5c7;

/// Values where arithmetic has its corners.
fn value(r: &mut Random) -> u32 {
    let corners = [0, 1, 2, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0xffff, 0x7fff_ffff, 0x8000_0000, u32::MAX];
    match r.below(4) {
        0 => corners[r.below(12) as usize],
        1 => r.bits() as u32 & 0xff,
        _ => r.bits() as u32,
    }
}

fn float(r: &mut Random) -> f64 {
    match r.below(10) {
        0 => 0.0,
        1 => -0.0,
        2 => f64::INFINITY,
        3 => f64::NAN,
        4 => f64::from_bits(r.bits()),
        5 => f64::MIN_POSITIVE / 8.0,
        6 => f64::from(value(r) as i32),
        _ => f64::from(r.bits() as i32) / 1024.0,
    }
}

/// What the two sides share about one case.
pub struct Plan {
    /// State, operands and bytes.
    pub case: Case,
    /// The instruction.
    pub instruction: Instruction,
}

/// The code segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// 32-bit.
    Bits32,
    /// 16-bit.
    Bits16,
}

/// Where the data page is in the addresses of a mode.
fn data_offset(mode: Mode) -> u32 {
    if mode == Mode::Bits32 { DATA } else { DATA - CODE }
}

/// Forms the comparison cannot hold: they leave user mode, ask the host who it is, or load selectors.
fn excluded(i: &Instruction) -> bool {
    use Mnemonic as M;
    let features_ok = i.cpuid_features().iter().all(|f| {
        use CpuidFeature as F;
        matches!(
            f,
            F::INTEL8086
                | F::INTEL186
                | F::INTEL286
                | F::INTEL386
                | F::INTEL486
                | F::CMOV
                | F::CX8
                | F::FPU
                | F::FPU287
                | F::FPU387
                | F::FXSR
                | F::MMX
                | F::SSE
                | F::SSE2
                | F::SSE3
                | F::SSSE3
                | F::SSE4_1
                | F::SSE4_2
                | F::SSE4A
                | F::AES
                | F::PCLMULQDQ
                | F::SHA
                | F::GFNI
                | F::POPCNT
                | F::LZCNT
                | F::BMI1
                | F::MOVBE
                | F::ADX
                | F::MULTIBYTENOP
                | F::PREFETCHW
                | F::PAUSE
                | F::CLFSH
                | F::CLFLUSHOPT
                | F::CET_IBT
        )
    });
    let segment_operand = (0..i.op_count())
        .any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_segment_register())
        && i.op0_kind() == OpKind::Register
        && i.op0_register().is_segment_register()
        && i.mnemonic() != M::Push;
    !features_ok
        || segment_operand
        || matches!(i.segment_prefix(), Register::FS | Register::GS)
        || matches!(
            i.mnemonic(),
            M::Int | M::Int1 | M::Hlt | M::Syscall | M::Sysenter | M::Cpuid | M::In | M::Out
                | M::Insb | M::Insw | M::Outsb | M::Outsw | M::Outsd
                | M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw
                | M::Lar | M::Lsl | M::Verr | M::Verw | M::Lldt | M::Ltr
                | M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss
                | M::Retf | M::Iret | M::Iretd
        )
        || i.code() == Code::Insd_m32_DX
        // Undefined with a register on AMD, nothing on Intel.
        || matches!(i.code(), Code::Reservednop_rm16_r16_0F0D | Code::Reservednop_rm32_r32_0F0D)
        // A repeat prefix turns the condition round on AMD; nobody documents it.
        || matches!(i.mnemonic(), M::Loope | M::Loopne) && (i.has_rep_prefix() || i.has_repne_prefix())
        || i.is_call_far() || i.is_jmp_far() || i.is_call_far_indirect() || i.is_jmp_far_indirect()
        // CR and DR accesses are #GP at CPL 3 on both sides, unless a hypervisor looks first.
        || (0..2.min(i.op_count())).any(|n| i.op_kind(n) == OpKind::Register && (i.op_register(n).is_cr() || i.op_register(n).is_dr() || i.op_register(n).is_tr()))
}

/// The FPU environment's pointers and what hardware leaves of them are documented to differ.
fn writes_fpu_pointers(i: &Instruction) -> bool {
    matches!(i.mnemonic(), Mnemonic::Fnstenv | Mnemonic::Fnsave | Mnemonic::Fxsave)
}

fn uses_fpu(i: &Instruction) -> bool {
    use CpuidFeature as F;
    i.cpuid_features().iter().any(|f| {
        !matches!(
            f,
            F::INTEL8086
                | F::INTEL186
                | F::INTEL286
                | F::INTEL386
                | F::INTEL486
                | F::CX8
                | F::POPCNT
                | F::LZCNT
                | F::BMI1
                | F::MOVBE
        )
    })
}

fn extended(v: f64, random: &mut Random) -> [u8; 10] {
    let bits = v.to_bits();
    let (exp, frac) = ((bits >> 52 & 0x7ff) as u16, bits << 12 >> 1);
    let sign = (bits >> 63) as u16;
    let (e, m) = match exp {
        0 if frac == 0 => (0, 0),
        0x7ff => (0x7fff, 1 << 63 | frac),
        _ => (exp + 15360, 1 << 63 | frac | random.bits() & 0x7ff),
    };
    let mut b = [0; 10];
    b[..8].copy_from_slice(&m.to_le_bytes());
    b[8..].copy_from_slice(&(e | sign << 15).to_le_bytes());
    b
}

fn random_fx(fx: &mut [u8; 512], random: &mut Random) {
    let masks = if random.one_in(3) { random.bits() as u16 & 0x3f } else { 0x3f };
    let fcw = masks | 0x40 | (random.below(4) as u16) << 10 | [0u16, 2, 3][random.below(3) as usize] << 8;
    let sticky = random.bits() as u16 & 0x3f & if random.one_in(8) { 0x3f } else { masks };
    let pending = sticky & !masks != 0;
    let fsw = random.bits() as u16 & 0x4700
        | (random.below(8) as u16) << 11
        | sticky
        | if pending { 0x8080 } else { 0 };
    fx[0..2].copy_from_slice(&fcw.to_le_bytes());
    fx[2..4].copy_from_slice(&fsw.to_le_bytes());
    fx[4] = if random.one_in(2) { 0xff } else { random.bits() as u8 };
    let sse_masks = if random.one_in(3) { random.bits() as u32 & 0x1f80 } else { 0x1f80 };
    let mxcsr = sse_masks
        | (random.below(4) as u32) << 13
        | if sse_masks == 0x1f80 { random.bits() as u32 & 0x803f } else { 0 };
    fx[24..28].copy_from_slice(&mxcsr.to_le_bytes());
    for n in 0..8 {
        let v = float(random);
        let e = extended(v, random);
        fx[32 + 16 * n..42 + 16 * n].copy_from_slice(&e);
        let x = &mut fx[160 + 16 * n..176 + 16 * n];
        match random.below(3) {
            0 => x.chunks_exact_mut(8).for_each(|b| b.copy_from_slice(&float(random).to_le_bytes())),
            1 => x.chunks_exact_mut(4).for_each(|b| b.copy_from_slice(&(float(random) as f32).to_le_bytes())),
            _ => x.fill_with(|| random.bits() as u8),
        }
    }
}

/// Fills in registers and memory for an instruction; patches its displacement where only that decides the address.
#[must_use]
pub fn plan(mut bytes: Vec<u8>, mode: Mode, random: &mut Random) -> Option<Plan> {
    let bitness = if mode == Mode::Bits32 { 32 } else { 16 };
    // Not zero, which random branch targets often are: a branch to itself never ends.
    let start = if mode == Mode::Bits32 { CODE + START } else { START };
    let decode = |bytes: &[u8]| {
        let mut d = Decoder::with_ip(bitness, bytes, start.into(), DecoderOptions::NONE);
        let i = d.decode();
        let offsets = d.get_constant_offsets(&i);
        (i, offsets)
    };
    let (mut i, offsets) = decode(&bytes);
    if i.is_invalid() || excluded(&i) {
        return None;
    }
    let mut case = Case::default();
    let s = &mut case.state;
    if mode == Mode::Bits16 {
        (s.cs, s.ds) = (CODE16.into(), DATA16.into());
    }
    let page = data_offset(mode);
    s.eip = start;
    s.eflags = 0x202 | random.bits() as u32 & (eflags::ARITH | eflags::DF);
    for r in &mut s.gpr {
        *r = value(random);
    }
    let mask16 = |v: u32| if mode == Mode::Bits16 { v & 0xffff } else { v };
    s.gpr[gpr::ESP] = page + 0x800 + 4 * random.below(64) as u32;
    for r in [gpr::ESI, gpr::EDI, gpr::EBP, gpr::EBX] {
        if random.one_in(2) || i.is_string_instruction() {
            s.gpr[r] = page + random.below(PAGE as u64) as u32;
        }
    }
    if i.has_rep_prefix() || i.has_repne_prefix() {
        s.gpr[gpr::ECX] = if random.one_in(10) { random.below(6000) } else { random.below(40) } as u32;
    }
    if mode == Mode::Bits16 {
        // The upper half of ESP is not loaded with a 16-bit stack (SDM Vol. 3A, 5.8.?): what reads it cannot be compared.
        let reads_esp = (0..i.op_count())
            .any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n) == Register::ESP)
            || i.memory_base() == Register::ESP
            || matches!(i.mnemonic(), Mnemonic::Pushad | Mnemonic::Enter | Mnemonic::Leave);
        if reads_esp {
            return None;
        }
    }
    if (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory) {
        let size = i.memory_size().size().max(1) as u32;
        let mut target = match random.below(20) {
            0 => page + PAGE as u32 - random.below(u64::from(size) + 1) as u32,
            1 => value(random),
            _ => page + random.below(PAGE as u64 - 512) as u32,
        };
        if size >= 16 && !random.one_in(6) {
            target &= !15;
        }
        target = mask16(target);
        let full = |r: Register| r.full_register32() as usize - Register::EAX as usize;
        let wide = |r: Register| r.size() == 4;
        let (base, index) = (i.memory_base(), i.memory_index());
        if index != Register::None && !wide(index) {
            s.gpr[full(index)] &= 0xffff;
        }
        let index_value =
            if index == Register::None { 0 } else { s.gpr[full(index)].wrapping_mul(i.memory_index_scale()) };
        if base != Register::None && base != index {
            let v = target.wrapping_sub(index_value).wrapping_sub(i.memory_displacement32());
            s.gpr[full(base)] = if wide(base) { v } else { s.gpr[full(base)] & 0xffff_0000 | v & 0xffff };
        } else if base == Register::None && offsets.has_displacement() {
            let v = target.wrapping_sub(index_value).to_le_bytes();
            let (at, len) = (offsets.displacement_offset(), offsets.displacement_size());
            bytes[at..at + len].copy_from_slice(&v[..len]);
            i = decode(&bytes).0;
        }
        if i.mnemonic() == Mnemonic::Xlatb {
            s.gpr[gpr::EBX] = page + random.below(3800) as u32;
        }
    }
    if i.near_branch_target() != 0
        || i.op0_kind() == OpKind::NearBranch32
        || i.op0_kind() == OpKind::NearBranch16
    {
        let t = i.near_branch_target() as u32;
        if t.wrapping_sub(start) < 16 {
            return None;
        }
    }
    for b in case.data.chunks_exact_mut(8) {
        b.copy_from_slice(&random.bits().to_le_bytes());
    }
    if random.one_in(2) {
        for chunk in case.data.chunks_exact_mut(8) {
            match random.below(4) {
                0 => chunk.copy_from_slice(&float(random).to_le_bytes()),
                1 => chunk[..4].copy_from_slice(&(float(random) as f32).to_le_bytes()),
                2 => chunk[..4].copy_from_slice(&value(random).to_le_bytes()),
                _ => {}
            }
        }
    }
    if matches!(i.mnemonic(), Mnemonic::Popf | Mnemonic::Popfd) {
        // No single-stepping, and no alignment checks in the harness's signal handler.
        let at = (s.gpr[gpr::ESP] - page) as usize;
        case.data[at + 1] &= !1;
        case.data[at + 2] &= !4;
    }
    if matches!(i.mnemonic(), Mnemonic::Ldmxcsr | Mnemonic::Fxrstor) && random.one_in(2) {
        for chunk in case.data.chunks_exact_mut(4) {
            chunk[2..].fill(0);
        }
    }
    if uses_fpu(&i) {
        random_fx(&mut case.state.fx, random);
    }
    case.code[..bytes.len().min(15)].copy_from_slice(&bytes[..bytes.len().min(15)]);
    // What the decoder did not take must be a trap.
    case.code[i.len()..].fill(0xf4);
    Some(Plan { case, instruction: i })
}

fn guest(case: &Case) -> (CpuState, FlatEnv) {
    let mut env = FlatEnv::new(CODE, 2 * PAGE);
    env.memory[..PAGE].fill(0xf4);
    env.memory[START as usize..START as usize + 16].copy_from_slice(&case.code);
    env.memory[PAGE..].copy_from_slice(&case.data);
    let s = &case.state;
    let mut cpu = flat_cpu(3, s.eip, 0);
    cpu.cr0 |= monitor::cpum::cr0::MP | monitor::cpum::cr0::AM | monitor::cpum::cr0::PG;
    cpu.cr4 = cr4::OSFXSR | cr4::OSXMMEXCPT;
    cpu.gpr = s.gpr;
    cpu.eflags = s.eflags;
    cpu.fpu.0 = s.fx;
    cpu.seg[seg::CS].selector = CODE32;
    for n in [seg::DS, seg::ES, seg::SS] {
        cpu.seg[n].selector = DATA32;
    }
    for n in [seg::FS, seg::GS] {
        cpu.seg[n] = Segment::default();
    }
    if s.cs == u32::from(CODE16) {
        let data =
            Segment { selector: DATA16, base: CODE, limit: 8191, attr: SegAttr::from_bits_truncate(0xf3) };
        for n in [seg::DS, seg::ES, seg::SS] {
            cpu.seg[n] = data;
        }
        cpu.seg[seg::CS] =
            Segment { selector: CODE16, base: CODE, limit: 4095, attr: SegAttr::from_bits_truncate(0xfb) };
    }
    (cpu, env)
}

/// Whether this CPU is one of Intel's, by a habit of theirs.
fn is_intel() -> bool {
    undefined_flags::host().overflow == Overflow::FirstStep
}

fn flags_undefined(i: &Instruction) -> u32 {
    let table = [
        (RflagsBits::OF, eflags::OF),
        (RflagsBits::SF, eflags::SF),
        (RflagsBits::ZF, eflags::ZF),
        (RflagsBits::AF, eflags::AF),
        (RflagsBits::CF, eflags::CF),
        (RflagsBits::PF, eflags::PF),
    ];
    // On an Intel CPU the interpreter knows all there is to know.
    if is_intel() {
        return 0;
    }
    let undefined = i.rflags_undefined();
    table.iter().filter(|(bit, _)| undefined & bit != 0).map(|(_, flag)| flag).sum()
}

/// Which of several faults comes first is the CPU's choice in these cases, and here Intel's is another than AMD's, which is the
/// interpreter's.
fn other_fault_first(i: &Instruction, native: &Case, interpreter: Option<&Trap>) -> bool {
    let n = &native.state;
    let theirs = interpreter.map(|t| t.vector);
    // Memory operands of these are to be aligned on Intel's CPUs.
    let sha = matches!(
        i.mnemonic(),
        Mnemonic::Sha1msg1
            | Mnemonic::Sha1msg2
            | Mnemonic::Sha1nexte
            | Mnemonic::Sha1rnds4
            | Mnemonic::Sha256msg1
            | Mnemonic::Sha256msg2
            | Mnemonic::Sha256rnds2
    );
    let unaligned = sha && n.vector == 13 && matches!(theirs, None | Some(12..=14));
    // An operand that reaches over the end of the 4 GiB.
    let over_the_end = n.vector == 14 && n.cr2 >= 0xffff_fff0 && matches!(theirs, Some(12 | 13));
    // The lower bound is compared before the upper one is read.
    let lower_first = i.mnemonic() == Mnemonic::Bound && n.vector == 5 && matches!(theirs, Some(12..=14));
    is_intel() && (unaligned || over_the_end || lower_first)
}

/// What the CPU wrote beyond the definition: the upper half of what `push` of a segment register writes is kept by Intel's CPUs
/// (SDM vol. 2B, PUSH), and they have written a near call's return address before they find that its target is beyond the limit,
/// and the part of an 80-bit number or of masked bytes that lies before the page that is not there.
fn written_besides(i: &Instruction, at: usize, esp: u32, faulted: bool) -> bool {
    let above = (at as u32).wrapping_sub(esp) & (PAGE as u32 - 1);
    match i.mnemonic() {
        _ if !is_intel() => false,
        Mnemonic::Push => i.op0_register().is_segment_register() && matches!(above, 2 | 3),
        Mnemonic::Call => faulted && above >= PAGE as u32 - 4,
        Mnemonic::Fstp | Mnemonic::Fbstp | Mnemonic::Maskmovq | Mnemonic::Maskmovdqu => {
            faulted && at >= PAGE - 16
        }
        _ => false,
    }
}

/// The first difference between the CPU and the interpreter, in words.
#[must_use]
pub fn difference(plan: &Plan, native: &Case) -> Option<String> {
    let i = &plan.instruction;
    let (mut cpu, mut env) = guest(&plan.case);
    let start = plan.case.state.eip;
    let mut outcome = Step::Done;
    for _ in 0..100 {
        outcome = step(&mut cpu, &mut env);
        if outcome != Step::Done || cpu.eip != start {
            break;
        }
    }
    if env.memory[START as usize..START as usize + 16] != plan.case.code {
        // It wrote over itself: the interpreter decodes again between steps, the CPU when it likes.
        return None;
    }
    let n = &native.state;
    let faulted = n.eip == start;
    match outcome {
        // Whether masked-out bytes are checked is the CPU's choice.
        Step::Done
            if faulted
                && n.vector != 6
                && matches!(i.mnemonic(), Mnemonic::Maskmovq | Mnemonic::Maskmovdqu) =>
        {
            return None;
        }
        Step::Done if faulted && other_fault_first(i, native, None) => return None,
        Step::Done if faulted => {
            return Some(format!(
                "CPU: vector {} code {:#x} cr2 {:#x}; interpreter: done",
                n.vector, n.error_code, n.cr2
            ));
        }
        Step::Done => {}
        Step::Raise(Event::Exception(t)) => {
            // Intel's CPUs do not store what an x87 exception they raise later keeps from being stored.
            if is_intel() && !faulted && n.fx[2] & FSW_ES != 0 && matches!(t.vector, 12..=14) {
                return None;
            }
            if !faulted {
                return Some(format!("CPU: done; interpreter: {t:x?}"));
            }
            if other_fault_first(i, native, Some(&t)) {
                return None;
            }
            let same_cr2 = |cr2: u32| match i.mnemonic() {
                // Which operand, and which byte of many, is the CPU's choice.
                Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsd => true,
                Mnemonic::Fldenv | Mnemonic::Frstor | Mnemonic::Fnstenv | Mnemonic::Fnsave => true,
                Mnemonic::Fxsave | Mnemonic::Fxrstor | Mnemonic::Maskmovq | Mnemonic::Maskmovdqu => true,
                _ => cr2 == n.cr2,
            };
            let same = u32::from(t.vector) == n.vector
                && t.error_code.is_none_or(|c| c == n.error_code)
                && t.cr2.is_none_or(same_cr2);
            if !same {
                return Some(format!(
                    "CPU: vector {} code {:#x} cr2 {:#x}; interpreter: {t:x?}",
                    n.vector, n.error_code, n.cr2
                ));
            }
        }
        Step::Raise(Event::Software { vector, .. }) => {
            if u32::from(vector) != n.vector {
                return Some(format!("CPU: vector {}; interpreter: int {vector}", n.vector));
            }
        }
        other => return Some(format!("interpreter: {other:?}")),
    }
    if matches!(i.mnemonic(), Mnemonic::Shld | Mnemonic::Shrd)
        && matches!(i.code().op_code().operand_size(), 16)
        && shift_count(plan) > 16
    {
        // All of it undefined.
        return None;
    }
    let short = plan.case.state.ds == u32::from(DATA16);
    for r in 0..8 {
        let mask = if short && r == gpr::ESP { 0xffff } else { u32::MAX };
        let undefined_result = matches!(i.mnemonic(), Mnemonic::Bswap) && i.op0_register().size() == 2
            || matches!(i.mnemonic(), Mnemonic::Shld | Mnemonic::Shrd)
                && i.op0_register().size() == 2
                && shift_count(plan) > 16;
        if (cpu.gpr[r] ^ n.gpr[r]) & mask != 0 && !undefined_result {
            return Some(format!("gpr {r}: CPU {:#x}, interpreter {:#x}", n.gpr[r], cpu.gpr[r]));
        }
    }
    if cpu.eip != n.eip {
        return Some(format!("eip: CPU {:#x}, interpreter {:#x}", n.eip, cpu.eip));
    }
    let mut flags = eflags::ARITH | eflags::DF | eflags::TF | eflags::NT | eflags::AC | eflags::ID;
    flags &= !flags_undefined(i);
    if faulted && i.is_string_instruction() {
        // Intel restores the flags when a repeated comparison faults, AMD leaves those of the last iteration.
        flags &= !eflags::ARITH;
    }
    if (cpu.eflags ^ n.eflags) & flags != 0 {
        return Some(format!("flags: CPU {:#x}, interpreter {:#x}, of {flags:#x}", n.eflags, cpu.eflags));
    }
    let data = &env.memory[PAGE..];
    if !writes_fpu_pointers(i)
        && let Some(at) = (0..PAGE)
            .find(|at| data[*at] != native.data[*at] && !written_besides(i, *at, cpu.gpr[gpr::ESP], faulted))
    {
        let end = (at + 8).min(PAGE);
        return Some(format!(
            "data+{at:#x}: CPU {:02x?}, interpreter {:02x?}",
            &native.data[at..end],
            &data[at..end]
        ));
    }
    let fx = &cpu.fpu.0;
    let compared = (0..6).chain(24..28).chain((0..8).flat_map(|r| 32 + 16 * r..42 + 16 * r)).chain(160..288);
    let simd_fault = faulted && n.vector == 19;
    for at in compared {
        let mut differing = fx[at] ^ n.fx[at];
        if simd_fault && at == 24 {
            // PE beside an unmasked overflow or underflow (see `interp::fpu`).
            differing &= !0x20;
            if matches!(i.mnemonic(), Mnemonic::Dpps | Mnemonic::Dppd) {
                // An exception of its first operation keeps the others from happening.
                differing &= !0x3f;
            }
        }
        let enters_mmx =
            simd_fault || is_intel() && faulted && (0..i.op_count()).any(|n| i.op_register(n).is_mm());
        if enters_mmx && ((2..6).contains(&at) || (32..160).contains(&at)) {
            // Whether MMX state is entered (TOP = 0) before the exception is the CPU's choice.
            differing = 0;
        }
        if differing != 0 {
            let from = at & !15;
            return Some(format!(
                "fx+{at}: CPU {:02x?}, interpreter {:02x?}",
                &n.fx[from..from + 16],
                &fx[from..from + 16]
            ));
        }
    }
    None
}

fn shift_count(plan: &Plan) -> u32 {
    let i = &plan.instruction;
    let count = if i.op2_kind() == OpKind::Immediate8 {
        i.immediate8().into()
    } else {
        plan.case.state.gpr[gpr::ECX]
    };
    count & 31
}

/// Every form once: prefixes, opcode, ModRM by group, and random bytes for the rest.
#[must_use]
pub fn forms(random: &mut Random) -> Vec<Vec<u8>> {
    let maps: [&[u8]; 4] = [&[], &[0x0f], &[0x0f, 0x38], &[0x0f, 0x3a]];
    let mut out = Vec::new();
    for map in maps {
        for opcode in 0..=255u8 {
            for prefix in [None, Some(0x66), Some(0xf3), Some(0xf2)] {
                for group in 0..8u8 {
                    for memory in [true, false] {
                        let mut bytes = Vec::new();
                        if random.one_in(8) {
                            bytes.push([0x67, 0x26, 0x2e, 0x36, 0x3e, 0x66][random.below(6) as usize]);
                        }
                        if random.one_in(12) && memory {
                            bytes.push(0xf0);
                        }
                        bytes.extend(prefix);
                        bytes.extend(map);
                        bytes.push(opcode);
                        let rm = random.below(8) as u8;
                        let mode = if memory { random.below(3) as u8 } else { 3 };
                        bytes.push(mode << 6 | group << 3 | rm);
                        while bytes.len() < 15 {
                            bytes.push(random.bits() as u8);
                        }
                        out.push(bytes);
                    }
                }
            }
        }
    }
    out
}

/// As text.
#[must_use]
pub fn disassemble(i: &Instruction) -> String {
    let mut text = String::new();
    NasmFormatter::new().format(i, &mut text);
    text
}

/// Bytes of an instruction in the fuzz target's input: flags (1: 16-bit code), seed of its operands, its bytes.
pub const RECORD: usize = 24;

/// The body of the fuzz target `interp_vs_cpu`: a batch of instructions.
///
/// # Panics
/// When the CPU and the interpreter differ.
pub fn fuzz(native: &mut Native32, bytes: &[u8]) {
    let plans: Vec<(Mode, Plan)> = bytes
        .chunks(RECORD)
        .take(BATCH)
        .filter_map(|record| {
            let (head, code) = record.split_at_checked(9)?;
            let mode = if head[0] & 1 == 0 { Mode::Bits32 } else { Mode::Bits16 };
            let seed = head[1..].iter().fold(0, |n, b| n << 8 | u64::from(*b));
            let mut code = code.to_vec();
            code.resize(15, 0);
            Some((mode, plan(code, mode, &mut Random(seed))?))
        })
        .collect();
    if plans.is_empty() {
        return;
    }
    let mut cases: Vec<Case> = plans.iter().map(|(_, p)| p.case).collect();
    native.run(&mut cases).unwrap();
    for ((mode, plan), result) in plans.iter().zip(&cases) {
        if let Some(why) = difference(plan, result) {
            panic!("{}: {why}", describe(*mode, plan));
        }
    }
}

/// One instruction with its operands, as text.
#[must_use]
pub fn describe(mode: Mode, plan: &Plan) -> String {
    format!(
        "{mode:?} {:02x?} {} | eflags {:#x} gpr {:x?}",
        &plan.case.code[..plan.instruction.len()],
        disassemble(&plan.instruction),
        plan.case.state.eflags,
        plan.case.state.gpr,
    )
}
