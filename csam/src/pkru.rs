//! Bytes that load PKRU, the register that says what memory protection keys allow (SDM Vol. 3A, 4.6.2).
//!
//! Where ring 3 is kept from ring 0 by a protection key, it must not be shown any of them as code, at whatever offset, for it
//! may jump into the middle of an instruction.

/// Whether these bytes are `wrpkru` (0f 01 ef), or begin an `xrstor` of memory (0f ae /5).
#[must_use]
pub const fn loads_pkru(bytes: [u8; 3]) -> bool {
    match bytes {
        [0x0f, 0x01, 0xef] => true,
        [0x0f, 0xae, modrm] => modrm >> 3 & 7 == 5 && modrm < 0xc0,
        _ => false,
    }
}

/// Where in a piece of code bytes lie that load PKRU, by themselves or together with what may lie before or behind the piece:
/// the offset of the first of them in it that `allowed` does not allow.
#[must_use]
pub fn loader_in(code: &[u8], allowed: impl Fn(usize) -> bool) -> Option<usize> {
    // Whatever ends with 0f may come before a piece that begins like this.
    if let [second, third, ..] = *code
        && loads_pkru([0x0f, second, third])
    {
        return Some(0);
    }
    let triple = |w: &[u8]| matches!(*w, [a, b, c] if loads_pkru([a, b, c]));
    let inside = code.windows(3).enumerate().find(|(i, w)| triple(w) && !allowed(*i)).map(|(i, _)| i);
    let ends = || matches!(*code, [.., 0x0f, 0x01 | 0xae]).then(|| code.len().wrapping_sub(2));
    inside.or_else(ends)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(at: usize, bytes: &[u8]) -> Option<usize> {
        let mut page = [0x90u8; 4096];
        page[at..at + bytes.len()].copy_from_slice(bytes);
        loader_in(&page, |_| false)
    }

    #[test]
    fn what_loads_pkru_is_found_wherever_it_lies() {
        for at in [0, 1, 2000, 4093] {
            assert_eq!(with(at, &[0x0f, 0x01, 0xef]), Some(at));
            assert_eq!(with(at, &[0x0f, 0xae, 0x2f]), Some(at), "xrstor [edi]");
            assert_eq!(with(at, &[0x0f, 0xae, 0xac]), Some(at), "xrstor with an index");
            assert_eq!(with(at, &[0x0f, 0xae, 0xe8]), None, "lfence");
            assert_eq!(with(at, &[0x0f, 0x01, 0xee]), None, "rdpkru");
            assert_eq!(with(at, &[0x0f, 0xae, 0x0f]), None, "fxrstor");
        }
    }

    #[test]
    fn half_of_it_here_is_found_if_the_other_half_may_be_in_the_neighbour() {
        assert_eq!(with(4094, &[0x0f, 0x01]), Some(4094));
        assert_eq!(with(4094, &[0x0f, 0xae]), Some(4094));
        assert_eq!(with(0, &[0x01, 0xef]), Some(0));
        assert_eq!(with(0, &[0xae, 0x6f]), Some(0));
        // What ends with 0f alone is as good as its successor.
        assert_eq!(with(4095, &[0x0f]), None);
        assert_eq!(with(0, &[0xef]), None);
    }

    #[test]
    fn one_that_is_allowed_hides_no_other() {
        let code = [0x0f, 0x01, 0xef, 0x90, 0x0f, 0x01, 0xef, 0x90];
        assert_eq!(loader_in(&code, |at| at == 0), Some(4));
        assert_eq!(loader_in(&code, |at| at == 0 || at == 4), None);
    }
}
