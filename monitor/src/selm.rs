//! SELM: selectors, descriptors and every control transfer that loads CS.
//!
//! (Skeleton: signatures only.)

use crate::cpum::CpuState;
use crate::env::Env;
use crate::trap::Trap;

/// `mov sreg`, `pop sreg`, `lds` and friends: loads a data or stack segment register (`seg` is an index of
/// [`crate::cpum::seg`], never CS) with every check of SDM Vol. 2 "MOV". Does not touch the interrupt shadow.
pub fn load_segment(
    _cpu: &mut CpuState,
    _env: &mut dyn Env,
    _seg: usize,
    _selector: u16,
) -> Result<(), Trap> {
    unimplemented!()
}

/// Far `jmp`. `operand_size` is 2 or 4. On error nothing has changed.
pub fn far_jump(
    _cpu: &mut CpuState,
    _env: &mut dyn Env,
    _selector: u16,
    _offset: u32,
    _operand_size: u8,
) -> Result<(), Trap> {
    unimplemented!()
}

/// Far `call`; `cpu.eip` is already the return address.
pub fn far_call(
    _cpu: &mut CpuState,
    _env: &mut dyn Env,
    _selector: u16,
    _offset: u32,
    _operand_size: u8,
) -> Result<(), Trap> {
    unimplemented!()
}

/// Far `ret imm16`.
pub fn far_return(
    _cpu: &mut CpuState,
    _env: &mut dyn Env,
    _operand_size: u8,
    _release: u16,
) -> Result<(), Trap> {
    unimplemented!()
}

/// `lldt`.
pub fn load_ldtr(_cpu: &mut CpuState, _env: &mut dyn Env, _selector: u16) -> Result<(), Trap> {
    unimplemented!()
}

/// `ltr`.
pub fn load_tr(_cpu: &mut CpuState, _env: &mut dyn Env, _selector: u16) -> Result<(), Trap> {
    unimplemented!()
}

/// `lar`: the value to store, or None for ZF = 0.
pub fn load_access_rights(_cpu: &CpuState, _env: &mut dyn Env, _selector: u16) -> Result<Option<u32>, Trap> {
    unimplemented!()
}

/// `lsl`.
pub fn load_segment_limit(_cpu: &CpuState, _env: &mut dyn Env, _selector: u16) -> Result<Option<u32>, Trap> {
    unimplemented!()
}

/// `verr` (`write` false) and `verw` (`write` true): the new ZF.
pub fn verify_segment(
    _cpu: &CpuState,
    _env: &mut dyn Env,
    _selector: u16,
    _write: bool,
) -> Result<bool, Trap> {
    unimplemented!()
}

/// `in`/`out` permission: CPL against IOPL, then the TSS I/O bitmap (SDM Vol. 1, 19.5). Err(#GP(0)) when refused.
pub fn check_io(_cpu: &CpuState, _env: &mut dyn Env, _port: u16, _size: u8) -> Result<(), Trap> {
    unimplemented!()
}
