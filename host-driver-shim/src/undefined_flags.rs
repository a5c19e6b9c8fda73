//! What this CPU leaves in flags that the manuals call undefined, so that an interpreter can do the same: a guest that
//! goes from native execution to interpretation and back sees one CPU. Measured, not looked up.

use std::sync::LazyLock;

const CF: u64 = 1 << 0;
const PF: u64 = 1 << 2;
const AF: u64 = 1 << 4;
const ZF: u64 = 1 << 6;
const SF: u64 = 1 << 7;
const OF: u64 = 1 << 11;
const ALL: u64 = CF | PF | AF | ZF | SF | OF;

/// Flags an instruction always sets and always clears, among those it leaves undefined; the others it keeps.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Effect {
    set: u32,
    clear: u32,
}

impl Effect {
    /// From EFLAGS after a run with all flags set and one with all flags clear.
    fn seen(undefined: u64, was_set: u64, was_clear: u64) -> Effect {
        let both = was_set & was_clear;
        let none = !was_set & !was_clear;
        Effect { set: (both & undefined) as u32, clear: (none & undefined) as u32 }
    }

    /// EFLAGS with the effect on them.
    #[must_use]
    pub fn on(self, eflags: u32) -> u32 {
        eflags & !self.clear | self.set
    }
}

/// What OF says after a shift, double shift or rotate by more than 1.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Overflow {
    /// What it would if the last step had been the only one: computed of the result (AMD).
    #[default]
    LastStep,
    /// What it would after the first step: computed of the operand. Rotates through CF by a multiple of their width keep it
    /// (Intel).
    FirstStep,
}

impl Overflow {
    /// From EFLAGS after 7 was rotated to the right by 3: the first step makes the sign another one, the last does not.
    fn seen(eflags: u64) -> Overflow {
        if eflags & OF != 0 { Overflow::FirstStep } else { Overflow::LastStep }
    }
}

/// This CPU's habits.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct UndefinedFlags {
    /// Shifts and double shifts by other counts than 0: AF.
    pub shift: Effect,
    /// The same and rotates, by other counts than 1: OF.
    pub overflow: Overflow,
    /// `rol` and `ror` of a register by a constant other than 1 keep OF.
    pub constant_rotates_keep_overflow: bool,
    /// `mul` and `imul`: SF, ZF, AF, PF.
    pub multiply: Effect,
    /// Of these SF and PF tell of the lower half of the product (Intel).
    pub multiply_tells_product: bool,
    /// `div` and `idiv`: all.
    pub divide: Effect,
    /// `bsf` and `bsr`: all but ZF.
    pub scan: Effect,
    /// Of these PF tells of the number found, and is set where none was (Intel).
    pub scan_tells_number: bool,
    /// `lzcnt` and `tzcnt`: all but CF and ZF.
    pub count: Effect,
}

/// Runs one instruction on EAX = 7, ECX = 3, EDX = 0 with flags given; yields the flags after it.
macro_rules! flags_after {
    ($flags:expr, $instruction:literal) => {{
        let mut flags: u64 = $flags | 2;
        // SAFETY: the instruction named works on EAX, ECX and EDX and cannot fault with these values. The stack is used
        // below RSP as `push` and `pop` do; only arithmetic flags are loaded, so DF stays clear as the ABI wants it.
        unsafe {
            std::arch::asm!(
                "push {f}", "popfq", $instruction, "pushfq", "pop {f}",
                f = inout(reg) flags, inout("eax") 7 => _, inout("ecx") 3 => _, inout("edx") 0 => _,
            );
        }
        flags
    }};
}

fn measure() -> UndefinedFlags {
    macro_rules! effect {
        ($undefined:expr, $instruction:literal) => {
            Effect::seen($undefined, flags_after!(ALL, $instruction), flags_after!(0, $instruction))
        };
    }
    let has = |feature: bool, effect: Effect| if feature { effect } else { Effect::default() };
    UndefinedFlags {
        shift: effect!(AF, "shl eax, 5"),
        overflow: Overflow::seen(flags_after!(0, "ror eax, cl")),
        constant_rotates_keep_overflow: flags_after!(0, "ror eax, 3") & OF == 0
            && flags_after!(ALL, "ror eax, 3") & OF != 0,
        multiply: effect!(SF | ZF | AF | PF, "mul ecx"),
        // 21: positive, an odd number of ones; -6: negative, an even number in the low byte.
        multiply_tells_product: flags_after!(ALL, "mul ecx") & (SF | PF) == 0
            && flags_after!(0, "imul eax, ecx, -2") & (SF | PF) == SF | PF,
        divide: effect!(ALL, "div ecx"),
        scan: effect!(ALL & !ZF, "bsf eax, ecx"),
        // Bit 0, and bit 1.
        scan_tells_number: flags_after!(0, "bsf eax, ecx") & PF != 0
            && flags_after!(ALL, "bsr eax, ecx") & PF == 0,
        count: has(std::is_x86_feature_detected!("lzcnt"), effect!(ALL & !(CF | ZF), "lzcnt eax, ecx")),
    }
}

/// The habits of the CPU this runs on.
#[must_use]
pub fn host() -> &'static UndefinedFlags {
    static HOST: LazyLock<UndefinedFlags> = LazyLock::new(measure);
    &HOST
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_that_come_out_alike_are_an_effect_and_others_are_kept() {
        let e = Effect::seen(AF | PF | SF, AF | SF, AF);
        assert_eq!(e, Effect { set: AF as u32, clear: PF as u32 });
        assert_eq!(e.on((PF | SF) as u32), (AF | SF) as u32);
    }

    #[test]
    fn defined_flags_are_never_touched() {
        let h = host();
        for (effect, undefined) in [(h.shift, AF), (h.multiply, SF | ZF | AF | PF), (h.scan, ALL & !ZF)] {
            assert_eq!(u64::from(effect.set | effect.clear) & !undefined, 0, "{h:?}");
        }
    }
}
