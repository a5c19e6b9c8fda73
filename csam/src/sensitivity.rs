//! The sensitivity table: what each instruction means to a ring 0 that runs at hardware privilege level 3.
//!
//! Popek and Goldberg call an instruction *sensitive* when it reads or changes privileged state, and *privileged*
//! when it also traps outside ring 0. On x86 the two sets differ (SDM Vol. 3A, 5.9 lists the privileged ones), and
//! iced's `is_privileged()` is neither: it leaves out `pushf`, `mov r, sreg`, `sgdt`, far transfers and `sysenter`.
//! So every `Code` is classified here by hand, and the test at the end walks all of them and fails when something that
//! touches privileged state, by any of iced's attributes, was left as [`Class::Innocuous`].
//!
//! Decisions that are policy and not architecture:
//! - `rdtsc`, `pause`, `rdrand`, `rdseed`, `xsave`, `xrstor` run natively.
//! - `int3`, `int1`, `into`, `bound`, `ud*` are [`Class::Trapping`]: they raise their exception at any privilege
//!   level, the host hands it to us, and the guest gets it. They need no patch, and `int3` must not get one: a guest
//!   writes it over its own code (kprobes, `text_poke`) and expects it to be a byte long. A `bound` that reads its
//!   bounds through CS is [`SensitiveKind::CsData`].
//! - `int n` is a site: a vector that is a host gate (0x80) would be a host system call. See
//!   [`HostBehaviour::OperandDependent`].
//! - Instructions that CPUID hides from the guest but the host executes are [`SensitiveKind::HiddenFeature`]: bare
//!   metal without the feature raises #UD.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

/// What running an instruction of guest ring 0 natively at hardware privilege level 3 would do.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub enum Class {
    /// The same as in ring 0: it runs as it is.
    Innocuous,
    /// Raises an exception of its own at any privilege level, which the guest shall see: no patch is needed.
    Trapping,
    /// Something else than in ring 0: it must be patched or trapped.
    Sensitive(SensitiveKind),
}

/// What the host processor does with a sensitive instruction that nobody patched.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub enum HostBehaviour {
    /// It faults (#GP or #UD), so that leaving it alone is slow but right.
    Traps,
    /// It completes with the host's state instead of the guest's, or enters the host kernel.
    SilentlyWrong,
    /// Depends on how the host is set up (CPUID faulting, CR4.PCE, CR4.OSPKE); assume the worse.
    HostDependent,
    /// Depends on an operand; ask [`host_behaviour`] with the instruction.
    OperandDependent,
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident $text:literal $behaviour:ident,)*) => {
        /// What a sensitive instruction does, as far as whoever emulates or patches it must tell apart.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
        #[repr(u8)]
        pub enum SensitiveKind { $($(#[$doc])* $name,)* }

        impl SensitiveKind {
            /// Every kind, in declaration order: `ALL[k as usize] == k`.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The name used in tables and JSON.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// What the host does with it unpatched.
            #[must_use]
            pub const fn host_behaviour(self) -> HostBehaviour {
                match self { $(Self::$name => HostBehaviour::$behaviour,)* }
            }
        }
    };
}

kinds! {
    /// `cli`
    Cli "cli" Traps,
    /// `sti`
    Sti "sti" Traps,
    /// `pushf`, `pushfd`: shows the host's IF and IOPL
    Pushf "pushf" SilentlyWrong,
    /// `popf`, `popfd`: IF and IOPL are ignored at privilege level 3
    Popf "popf" SilentlyWrong,
    /// `push sreg`: shows the hardware selector
    PushSreg "push sreg" SilentlyWrong,
    /// `pop sreg`: loads from the host's descriptor tables
    PopSreg "pop sreg" SilentlyWrong,
    /// `mov r/m, sreg`
    MovFromSreg "mov from sreg" SilentlyWrong,
    /// `mov sreg, r/m`
    MovToSreg "mov to sreg" SilentlyWrong,
    /// `lds`, `les`, `lfs`, `lgs`, `lss`
    LoadFarPointer "load far pointer" SilentlyWrong,
    /// `mov r32, cr`
    MovFromCr "mov from cr" Traps,
    /// `mov cr, r32`
    MovToCr "mov to cr" Traps,
    /// `mov r32, dr`
    MovFromDr "mov from dr" Traps,
    /// `mov dr, r32`
    MovToDr "mov to dr" Traps,
    /// `smsw`: the host's CR0, or a dummy under UMIP
    Smsw "smsw" SilentlyWrong,
    /// `lmsw`
    Lmsw "lmsw" Traps,
    /// `clts`
    Clts "clts" Traps,
    /// `in`
    In "in" Traps,
    /// `out`
    Out "out" Traps,
    /// `insb`, `insw`, `insd`
    StringIn "ins" Traps,
    /// `outsb`, `outsw`, `outsd`
    StringOut "outs" Traps,
    /// `int n`
    Int "int n" OperandDependent,
    /// `iret`, `iretd`
    Iret "iret" SilentlyWrong,
    /// `call ptr16:32`, `call m16:32`
    FarCall "far call" SilentlyWrong,
    /// `jmp ptr16:32`, `jmp m16:32`
    FarJump "far jmp" SilentlyWrong,
    /// `retf`
    FarReturn "retf" SilentlyWrong,
    /// `sysenter`: enters the host kernel
    Sysenter "sysenter" SilentlyWrong,
    /// `sysexit`
    Sysexit "sysexit" Traps,
    /// `syscall`: enters the host kernel on AMD processors
    Syscall "syscall" SilentlyWrong,
    /// `sysret`
    Sysret "sysret" Traps,
    /// `hlt`
    Hlt "hlt" Traps,
    /// `cpuid`: faults only where the host has CPUID faulting switched on
    Cpuid "cpuid" HostDependent,
    /// `sgdt`
    Sgdt "sgdt" SilentlyWrong,
    /// `sidt`
    Sidt "sidt" SilentlyWrong,
    /// `sldt`
    Sldt "sldt" SilentlyWrong,
    /// `str`
    Str "str" SilentlyWrong,
    /// `lgdt`
    Lgdt "lgdt" Traps,
    /// `lidt`
    Lidt "lidt" Traps,
    /// `lldt`
    Lldt "lldt" Traps,
    /// `ltr`
    Ltr "ltr" Traps,
    /// `lar`
    Lar "lar" SilentlyWrong,
    /// `lsl`
    Lsl "lsl" SilentlyWrong,
    /// `verr`
    Verr "verr" SilentlyWrong,
    /// `verw`, also where Linux uses it to clear processor buffers (MDS)
    Verw "verw" SilentlyWrong,
    /// `invlpg`
    Invlpg "invlpg" Traps,
    /// `invpcid`
    Invpcid "invpcid" Traps,
    /// `invd`
    Invd "invd" Traps,
    /// `wbinvd`, `wbnoinvd`
    Wbinvd "wbinvd" Traps,
    /// `rdmsr`
    Rdmsr "rdmsr" Traps,
    /// `wrmsr`, `wrmsrns`
    Wrmsr "wrmsr" Traps,
    /// `rdpmc`: native where the host sets CR4.PCE
    Rdpmc "rdpmc" HostDependent,
    /// `rdtscp`, `rdpid`: the host's TSC_AUX
    Rdtscp "rdtscp" SilentlyWrong,
    /// `monitor`: #UD outside ring 0
    Monitor "monitor" Traps,
    /// `mwait`: #UD outside ring 0
    Mwait "mwait" Traps,
    /// `stac`, `clac`: #UD outside ring 0
    StacClac "stac/clac" Traps,
    /// `xsetbv`
    Xsetbv "xsetbv" Traps,
    /// `xsaves`, `xrstors`
    Xsaves "xsaves/xrstors" Traps,
    /// VMX and SVM instructions that need ring 0
    Hypervisor "vmx/svm" Traps,
    /// `vmcall`, `vmmcall`, `vmgexit`: reach the hypervisor below the host, if there is one
    Hypercall "hypercall" HostDependent,
    /// Runs on the host at any level although CPUID hides it from the guest, which shall see #UD
    HiddenFeature "hidden feature" HostDependent,
    /// A memory operand read through CS: CS.base points at the code view, where the patches are
    CsData "cs: data" SilentlyWrong,
    /// Privileged, and neither Linux nor a current processor has a use for it (test registers, SMM, Geode, SGX, ...)
    OtherPrivileged "other privileged" Traps,
}

/// Classifies by the opcode alone. [`classify_instruction`] adds what depends on the operands.
#[must_use]
#[allow(clippy::too_many_lines)] // a table
pub const fn classify(code: Code) -> Class {
    use Code::*;
    use SensitiveKind as K;
    let kind = match code {
        Int3 | Int1 | Into | Bound_r16_m1616 | Bound_r32_m3232 | Ud0 | Ud0_r16_rm16 | Ud0_r32_rm32
        | Ud1_r16_rm16 | Ud1_r32_rm32 | Ud2 | INVALID => return Class::Trapping,

        Cli => K::Cli,
        Sti => K::Sti,
        Pushfw | Pushfd => K::Pushf,
        Popfw | Popfd => K::Popf,
        Pushw_ES | Pushd_ES | Pushw_CS | Pushd_CS | Pushw_SS | Pushd_SS | Pushw_DS | Pushd_DS | Pushw_FS
        | Pushd_FS | Pushw_GS | Pushd_GS => K::PushSreg,
        Popw_ES | Popd_ES | Popw_CS | Popw_SS | Popd_SS | Popw_DS | Popd_DS | Popw_FS | Popd_FS | Popw_GS
        | Popd_GS => K::PopSreg,
        Mov_rm16_Sreg | Mov_r32m16_Sreg => K::MovFromSreg,
        Mov_Sreg_rm16 | Mov_Sreg_r32m16 => K::MovToSreg,
        Les_r16_m1616 | Les_r32_m1632 | Lds_r16_m1616 | Lds_r32_m1632 | Lss_r16_m1616 | Lss_r32_m1632
        | Lfs_r16_m1616 | Lfs_r32_m1632 | Lgs_r16_m1616 | Lgs_r32_m1632 => K::LoadFarPointer,

        Mov_r32_cr => K::MovFromCr,
        Mov_cr_r32 => K::MovToCr,
        Mov_r32_dr => K::MovFromDr,
        Mov_dr_r32 => K::MovToDr,
        Smsw_rm16 | Smsw_r32m16 => K::Smsw,
        Lmsw_rm16 | Lmsw_r32m16 => K::Lmsw,
        Clts => K::Clts,

        In_AL_imm8 | In_AX_imm8 | In_EAX_imm8 | In_AL_DX | In_AX_DX | In_EAX_DX => K::In,
        Out_imm8_AL | Out_imm8_AX | Out_imm8_EAX | Out_DX_AL | Out_DX_AX | Out_DX_EAX => K::Out,
        Insb_m8_DX | Insw_m16_DX | Insd_m32_DX => K::StringIn,
        Outsb_DX_m8 | Outsw_DX_m16 | Outsd_DX_m32 => K::StringOut,

        Int_imm8 => K::Int,
        Iretw | Iretd => K::Iret,
        Call_ptr1616 | Call_ptr1632 | Call_m1616 | Call_m1632 => K::FarCall,
        Jmp_ptr1616 | Jmp_ptr1632 | Jmp_m1616 | Jmp_m1632 => K::FarJump,
        Retfw | Retfd | Retfw_imm16 | Retfd_imm16 => K::FarReturn,
        Sysenter => K::Sysenter,
        Sysexitd => K::Sysexit,
        Syscall => K::Syscall,
        Sysretd => K::Sysret,
        Hlt => K::Hlt,
        Cpuid => K::Cpuid,

        Sgdt_m1632_16 | Sgdt_m1632 => K::Sgdt,
        Sidt_m1632_16 | Sidt_m1632 => K::Sidt,
        Sldt_rm16 | Sldt_r32m16 => K::Sldt,
        Str_rm16 | Str_r32m16 => K::Str,
        Lgdt_m1632_16 | Lgdt_m1632 => K::Lgdt,
        Lidt_m1632_16 | Lidt_m1632 => K::Lidt,
        Lldt_rm16 | Lldt_r32m16 => K::Lldt,
        Ltr_rm16 | Ltr_r32m16 => K::Ltr,
        Lar_r16_rm16 | Lar_r32_r32m16 => K::Lar,
        Lsl_r16_rm16 | Lsl_r32_r32m16 => K::Lsl,
        Verr_rm16 | Verr_r32m16 => K::Verr,
        Verw_rm16 | Verw_r32m16 => K::Verw,

        Invlpg_m => K::Invlpg,
        Invpcid_r32_m128 => K::Invpcid,
        Invd => K::Invd,
        Wbinvd | Wbnoinvd => K::Wbinvd,
        Rdmsr => K::Rdmsr,
        Wrmsr | Wrmsrns => K::Wrmsr,
        Rdpmc => K::Rdpmc,
        Rdtscp | Rdpid_r32 => K::Rdtscp,
        Monitorw | Monitord => K::Monitor,
        Mwait => K::Mwait,
        Stac | Clac => K::StacClac,
        Xsetbv => K::Xsetbv,
        Xsaves_mem | Xrstors_mem => K::Xsaves,

        Vmlaunch | Vmresume | Vmxoff | Vmread_rm32_r32 | Vmwrite_r32_rm32 | Vmptrld_m64 | Vmclear_m64
        | Vmxon_m64 | Vmptrst_m64 | Invept_r32_m128 | Invvpid_r32_m128 | Vmrunw | Vmrund | Vmloadw
        | Vmloadd | Vmsavew | Vmsaved | Stgi | Clgi | Skinit | Invlpgaw | Invlpgad | Invlpgbw | Invlpgbd
        | Tlbsync | Pvalidatew | Pvalidated | Tdcall => K::Hypervisor,
        Vmcall | Vmmcall | Vmgexit | Vmgexit_F2 => K::Hypercall,

        Xgetbv | Rdpkru | Wrpkru | Umonitor_r16 | Umonitor_r32 | Umwait_r32 | Tpause_r32 | Monitorxw
        | Monitorxd | Mwaitx | Mcommit | Rdpru | Enclu | Vmfunc | Enqcmd_r16_m512 | Enqcmd_r32_m512
        | Pcommit | Movdiri_m32_r32 | Movdir64b_r16_m512 | Movdir64b_r32_m512 | Serialize => K::HiddenFeature,

        Mov_r32_tr | Mov_tr_r32 | Rsm | Getsecd | Encls | Enclv | Pconfig | Setssbsy | Clrssbsy_m64
        | Wrussd_m32_r32 | Enqcmds_r16_m512 | Enqcmds_r32_m512 | Loadiwkey_xmm_xmm | Hreset_imm8
        | Storeall | Loadall286 | Loadall386 | Cl1invmb | Rdshr_rm32 | Wrshr_rm32 | Smint | Smint_0F7E
        | Dmint | Rdm | Svdc_m80_Sreg | Rsdc_Sreg_m80 | Svldt_m80 | Rsldt_m80 | Svts_m80 | Rsts_m80
        | Bb0_reset | Bb1_reset | Cpu_write | Cpu_read | Rdudbg | Wrudbg | Jmpe_rm16 | Jmpe_rm32
        | Jmpe_disp16 | Jmpe_disp32 | Altinst => K::OtherPrivileged,

        _ => return Class::Innocuous,
    };
    Class::Sensitive(kind)
}

/// Classifies a decoded instruction: [`classify`], and what only its operands tell.
#[must_use]
pub fn classify_instruction(instruction: &Instruction) -> Class {
    match classify(instruction.code()) {
        Class::Innocuous if reads_through_cs(instruction) => Class::Sensitive(SensitiveKind::CsData),
        // Of those that raise an exception the one that first reads what its memory operand says.
        Class::Trapping if instruction.mnemonic() == Mnemonic::Bound && reads_through_cs(instruction) => {
            Class::Sensitive(SensitiveKind::CsData)
        }
        class => class,
    }
}

/// What the host does with this very instruction when nobody patched it; `None` when it is not sensitive.
#[must_use]
pub fn host_behaviour(instruction: &Instruction) -> Option<HostBehaviour> {
    let Class::Sensitive(kind) = classify_instruction(instruction) else { return None };
    Some(match (kind, kind.host_behaviour()) {
        // Linux for x86-64 has three gates user mode may call: #BP, #OF and the 32-bit system call. The first two
        // come back to us as the traps they are; the third is a system call of the host.
        (SensitiveKind::Int, _) if instruction.immediate8() == 0x80 => HostBehaviour::SilentlyWrong,
        (SensitiveKind::Int, _) => HostBehaviour::Traps,
        (_, behaviour) => behaviour,
    })
}

/// The segment register a sensitive instruction loads or stores, if it does: the operand of `push`, `pop` and `mov`,
/// the implied one of `lds` and its like.
#[must_use]
pub fn segment_operand(instruction: &Instruction) -> Option<Register> {
    use Code::*;
    match instruction.code() {
        Les_r16_m1616 | Les_r32_m1632 => Some(Register::ES),
        Lss_r16_m1616 | Lss_r32_m1632 => Some(Register::SS),
        Lds_r16_m1616 | Lds_r32_m1632 => Some(Register::DS),
        Lfs_r16_m1616 | Lfs_r32_m1632 => Some(Register::FS),
        Lgs_r16_m1616 | Lgs_r32_m1632 => Some(Register::GS),
        _ => (0..instruction.op_count())
            .filter(|&op| instruction.op_kind(op) == OpKind::Register)
            .map(|op| instruction.op_register(op))
            .find(|register| register.is_segment_register()),
    }
}

/// Does it really access memory through CS? A CS prefix is also a branch hint, and fills multi-byte `nop`s.
fn reads_through_cs(instruction: &Instruction) -> bool {
    if instruction.segment_prefix() != Register::CS {
        return false;
    }
    let addresses_only =
        matches!(instruction.code(), Code::Lea_r16_m | Code::Lea_r32_m | Code::Nop_rm16 | Code::Nop_rm32)
            || matches!(
                instruction.mnemonic(),
                Mnemonic::Reservednop
                    | Mnemonic::Prefetch
                    | Mnemonic::Prefetchw
                    | Mnemonic::Prefetchnta
                    | Mnemonic::Prefetcht0
                    | Mnemonic::Prefetcht1
                    | Mnemonic::Prefetcht2
            );
    // The ES:(E)DI side of a string instruction takes no prefix: it does not count.
    !addresses_only
        && (0..instruction.op_count()).any(|op| {
            matches!(
                instruction.op_kind(op),
                OpKind::Memory
                    | OpKind::MemorySegSI
                    | OpKind::MemorySegESI
                    | OpKind::MemorySegDI
                    | OpKind::MemorySegEDI
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::{format, string::String, vec::Vec};
    use iced_x86::{Decoder, DecoderOptions, FlowControl, OpCodeOperandKind as Op, RflagsBits};

    /// Innocuous by decision although an attribute below says "look at me". Each line is a reviewed decision.
    const REVIEWED: &[Code] = &[
        Code::Rdtsc, // the time stamp runs natively (facts.md, host fact 2)
        Code::Pause, // a hint
        Code::Rdrand_r16,
        Code::Rdrand_r32,
        Code::Rdseed_r16,
        Code::Rdseed_r32,
        Code::Serialize,
        Code::Call_rel16, // near control flow, which iced lists with the far kinds
        Code::Call_rel32_32,
    ];

    /// Everything about a code that says it may touch privileged state, by iced's own tables.
    fn suspicions(code: Code) -> Vec<String> {
        let op = code.op_code();
        let mut instruction = Instruction::default();
        instruction.set_code(code);
        let mut found = Vec::new();
        let mut note = |is: bool, what: &str| {
            if is {
                found.push(String::from(what));
            }
        };
        note(op.is_privileged(), "privileged");
        note(!op.cpl3(), "not at CPL 3");
        note(op.may_require_cpl0(), "may require CPL 0");
        note(op.is_input_output(), "I/O");
        note(op.intel_vm_exit() || op.intel_may_vm_exit(), "VM exit on Intel");
        note(op.is_serializing_intel(), "serialising");
        note(!op.use_outside_smm(), "SMM only");
        for kind in op.op_kinds() {
            note(
                matches!(
                    kind,
                    Op::seg_reg | Op::cr_reg | Op::dr_reg | Op::tr_reg | Op::farbr2_2 | Op::farbr4_2
                ),
                "segment, control, debug or far operand",
            );
        }
        let flags = instruction.rflags_modified() | instruction.rflags_read();
        note(flags & (RflagsBits::IF | RflagsBits::AC) != 0, "IF or AC");
        note(
            matches!(code.flow_control(), FlowControl::Interrupt | FlowControl::Exception),
            "raises an exception",
        );
        note(
            matches!(code.flow_control(), FlowControl::Call) && !instruction.is_call_near(),
            "leaves by other means than a near call",
        );
        found
    }

    #[test]
    fn every_code_of_16_and_32_bit_mode_is_classified_and_nothing_privileged_is_innocuous() {
        let mut wrong = Vec::new();
        let mut checked = 0;
        for code in Code::values() {
            let op = code.op_code();
            if !(op.mode16() || op.mode32()) || !op.is_instruction() {
                continue;
            }
            checked += 1;
            let suspicions = suspicions(code);
            if classify(code) == Class::Innocuous && !suspicions.is_empty() && !REVIEWED.contains(&code) {
                wrong.push(format!("{code:?}: {suspicions:?}"));
            }
        }
        assert!(checked > 1_400, "iced lists {checked} codes");
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    #[test]
    fn what_iced_calls_near_or_ordinary_is_sensitive_only_on_the_reviewed_list() {
        // The other direction: nothing is made slow by a slip in the table.
        let no_suspicion: Vec<_> = Code::values()
            .filter(|code| matches!(classify(*code), Class::Sensitive(_)) && suspicions(*code).is_empty())
            .collect();
        let expected = |code: &Code| {
            let text = format!("{code:?}");
            // Selectors read or loaded without an operand that says so; features CPUID hides; Itanium and VIA.
            [
                "Pushw_", "Pushd_", "Popw_", "Popd_", "Les", "Lds", "Lss", "Lfs", "Lgs", "Retf", "Call_m1",
                "Jmp_m1", "Verr", "Verw", "Lar", "Lsl", "Xgetbv", "Rdpkru", "Wrpkru", "Umonitor", "Monitorx",
                "Mwaitx", "Mcommit", "Rdpid", "Enclu", "Jmpe", "Altinst", "Pushfw", "Pushfd", "Popfw",
                "Popfd", "Movdir", "Serial",
            ]
            .iter()
            .any(|prefix| text.starts_with(prefix))
        };
        let surprises: Vec<_> = no_suspicion.iter().filter(|code| !expected(code)).collect();
        assert!(surprises.is_empty(), "{surprises:?}");
    }

    fn decode(bytes: &[u8]) -> Instruction {
        Decoder::new(32, bytes, DecoderOptions::NONE).decode()
    }

    #[test]
    fn kinds_are_numbered_as_listed() {
        for (index, kind) in SensitiveKind::ALL.iter().enumerate() {
            assert_eq!(*kind as usize, index);
        }
    }

    #[test]
    fn only_the_system_call_vector_goes_wrong_in_silence() {
        assert_eq!(host_behaviour(&decode(&[0xcd, 0x80])), Some(HostBehaviour::SilentlyWrong));
        assert_eq!(host_behaviour(&decode(&[0xcd, 0x2e])), Some(HostBehaviour::Traps));
        assert_eq!(host_behaviour(&decode(&[0x9c])), Some(HostBehaviour::SilentlyWrong));
        assert_eq!(host_behaviour(&decode(&[0x90])), None);
    }

    #[test]
    fn int3_stays_as_it_is() {
        assert_eq!(classify_instruction(&decode(&[0xcc])), Class::Trapping);
    }

    #[test]
    fn a_cs_prefix_matters_only_where_memory_is_read() {
        let class = |bytes: &[u8]| classify_instruction(&decode(bytes));
        let cs_data = Class::Sensitive(SensitiveKind::CsData);
        assert_eq!(class(&[0x2e, 0xa1, 0, 0x10, 0, 0]), cs_data); // mov eax, cs:[1000h]
        assert_eq!(class(&[0x2e, 0xa5]), cs_data); // movsd es:[edi], cs:[esi]
        assert_eq!(class(&[0x2e, 0xff, 0x25, 0, 0x10, 0, 0]), cs_data); // jmp cs:[1000h]
        assert_eq!(class(&[0x2e, 0x62, 0x59, 0x79]), cs_data); // bound ebx, cs:[ecx+79h]
        assert_eq!(class(&[0x62, 0x59, 0x79]), Class::Trapping);
        assert_eq!(class(&[0x2e, 0x0f, 0xb9, 0x59, 0x79]), Class::Trapping); // ud1 reads nothing
        assert_eq!(class(&[0x2e, 0xab]), Class::Innocuous); // stosd
        assert_eq!(class(&[0x2e, 0x74, 0]), Class::Innocuous); // je, "not taken"
        assert_eq!(class(&[0x2e, 0x0f, 0x1f, 0x44, 0, 0]), Class::Innocuous); // nop cs:[eax+eax]
        assert_eq!(class(&[0x2e, 0x8d, 0x44, 0x24, 4]), Class::Innocuous); // lea
        assert_eq!(class(&[0x2e, 0x0f, 0x01, 0x10]), Class::Sensitive(SensitiveKind::Lgdt));
    }

    #[test]
    fn the_segment_of_every_form_is_found() {
        assert_eq!(segment_operand(&decode(&[0x0e])), Some(Register::CS)); // push cs
        assert_eq!(segment_operand(&decode(&[0x8e, 0xd0])), Some(Register::SS)); // mov ss, eax
        assert_eq!(segment_operand(&decode(&[0x8c, 0xe8])), Some(Register::GS)); // mov eax, gs
        assert_eq!(segment_operand(&decode(&[0x0f, 0xb2, 0x20])), Some(Register::SS)); // lss esp, [eax]
        assert_eq!(segment_operand(&decode(&[0x9c])), None);
    }
}
