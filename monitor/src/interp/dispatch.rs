//! Which handler each instruction has. What is not named here or in `fpu` is #UD.

use super::alu::Alu;
use super::bits::BitOp;
use super::shift::Shift;
use super::string::Str;
use super::{Exec, Flow, Res};
use crate::cpum::{eflags, seg};
use crate::trap::Trap;
use iced_x86::{Code, Mnemonic as M};

impl Exec<'_> {
    pub(super) fn run(&mut self) -> Res<Flow> {
        match self.i.mnemonic() {
            M::Mov => self.mov(),
            M::Add => self.alu(Alu::Add),
            M::Or => self.alu(Alu::Or),
            M::Adc => self.alu(Alu::Adc),
            M::Sbb => self.alu(Alu::Sbb),
            M::And => self.alu(Alu::And),
            M::Sub => self.alu(Alu::Sub),
            M::Xor => self.alu(Alu::Xor),
            M::Cmp => self.alu(Alu::Cmp),
            M::Test => self.alu(Alu::Test),
            M::Inc => self.inc_dec(false),
            M::Dec => self.inc_dec(true),
            M::Neg => self.neg(),
            M::Not => self.not(),
            M::Adcx => self.add_with_flag(eflags::CF),
            M::Adox => self.add_with_flag(eflags::OF),
            M::Xadd => self.xadd(),
            M::Cmpxchg => self.cmpxchg(),
            M::Cmpxchg8b => self.cmpxchg8b(),
            M::Daa => self.daa_das(false),
            M::Das => self.daa_das(true),
            M::Aaa => self.aaa_aas(false),
            M::Aas => self.aaa_aas(true),
            M::Aam => self.aam(),
            M::Aad => self.aad(),
            M::Rol => self.shift(Shift::Rol),
            M::Ror => self.shift(Shift::Ror),
            M::Rcl => self.shift(Shift::Rcl),
            M::Rcr => self.shift(Shift::Rcr),
            M::Shl | M::Sal => self.shift(Shift::Shl),
            M::Shr => self.shift(Shift::Shr),
            M::Sar => self.shift(Shift::Sar),
            M::Shld => self.double_shift(true),
            M::Shrd => self.double_shift(false),
            M::Mul => self.mul(false),
            M::Imul if self.i.op_count() == 1 => self.mul(true),
            M::Imul => self.imul_truncating(),
            M::Div => self.div(),
            M::Idiv => self.idiv(),
            M::Cbw => self.extend_acc(1, false),
            M::Cwde => self.extend_acc(2, false),
            M::Cwd => self.extend_acc(2, true),
            M::Cdq => self.extend_acc(4, true),
            M::Crc32 => self.crc32(),
            M::Popcnt => self.popcnt(),
            M::Lzcnt => self.count_zeros(true),
            M::Tzcnt => self.count_zeros(false),
            M::Bsf => self.bit_scan(false),
            M::Bsr => self.bit_scan(true),
            M::Bt => self.bit_test(BitOp::Test),
            M::Bts => self.bit_test(BitOp::Set),
            M::Btr => self.bit_test(BitOp::Reset),
            M::Btc => self.bit_test(BitOp::Complement),
            M::Movzx => self.movzx(),
            M::Movsx => self.movsx(),
            M::Lea => self.lea(),
            M::Xchg => self.xchg(),
            M::Bswap => self.bswap(),
            M::Movbe => self.movbe(),
            M::Movnti => self.movzx(),
            M::Xlatb => self.xlat(),
            M::Lahf => self.lahf(),
            M::Sahf => self.sahf(),
            M::Salc => self.salc(),
            M::Lds => self.load_far_pointer(seg::DS),
            M::Les => self.load_far_pointer(seg::ES),
            M::Lfs => self.load_far_pointer(seg::FS),
            M::Lgs => self.load_far_pointer(seg::GS),
            M::Lss => self.load_far_pointer(seg::SS),
            M::Bound => self.bound(),
            M::Arpl => self.arpl(),
            M::Clc => self.flag_op(eflags::CF, false),
            M::Stc => self.flag_op(eflags::CF, true),
            M::Cld => self.flag_op(eflags::DF, false),
            M::Std => self.flag_op(eflags::DF, true),
            M::Cmc => self.flag_op(eflags::CF, !self.flag(eflags::CF)),
            M::Cmova
            | M::Cmovae
            | M::Cmovb
            | M::Cmovbe
            | M::Cmove
            | M::Cmovg
            | M::Cmovge
            | M::Cmovl
            | M::Cmovle
            | M::Cmovne
            | M::Cmovno
            | M::Cmovnp
            | M::Cmovns
            | M::Cmovo
            | M::Cmovp
            | M::Cmovs => self.cmov(),
            M::Seta
            | M::Setae
            | M::Setb
            | M::Setbe
            | M::Sete
            | M::Setg
            | M::Setge
            | M::Setl
            | M::Setle
            | M::Setne
            | M::Setno
            | M::Setnp
            | M::Setns
            | M::Seto
            | M::Setp
            | M::Sets => self.setcc(),
            M::Ja
            | M::Jae
            | M::Jb
            | M::Jbe
            | M::Je
            | M::Jg
            | M::Jge
            | M::Jl
            | M::Jle
            | M::Jne
            | M::Jno
            | M::Jnp
            | M::Jns
            | M::Jo
            | M::Jp
            | M::Js => self.jcc(),
            M::Push => self.push_op(),
            M::Pop => self.pop_op(),
            M::Pusha => self.push_all(2),
            M::Pushad => self.push_all(4),
            M::Popa => self.pop_all(2),
            M::Popad => self.pop_all(4),
            M::Pushf => self.pushf(2),
            M::Pushfd => self.pushf(4),
            M::Popf => self.popf(2),
            M::Popfd => self.popf(4),
            M::Enter => self.enter(if self.i.code() == Code::Enterw_imm16_imm8 { 2 } else { 4 }),
            M::Leave => self.leave(if self.i.code() == Code::Leavew { 2 } else { 4 }),
            M::Jmp => self.jmp(),
            M::Call => self.call(),
            M::Ret => self.ret(match self.i.code() {
                Code::Retnw | Code::Retnw_imm16 => 2,
                _ => 4,
            }),
            M::Retf => self.ret_far(match self.i.code() {
                Code::Retfw | Code::Retfw_imm16 => 2,
                _ => 4,
            }),
            M::Iret => self.iret(2),
            M::Iretd => self.iret(4),
            M::Loop => self.loop_(None),
            M::Loope => self.loop_(Some(true)),
            M::Loopne => self.loop_(Some(false)),
            M::Jcxz | M::Jecxz => self.jcxz(),
            M::Int => {
                let vector = self.i.immediate8();
                self.int(vector, false)
            }
            M::Int3 => self.int(3, true),
            M::Into => self.into(),
            M::Int1 => self.int1(),
            M::Nop | M::Reservednop | M::Pause | M::Endbr32 | M::Endbr64 => Ok(Flow::Next),
            M::Prefetch
            | M::Prefetchw
            | M::Prefetchwt1
            | M::Prefetchnta
            | M::Prefetcht0
            | M::Prefetcht1
            | M::Prefetcht2
            | M::Prefetchit0
            | M::Prefetchit1
            | M::Cldemote
            | M::Rdsspd => Ok(Flow::Next),
            M::Lfence | M::Mfence | M::Sfence => Ok(Flow::Next),
            M::Clflush | M::Clflushopt | M::Clwb => self.flush_line(),
            _ => self.run_rarer(),
        }
    }

    fn run_rarer(&mut self) -> Res<Flow> {
        match self.i.code() {
            Code::Movsb_m8_m8 => self.string(Str::Movs, 1),
            Code::Movsw_m16_m16 => self.string(Str::Movs, 2),
            Code::Movsd_m32_m32 => self.string(Str::Movs, 4),
            Code::Cmpsb_m8_m8 => self.string(Str::Cmps, 1),
            Code::Cmpsw_m16_m16 => self.string(Str::Cmps, 2),
            Code::Cmpsd_m32_m32 => self.string(Str::Cmps, 4),
            Code::Stosb_m8_AL => self.string(Str::Stos, 1),
            Code::Stosw_m16_AX => self.string(Str::Stos, 2),
            Code::Stosd_m32_EAX => self.string(Str::Stos, 4),
            Code::Lodsb_AL_m8 => self.string(Str::Lods, 1),
            Code::Lodsw_AX_m16 => self.string(Str::Lods, 2),
            Code::Lodsd_EAX_m32 => self.string(Str::Lods, 4),
            Code::Scasb_AL_m8 => self.string(Str::Scas, 1),
            Code::Scasw_AX_m16 => self.string(Str::Scas, 2),
            Code::Scasd_EAX_m32 => self.string(Str::Scas, 4),
            Code::Insb_m8_DX => self.string(Str::Ins, 1),
            Code::Insw_m16_DX => self.string(Str::Ins, 2),
            Code::Insd_m32_DX => self.string(Str::Ins, 4),
            Code::Outsb_DX_m8 => self.string(Str::Outs, 1),
            Code::Outsw_DX_m16 => self.string(Str::Outs, 2),
            Code::Outsd_DX_m32 => self.string(Str::Outs, 4),
            Code::Sgdt_m1632_16 => self.store_table(false, true),
            Code::Sgdt_m1632 => self.store_table(false, false),
            Code::Sidt_m1632_16 => self.store_table(true, true),
            Code::Sidt_m1632 => self.store_table(true, false),
            Code::Lgdt_m1632_16 => self.load_table(false, true),
            Code::Lgdt_m1632 => self.load_table(false, false),
            Code::Lidt_m1632_16 => self.load_table(true, true),
            Code::Lidt_m1632 => self.load_table(true, false),
            _ => self.run_system(),
        }
    }

    fn run_system(&mut self) -> Res<Flow> {
        match self.i.mnemonic() {
            M::Cli => self.set_if(false),
            M::Sti => self.set_if(true),
            M::Hlt => self.hlt(),
            M::In => self.port_in(),
            M::Out => self.port_out(),
            M::Clts => self.clts(),
            M::Invd | M::Wbinvd | M::Wbnoinvd => self.flush_caches(),
            M::Invlpg => self.invlpg(),
            M::Sldt => self.store_selector(false),
            M::Str => self.store_selector(true),
            M::Lldt => self.load_system_segment(false),
            M::Ltr => self.load_system_segment(true),
            M::Lar => self.load_descriptor_part(false),
            M::Lsl => self.load_descriptor_part(true),
            M::Verr => self.verify(false),
            M::Verw => self.verify(true),
            M::Smsw => self.smsw(),
            M::Lmsw => self.lmsw(),
            M::Rdtsc => self.rdtsc(false),
            M::Rdtscp => self.rdtsc(true),
            M::Rdmsr => self.rdmsr(),
            M::Wrmsr => self.wrmsr(),
            M::Cpuid => self.cpuid(),
            // No performance counters: every index is invalid.
            M::Rdpmc => Err(Trap::gp(0)),
            _ => self.fpu(),
        }
    }

    fn flag_op(&mut self, bit: u32, on: bool) -> Res<Flow> {
        self.set_flag(bit, on);
        Ok(Flow::Next)
    }
}
