//! Runs single x87, MMX and SSE instructions of a guest natively, with the guest's FPU state and a bounce buffer.
//!
//! Guest bytes are never executed: an instruction is decoded by the caller, checked against [`allowed`], re-encoded for
//! 64-bit mode with its memory operand replaced by the bounce buffer, and only that encoding runs.
//!
//! What runs cannot fault: memory is the buffer, SSE exceptions are masked, an x87 exception that is already pending
//! makes [`NativeFpu::execute`] refuse, and features the host lacks are refused too.

use iced_x86::{Code, CpuidFeature, Encoder, FlowControl, Instruction, Mnemonic, OpKind, Register};
use std::arch::naked_asm;
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::mem::offset_of;
use std::os::fd::FromRawFd;

/// Bytes of the bounce buffer: the largest memory operand that runs natively is 16 bytes.
pub const BOUNCE: usize = 64;

/// General registers, arithmetic flags and the bounce buffer of one native execution.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NativeRegs {
    /// EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI.
    pub gpr: [u32; 8],
    /// CF, PF, AF, ZF, SF and OF; other bits are ignored.
    pub flags: u32,
    /// What the memory operand reads and writes.
    pub memory: [u8; BOUNCE],
}

/// Why an instruction did not run. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub enum NativeError {
    /// Not on the list of instructions that may run.
    #[error("{0:?} may not run natively")]
    NotAllowed(Code),
    /// The host CPU has no such instruction.
    #[error("this CPU has no {0:?}")]
    NotOnThisCpu(Code),
    /// An unmasked x87 exception is pending; the caller has to deliver it first.
    #[error("an x87 exception is pending")]
    Pending,
    /// The encoder refused.
    #[error("cannot encode {0:?}")]
    Encode(Code),
}

/// What the assembly below works on.
#[repr(C, align(64))]
struct Context {
    fx: [u8; 512],
    memory: [u8; BOUNCE],
    gpr: [u32; 8],
    flags: u64,
    memory_at: u64,
    code_at: u64,
}

const CODE_LEN: usize = 64 * 1024;
const SLOT: usize = 32;
const FLAGS: u32 = 0x8d5;

/// Code memory mapped twice: once writable, once executable.
struct CodeMemory {
    write: *mut u8,
    exec: *const u8,
}

impl CodeMemory {
    fn new() -> io::Result<CodeMemory> {
        // SAFETY: the name is a NUL-terminated literal; the call touches no memory of ours.
        let fd = unsafe { libc::memfd_create(c"subring-fpu".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was just opened and belongs to nobody else.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(CODE_LEN as u64)?;
        let map = |prot| {
            // SAFETY: a fresh mapping at an address the kernel chooses replaces nothing.
            let p = unsafe { libc::mmap(std::ptr::null_mut(), CODE_LEN, prot, libc::MAP_SHARED, fd, 0) };
            if p == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(p.cast::<u8>()) }
        };
        let write = map(libc::PROT_READ | libc::PROT_WRITE)?;
        match map(libc::PROT_READ | libc::PROT_EXEC) {
            Ok(exec) => Ok(CodeMemory { write, exec }),
            Err(e) => {
                // SAFETY: `write` is our own mapping of exactly this length, and nothing uses it any more.
                unsafe { libc::munmap(write.cast(), CODE_LEN) };
                Err(e)
            }
        }
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        // SAFETY: both are our own mappings of exactly this length; `self` is going away with all users.
        unsafe {
            libc::munmap(self.write.cast(), CODE_LEN);
            libc::munmap(self.exec.cast_mut().cast(), CODE_LEN);
        }
    }
}

/// Executes whitelisted instructions on an FXSAVE64 image.
pub struct NativeFpu {
    code: CodeMemory,
    context: Box<Context>,
    encoder: Encoder,
    /// Slot of each encoding already written.
    slots: HashMap<[u8; 16], usize>,
    mxcsr_mask: u32,
}

impl NativeFpu {
    /// Maps the code memory.
    ///
    /// # Errors
    /// When the host refuses a memory file or an executable mapping of it.
    pub fn new() -> io::Result<NativeFpu> {
        let context = Box::new(Context {
            fx: [0; 512],
            memory: [0; BOUNCE],
            gpr: [0; 8],
            flags: 0,
            memory_at: 0,
            code_at: 0,
        });
        let mut image = Box::new(Context {
            fx: [0; 512],
            memory: [0; BOUNCE],
            gpr: [0; 8],
            flags: 0,
            memory_at: 0,
            code_at: 0,
        });
        // SAFETY: `fx` is 512 bytes, aligned to 64 by its struct.
        unsafe { std::arch::x86_64::_fxsave64(image.fx.as_mut_ptr()) };
        let mask = word(&image.fx, 28);
        Ok(NativeFpu {
            code: CodeMemory::new()?,
            context,
            encoder: Encoder::new(64),
            slots: HashMap::new(),
            // Zero means the value of the first CPUs (SDM Vol. 1, 11.6.6).
            mxcsr_mask: if mask == 0 { 0xffbf } else { mask },
        })
    }

    /// MXCSR bits that exist on the host.
    #[must_use]
    pub fn mxcsr_mask(&self) -> u32 {
        self.mxcsr_mask
    }

    /// Runs one instruction. `fx` is the guest's state as FXSAVE64 keeps it; SSE exceptions are masked for the run, so
    /// the MXCSR that comes back has all mask bits set and the sticky bits of the run added. The instruction pointer
    /// fields of `fx` come back as the host CPU left them.
    ///
    /// # Errors
    /// See [`NativeError`].
    pub fn execute(
        &mut self,
        instruction: &Instruction,
        fx: &mut [u8; 512],
        regs: &mut NativeRegs,
    ) -> Result<(), NativeError> {
        let code = instruction.code();
        if !allowed(instruction) {
            return Err(NativeError::NotAllowed(code));
        }
        if !host_has(code) {
            return Err(NativeError::NotOnThisCpu(code));
        }
        if u32::from(fx[2]) & !u32::from(fx[0]) & 0x3f != 0 && touches_x87(instruction) {
            return Err(NativeError::Pending);
        }
        let code_at = self.slot(instruction)?;
        let c = &mut *self.context;
        c.fx = *fx;
        let mxcsr = word(fx, 24) & self.mxcsr_mask | 0x1f80;
        c.fx[24..28].copy_from_slice(&mxcsr.to_le_bytes());
        c.memory = regs.memory;
        c.gpr = regs.gpr;
        c.flags = u64::from(regs.flags & FLAGS | 2);
        c.memory_at = c.memory.as_ptr() as u64;
        c.code_at = code_at;
        // SAFETY: `c` is an exclusive, live, aligned Context with a loadable FXSAVE image (reserved MXCSR bits cleared)
        // and `code_at` points at a whitelisted instruction followed by `ret`, whose memory operand is `c.memory`.
        unsafe { run(c) };
        *fx = c.fx;
        regs.memory = c.memory;
        regs.gpr = c.gpr;
        regs.flags = c.flags as u32 & FLAGS;
        Ok(())
    }

    /// The executable address of an instruction's encoding.
    fn slot(&mut self, instruction: &Instruction) -> Result<u64, NativeError> {
        let native = retarget(instruction);
        let refused = |_| NativeError::Encode(instruction.code());
        let len = self.encoder.encode(&native, 0).map_err(refused)?;
        let bytes = self.encoder.take_buffer();
        let mut key = [0u8; 16];
        key.get_mut(..len)
            .zip(bytes.get(..len))
            .map(|(k, b)| k.copy_from_slice(b))
            .ok_or(NativeError::Encode(instruction.code()))?;
        self.encoder.set_buffer({
            let mut b = bytes;
            b.clear();
            b
        });
        let slot = match self.slots.get(&key) {
            Some(slot) => *slot,
            None => {
                if self.slots.len() == CODE_LEN / SLOT {
                    self.slots.clear();
                }
                let slot = self.slots.len();
                let mut text = [0xf4u8; SLOT];
                text[..len].copy_from_slice(&key[..len]);
                text[len] = 0xc3;
                // SAFETY: `slot` < CODE_LEN / SLOT, so the slot lies inside the writable mapping, which only we use.
                unsafe {
                    std::ptr::copy_nonoverlapping(text.as_ptr(), self.code.write.add(slot * SLOT), SLOT)
                };
                // Code written through one linear address and run through another needs a serializing instruction
                // in between (SDM Vol. 3A, 8.1.3).
                std::hint::black_box(std::arch::x86_64::__cpuid(0));
                self.slots.insert(key, slot);
                slot
            }
        };
        Ok(self.code.exec as u64 + (slot * SLOT) as u64)
    }
}

fn word(fx: &[u8; 512], at: usize) -> u32 {
    u32::from_le_bytes([fx[at], fx[at + 1], fx[at + 2], fx[at + 3]])
}

/// The same instruction with its memory operand at R8 and ESP, which is ours, replaced by R9D.
fn retarget(instruction: &Instruction) -> Instruction {
    let mut i = *instruction;
    i.set_segment_prefix(Register::None);
    for n in 0..i.op_count() {
        match i.op_kind(n) {
            OpKind::Memory => {
                i.set_memory_base(Register::R8);
                i.set_memory_index(Register::None);
                i.set_memory_index_scale(1);
                i.set_memory_displacement64(0);
                i.set_memory_displ_size(0);
            }
            OpKind::Register if i.op_register(n) == Register::ESP => i.set_op_register(n, Register::R9D),
            _ => {}
        }
    }
    i
}

/// Instructions that read or write x87 or MMX registers and so meet a pending x87 exception.
fn touches_x87(i: &Instruction) -> bool {
    i.mnemonic() == Mnemonic::Fisttp
        || i.cpuid_features().iter().any(|f| {
            matches!(f, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387 | CpuidFeature::MMX)
        })
        || (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_mm())
}

/// Whether an instruction is on the list of those that may run natively: x87, MMX, SSE to SSE4.2, SSE4A, AES,
/// PCLMULQDQ, SHA, GFNI computations with registers, immediates and at most one explicit memory operand. Everything
/// that saves, restores or controls FPU state, or addresses memory implicitly, is not.
#[must_use]
pub fn allowed(i: &Instruction) -> bool {
    use CpuidFeature as F;
    let computes = |f: &F| {
        matches!(
            f,
            F::FPU
                | F::FPU287
                | F::FPU387
                | F::CMOV
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
                | F::RDRAND
                | F::RDSEED
        )
    };
    let plain_operand = |n| match i.op_kind(n) {
        OpKind::Register => {
            let r = i.op_register(n);
            let number = r.number();
            r.is_st()
                || r.is_mm()
                || (r.is_xmm() && number < 8)
                || ((r.is_gpr32() || r.is_gpr16()) && number < 8)
        }
        OpKind::Immediate8 | OpKind::Immediate8_2nd => true,
        OpKind::Memory => i.memory_size().size() <= 16,
        _ => false,
    };
    let uses_fpu = || {
        matches!(
            i.mnemonic(),
            Mnemonic::Rdrand
                | Mnemonic::Rdseed
                | Mnemonic::Emms
                | Mnemonic::Fisttp
                | Mnemonic::Cvtss2si
                | Mnemonic::Cvttss2si
                | Mnemonic::Cvtsd2si
                | Mnemonic::Cvttsd2si
        ) || (0..i.op_count()).any(|n| {
            i.op_kind(n) == OpKind::Register
                && (i.op_register(n).is_mm() || i.op_register(n).is_xmm() || i.op_register(n).is_st())
        }) || i.cpuid_features().iter().any(|f| matches!(f, F::FPU | F::FPU287 | F::FPU387))
    };
    !i.cpuid_features().is_empty()
        && i.cpuid_features().iter().all(computes)
        && i.flow_control() == FlowControl::Next
        && !i.is_privileged()
        && !i.is_stack_instruction()
        && !i.is_save_restore_instruction()
        && !matches!(
            i.mnemonic(),
            Mnemonic::Wait
                | Mnemonic::Fninit
                | Mnemonic::Fnclex
                | Mnemonic::Fneni
                | Mnemonic::Fndisi
                | Mnemonic::Fnsetpm
                | Mnemonic::Fldcw
                | Mnemonic::Fnstcw
                | Mnemonic::Fnstsw
                | Mnemonic::Fldenv
                | Mnemonic::Fnstenv
                | Mnemonic::Fnsave
                | Mnemonic::Frstor
                | Mnemonic::Finit
                | Mnemonic::Fclex
                | Mnemonic::Feni
                | Mnemonic::Fdisi
                | Mnemonic::Fsetpm
                | Mnemonic::Fstcw
                | Mnemonic::Fstsw
                | Mnemonic::Fstenv
                | Mnemonic::Fsave
                | Mnemonic::Maskmovq
                | Mnemonic::Maskmovdqu
        )
        && (0..i.op_count()).all(plain_operand)
        && uses_fpu()
}

/// Whether the host CPU has what an instruction needs.
#[must_use]
pub fn host_has(code: Code) -> bool {
    use CpuidFeature as F;
    code.cpuid_features().iter().all(|f| match f {
        F::SSE3 => is_x86_feature_detected!("sse3"),
        F::SSSE3 => is_x86_feature_detected!("ssse3"),
        F::SSE4_1 => is_x86_feature_detected!("sse4.1"),
        F::SSE4_2 => is_x86_feature_detected!("sse4.2"),
        F::SSE4A => is_x86_feature_detected!("sse4a"),
        F::AES => is_x86_feature_detected!("aes"),
        F::PCLMULQDQ => is_x86_feature_detected!("pclmulqdq"),
        F::SHA => is_x86_feature_detected!("sha"),
        F::GFNI => is_x86_feature_detected!("gfni"),
        F::RDRAND => is_x86_feature_detected!("rdrand"),
        F::RDSEED => is_x86_feature_detected!("rdseed"),
        // Part of x86-64.
        _ => true,
    })
}

/// Loads the FPU and the registers of a [`Context`], calls the instruction, and stores them back. Keeps the caller's
/// x87 control word and MXCSR; leaves the x87 stack empty, as the System V ABI asks.
///
/// # Safety
/// As at the call in [`NativeFpu::execute`].
#[unsafe(naked)]
unsafe extern "sysv64" fn run(context: *mut Context) {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "sub rsp, 8",
        "mov r15, rdi",
        "stmxcsr [rsp]",
        "fnstcw [rsp + 4]",
        "fxrstor64 [r15]",
        "mov r8, [r15 + {memory_at}]",
        "mov eax, [r15 + {gpr}]",
        "mov ecx, [r15 + {gpr} + 4]",
        "mov edx, [r15 + {gpr} + 8]",
        "mov ebx, [r15 + {gpr} + 12]",
        "mov r9d, [r15 + {gpr} + 16]",
        "mov ebp, [r15 + {gpr} + 20]",
        "mov esi, [r15 + {gpr} + 24]",
        "mov edi, [r15 + {gpr} + 28]",
        "push qword ptr [r15 + {flags}]",
        "popfq",
        "call qword ptr [r15 + {code_at}]",
        "pushfq",
        "pop qword ptr [r15 + {flags}]",
        "mov [r15 + {gpr}], eax",
        "mov [r15 + {gpr} + 4], ecx",
        "mov [r15 + {gpr} + 8], edx",
        "mov [r15 + {gpr} + 12], ebx",
        "mov [r15 + {gpr} + 16], r9d",
        "mov [r15 + {gpr} + 20], ebp",
        "mov [r15 + {gpr} + 24], esi",
        "mov [r15 + {gpr} + 28], edi",
        "fxsave64 [r15]",
        "fninit",
        "fldcw [rsp + 4]",
        "ldmxcsr [rsp]",
        "add rsp, 8",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
        gpr = const offset_of!(Context, gpr),
        flags = const offset_of!(Context, flags),
        memory_at = const offset_of!(Context, memory_at),
        code_at = const offset_of!(Context, code_at),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    fn decode(bytes: &[u8]) -> Instruction {
        Decoder::with_ip(32, bytes, 0, DecoderOptions::NONE).decode()
    }

    fn fresh() -> ([u8; 512], NativeRegs) {
        let mut fx = [0u8; 512];
        fx[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
        fx[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        (fx, NativeRegs { gpr: [0; 8], flags: 0, memory: [0; BOUNCE] })
    }

    #[test]
    fn an_sse_addition_with_a_memory_operand_uses_the_buffer() {
        let (mut fx, mut regs) = fresh();
        fx[160..164].copy_from_slice(&1.5f32.to_le_bytes());
        regs.memory[..4].copy_from_slice(&2.25f32.to_le_bytes());
        // addss xmm0, [ebx+esi*4+0x1234]
        let i = decode(&[0xf3, 0x0f, 0x58, 0x84, 0xb3, 0x34, 0x12, 0, 0]);
        NativeFpu::new().unwrap().execute(&i, &mut fx, &mut regs).unwrap();
        assert_eq!(fx[160..164], 3.75f32.to_le_bytes());
    }

    #[test]
    fn esp_as_an_operand_is_the_guests() {
        let (mut fx, mut regs) = fresh();
        regs.gpr[4] = 0x1234_5678;
        // movd xmm1, esp
        NativeFpu::new().unwrap().execute(&decode(&[0x66, 0x0f, 0x6e, 0xcc]), &mut fx, &mut regs).unwrap();
        assert_eq!(fx[176..192], 0x1234_5678u128.to_le_bytes());
    }

    #[test]
    fn what_is_not_a_computation_is_refused() {
        let (mut fx, mut regs) = fresh();
        let mut native = NativeFpu::new().unwrap();
        let refused: [&[u8]; 8] = [
            &[0x90],             // nop
            &[0xcd, 0x80],       // int 80h
            &[0x0f, 0xae, 0x00], // fxsave
            &[0x0f, 0xae, 0x08], // fxrstor
            &[0xd9, 0x28],       // fldcw
            &[0x0f, 0xf7, 0xc1], // maskmovq
            &[0xff, 0xe0],       // jmp eax
            &[0x0f, 0x43, 0xc1], // cmovae
        ];
        for bytes in refused {
            let r = native.execute(&decode(bytes), &mut fx, &mut regs);
            assert!(matches!(r, Err(NativeError::NotAllowed(_))), "{bytes:02x?}: {r:?}");
        }
    }

    #[test]
    fn a_pending_x87_exception_keeps_x87_instructions_out() {
        let (mut fx, mut regs) = fresh();
        fx[0] = 0x7e; // invalid unmasked
        fx[2] = 0x81;
        let r = NativeFpu::new().unwrap().execute(&decode(&[0xd9, 0xe8]), &mut fx, &mut regs);
        assert!(matches!(r, Err(NativeError::Pending)));
    }
}
