//! Guests that try everything: every one- and two-byte opcode, every selector value, every gate, all 4 GiB; at ring 0 and
//! ring 3.
//!
//! Each attempt may end in an exception, whose handler writes down its vector and goes on with the next attempt. At the end
//! the guest prints what it wrote down, a character an attempt, and says [`FINE`]. What another engine makes of the same
//! guest must be the same, to the character.

use crate::hostile::*;
use iced_x86::code_asm::*;

/// What the attempts wrote down.
const RESULTS: u32 = 0x14_0000;
const MOST_RESULTS: u32 = 0x1_0000;
/// Words the code shares: where the next attempt begins, where this one's result belongs, where the set-up returns to.
const RESUME: u32 = 0x13_0000;
const SLOT: u32 = RESUME + 4;
const RETURN: u32 = RESUME + 8;
/// A word with what MXCSR is after reset.
const MXCSR: u32 = RESUME + 12;
/// What every exception and interrupt ends in, and what puts registers into order.
const HANDLER: u32 = 0x10_8000;
const PRINT: u32 = 0x10_8800;
const SETUP: u32 = 0x10_9000;
/// An `int3`, for whatever jumps or returns. Its lowest byte is 0: what adds AL to where EAX points does not change it.
const LANDING: u32 = 0x10_a000;
/// Attempts, and the bytes of each.
const ATTEMPTS: u32 = 0x80_0000;
const STRIDE: u32 = 64;
/// The vector that prints.
const DONE: u8 = 0x40;
const SERIAL: u32 = 0x3f8;

/// A guest and what it is called.
pub struct Exhaustive {
    /// For messages and files.
    pub name: &'static str,
    /// What to run.
    pub image: Image,
}

/// Selectors are tried in steps of `step`, all below 512 in any case; addresses in steps of 64 KiB.
#[must_use]
pub fn guests(step: u32) -> Vec<Exhaustive> {
    vec![
        Exhaustive { name: "opcodes-0", image: attempts(0, &opcodes(0)) },
        Exhaustive { name: "opcodes-3", image: attempts(3, &opcodes(3)) },
        Exhaustive { name: "interrupts-0", image: attempts(0, &interrupts()) },
        Exhaustive { name: "interrupts-3", image: attempts(3, &interrupts()) },
        Exhaustive { name: "selectors-0", image: selectors(step) },
        Exhaustive { name: "memory-0", image: memory(0) },
        Exhaustive { name: "memory-3", image: memory(3) },
    ]
}

impl Exhaustive {
    /// Two engines ran it to its end and said the same.
    ///
    /// # Panics
    /// With the first attempts that differ.
    #[track_caller]
    pub fn compare(&self, (one, a): (&str, &End), (other, b): (&str, &End)) {
        let letters = [a, b].map(|end| {
            assert_eq!(end.said(), Some(FINE), "{}: {end:?}", self.name);
            end.console.split("subring: ").next().unwrap_or_default().chars().collect::<Vec<_>>()
        });
        let [a, b] = &letters;
        if self.name.starts_with("memory") {
            assert_eq!(a[..], ['.'], "{}: {one} reads other than was written", self.name);
        }
        assert_eq!(a.len(), b.len(), "{}: {one} and {other} printed differently much", self.name);
        let differ: Vec<_> = (0..a.len()).filter(|i| a[*i] != b[*i]).collect();
        let list: Vec<_> = differ
            .iter()
            .take(20)
            .map(|i| format!("{}: {one} {}, {other} {}", self.attempt(*i), a[*i], b[*i]))
            .collect();
        assert!(
            differ.is_empty(),
            "{}: {} of {} differ:\n{}",
            self.name,
            differ.len(),
            a.len(),
            list.join("\n")
        );
    }

    /// What an attempt was, for messages.
    fn attempt(&self, number: usize) -> String {
        let ring = if self.name.ends_with('3') { 3 } else { 0 };
        let all = if self.name.starts_with("opcodes") { opcodes(ring) } else { interrupts() };
        all.get(number).map_or(format!("number {number}"), |bytes| format!("{bytes:02x?}"))
    }
}

/// Opcodes with a ModRM byte once for each `reg`, with memory at EAX and with ECX; the others once.
fn opcodes(ring: u32) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for first in 0..=0xffu8 {
        if first != 0x0f {
            with_modrm(&mut all, &[first], has_modrm(first), |modrm| {
                let stack = first == 0xbc || matches!(first, 0x69 | 0x6b) && to_esp(modrm);
                ring == 3 || !stack && first != 0xf4
            });
            continue;
        }
        for second in 0..=0xffu8 {
            with_modrm(&mut all, &[0x0f, second], second & 0xf0 != 0x80, |modrm| {
                // Calls of the hypervisor, which KVM answers.
                let hypercall = second == 1 && matches!(modrm, 0xc1 | 0xd9);
                // What the policy hides and the CPU may have all the same: 3DNow!, RDRAND, XSAVE (csam's sensitivity).
                let hidden = matches!(second, 0x0e | 0x0f)
                    || second == 0xc7 && modrm >= 0xf0
                    || second == 0xae && matches!(modrm, 0x20 | 0x28 | 0x30)
                    // MOVDIRI, which nobody patches in ring 3.
                    || second == 0x38 && modrm == 0xf9 && ring == 3;
                // These would change how everything after them is understood.
                let system =
                    matches!(second, 0x22 | 0x23) || second == 1 && matches!(modrm >> 3 & 7, 2 | 3 | 6);
                let stack = matches!(second, 0x50 | 0xb6..=0xb8 | 0xbc..=0xbf | 0xc5 | 0xd7) && to_esp(modrm);
                !hypercall && !hidden && (ring == 3 || !system && !stack)
            });
        }
    }
    all
}

/// Its result is ESP, which would be 0 or nearly: where the stack wraps, in pages that are no memory.
fn to_esp(modrm: u8) -> bool {
    modrm >> 3 & 7 == 4
}

fn with_modrm(all: &mut Vec<Vec<u8>>, opcode: &[u8], has_modrm: bool, wanted: impl Fn(u8) -> bool) {
    let variants = if has_modrm { 16 } else { 1 };
    for variant in 0..variants {
        let modrm = (variant & 7) << 3 | if variant < 8 { 0 } else { 0xc1 };
        if wanted(modrm) {
            all.push([opcode, &[modrm]].concat());
        }
    }
}

fn has_modrm(opcode: u8) -> bool {
    opcode < 0x40 && opcode & 7 < 4
        || matches!(opcode, 0x62 | 0x63 | 0x69 | 0x6b | 0x80..=0x8f | 0xc0 | 0xc1 | 0xc4..=0xc7 | 0xd0..=0xd3)
        || matches!(opcode, 0xd8..=0xdf | 0xf6 | 0xf7 | 0xfe | 0xff)
}

fn interrupts() -> Vec<Vec<u8>> {
    (0..=0xffu8).filter(|n| *n != DONE).map(|n| vec![0xcd, n]).collect()
}

/// A kernel with paging, whose handlers go on with the next attempt in `ring`, and which begins at `KERNEL + 0x1000`.
fn kernel(ring: u32, results: u32) -> Image {
    assert!(results <= MOST_RESULTS);
    let mut image = Image::kernel();
    image.paging(KERNEL + 0x1000);
    for vector in 0..=0xffu32 {
        if vector != u32::from(DONE) {
            image.code(STUBS + 0x20 * vector, |a| {
                a.push(vector)?;
                jump(a, HANDLER)
            });
        }
    }
    image.code(STUBS + 0x20 * u32::from(DONE), |a| jump(a, PRINT));
    image.code(HANDLER, |a| {
        a.pop(ebx)?;
        data_segments(a, DATA0)?;
        a.cld()?;
        a.mov(edi, dword_ptr(SLOT))?;
        a.and(bl, 0x3f)?;
        a.add(bl, 0x30)?;
        a.mov(byte_ptr(edi), bl)?;
        if ring == 0 {
            a.mov(esp, KERNEL_STACK)?;
            a.jmp(dword_ptr(RESUME))
        } else {
            data_segments(a, DATA3)?;
            a.push(DATA3)?;
            a.push(USER_STACK)?;
            a.push(2u32)?;
            a.push(CODE3)?;
            a.push(dword_ptr(RESUME))?;
            a.iretd()
        }
    });
    image.code(PRINT, |a| {
        let mut next = a.create_label();
        data_segments(a, DATA0)?;
        a.mov(esi, RESULTS)?;
        a.mov(ecx, results)?;
        a.mov(edx, SERIAL)?;
        a.cld()?;
        a.set_label(&mut next)?;
        a.lodsb()?;
        a.out(dx, al)?;
        a.dec(ecx)?;
        a.jne(next)?;
        finish(a, FINE)
    });
    image.put(RESULTS, &vec![b'.'; results as usize]);
    image
}

/// A guest that executes each of `all` with the same registers.
fn attempts(ring: u32, all: &[Vec<u8>]) -> Image {
    let mut image = kernel(ring, all.len() as u32);
    let (stack, data) = if ring == 0 { (KERNEL_STACK, DATA0) } else { (USER_STACK, DATA3) };
    image.code(KERNEL + 0x1000, |a| {
        a.mov(eax, 0x610u32)?; // large pages, SSE
        a.mov(cr4, eax)?;
        if ring == 0 { jump(a, ATTEMPTS) } else { enter_user(a) }
    });
    image.code(USER, |a| jump(a, ATTEMPTS));
    // ECX is where the next attempt begins, EAX where the result belongs.
    image.code(SETUP, |a| {
        a.pop(edx)?;
        if ring == 0 {
            a.cli()?;
        }
        a.push(2u32)?;
        a.popfd()?;
        a.mov(ebx, eax)?;
        data_segments(a, data)?;
        a.mov(dword_ptr(RETURN), edx)?;
        a.mov(dword_ptr(SLOT), ebx)?;
        a.mov(dword_ptr(RESUME), ecx)?;
        a.mov(ecx, LANDING)?;
        a.mov(dword_ptr(FREE), ecx)?;
        a.fninit()?;
        a.ldmxcsr(dword_ptr(MXCSR))?;
        a.mov(esp, stack - 0x40)?;
        for _ in 0..4 {
            a.push(ecx)?;
        }
        a.mov(ebp, stack - 0x20)?;
        a.mov(eax, FREE)?;
        a.mov(ebx, FREE)?;
        a.mov(edx, 0x80u32)?;
        a.mov(esi, FREE + 0x100)?;
        a.mov(edi, FREE + 0x200)?;
        a.jmp(dword_ptr(RETURN))
    });
    image.put(LANDING, &[0xcc]).word(MXCSR, 0x1f80);
    for (i, bytes) in all.iter().enumerate() {
        let at = ATTEMPTS + STRIDE * i as u32;
        let mut code = assemble(at, |a| {
            a.mov(ecx, at + STRIDE)?;
            a.mov(eax, RESULTS + i as u32)?;
            a.call(u64::from(SETUP))
        });
        code.extend(bytes);
        // Displacements and immediates of 0, or harmless instructions.
        code.resize(code.len() + 10, 0);
        code.resize(STRIDE as usize, 0xcc);
        image.put(at, &code);
    }
    image.put(ATTEMPTS + STRIDE * all.len() as u32, &[0xcd, DONE]);
    image
}

/// A guest whose ring 0 loads selectors into everything that takes them, and makes far calls to them. A character for each
/// says what came of them.
fn selectors(step: u32) -> Image {
    const LAST: u32 = 0xffff;
    const SELECTOR: u32 = FREE + 4;
    const SUM: u32 = FREE + 8;
    const PLACE: u32 = FREE + 12;
    const CAUGHT: u32 = FREE + 16;
    let tried = 512 + (LAST + 1 - 512).div_ceil(step);
    let mut image = kernel(0, tried);
    // Every way to use a selector; CX and the far pointer at FREE have it.
    let ways: [Vec<u8>; 9] = [
        vec![0x8e, 0xd9],                                  // mov ds, cx
        vec![0x8e, 0xc1],                                  // mov es, cx
        vec![0x8e, 0xe1],                                  // mov fs, cx
        vec![0x8e, 0xe9],                                  // mov gs, cx
        vec![0x8e, 0xd1],                                  // mov ss, cx
        vec![0x51, 0x0f, 0xa1],                            // push ecx; pop fs
        vec![0x0f, 0x00, 0xd1],                            // lldt cx
        vec![0x0f, 0x00, 0xd9],                            // ltr cx
        [&[0xff, 0x1d][..], &FREE.to_le_bytes()].concat(), // call far [FREE]
    ];
    // Each begins by adding to the sum what came of the one before.
    let chunk = |n: usize| ATTEMPTS + 2 * STRIDE * n as u32;
    let collect = |a: &mut CodeAssembler| {
        data_segments(a, DATA0)?;
        a.mov(esp, KERNEL_STACK)?;
        a.mov(eax, dword_ptr(SUM))?;
        a.imul_3(eax, eax, 31)?;
        a.movzx(ecx, byte_ptr(CAUGHT))?;
        a.add(eax, ecx)?;
        a.mov(dword_ptr(SUM), eax)?;
        a.mov(byte_ptr(CAUGHT), 0u32)
    };
    for (n, way) in ways.iter().enumerate() {
        let next = chunk(n + 1);
        let mut code = assemble(chunk(n), |a| {
            collect(a)?;
            a.mov(dword_ptr(RESUME), next)?;
            a.mov(ecx, dword_ptr(SELECTOR))
        });
        code.extend(way);
        code.extend(assemble(chunk(n) + code.len() as u32, |a| jump(a, next)));
        assert!(code.len() as u32 <= 2 * STRIDE);
        image.put(chunk(n), &code);
    }
    image.code(chunk(ways.len()), |a| {
        collect(a)?;
        jump(a, KERNEL + 0x2000)
    });
    image.code(KERNEL + 0x1000, |a| {
        a.mov(dword_ptr(SLOT), CAUGHT)?;
        a.mov(dword_ptr(PLACE), RESULTS)?;
        // Where a far call gets to that is none to a gate.
        a.mov(dword_ptr(FREE), chunk(ways.len()))?;
        a.mov(dword_ptr(SELECTOR), 0u32)?;
        a.mov(dword_ptr(SUM), 0u32)?;
        jump(a, ATTEMPTS)
    });
    // One selector is done.
    image.code(KERNEL + 0x2000, |a| {
        let (mut small, mut done) = (a.create_label(), a.create_label());
        a.xor(edx, edx)?;
        a.mov(eax, dword_ptr(SUM))?;
        a.mov(ecx, 26u32)?;
        a.div(ecx)?;
        a.add(edx, 0x61)?;
        a.mov(edi, dword_ptr(PLACE))?;
        a.mov(byte_ptr(edi), dl)?;
        a.inc(dword_ptr(PLACE))?;
        a.mov(dword_ptr(SUM), 0u32)?;
        a.mov(eax, dword_ptr(SELECTOR))?;
        a.inc(eax)?;
        a.cmp(eax, 512)?;
        a.jbe(small)?;
        a.add(eax, step - 1)?;
        a.set_label(&mut small)?;
        a.mov(dword_ptr(SELECTOR), eax)?;
        a.cmp(eax, LAST)?;
        a.ja(done)?;
        jump(a, ATTEMPTS)?;
        a.set_label(&mut done)?;
        a.int(i32::from(DONE))
    });
    image
}

/// A guest that writes and reads all 4 GiB above its own 64 MiB, and of the last 16 MiB each page. Everything there is the
/// same 4 MiB of RAM.
fn memory(ring: u32) -> Image {
    let mut image = kernel(ring, 1);
    for i in 16..1024u32 {
        image.word(PAGE_DIRECTORY + 4 * i, 0x0400_0087);
    }
    let body = |a: &mut CodeAssembler| {
        let (mut next, mut wrong, mut pages, mut done) =
            (a.create_label(), a.create_label(), a.create_label(), a.create_label());
        a.mov(edi, 0x0400_0000u32)?;
        a.set_label(&mut next)?;
        a.mov(dword_ptr(edi), edi)?;
        a.cmp(dword_ptr(edi), edi)?;
        a.jne(wrong)?;
        // Seen where the memory is, too.
        a.mov(ecx, edi)?;
        a.and(ecx, 0x3f_ffff)?;
        a.cmp(dword_ptr(ecx + 0x0400_0000), edi)?;
        a.jne(wrong)?;
        a.cmp(edi, 0xff00_0000u32)?;
        a.jae(pages)?;
        a.add(edi, 0x1_0000)?;
        a.jmp(next)?;
        a.set_label(&mut pages)?;
        a.add(edi, 0x1000)?;
        a.jne(next)?;
        a.mov(edi, 0xffff_fffcu32)?;
        a.mov(dword_ptr(edi), edi)?;
        a.cmp(dword_ptr(edi), edi)?;
        a.je(done)?;
        a.set_label(&mut wrong)?;
        a.ud2()?;
        a.set_label(&mut done)?;
        a.int(i32::from(DONE))
    };
    let start = |a: &mut CodeAssembler| {
        a.mov(dword_ptr(SLOT), RESULTS)?;
        a.mov(dword_ptr(RESUME), USER + 0x800)?;
        if ring == 0 { jump(a, USER) } else { enter_user(a) }
    };
    image.code(KERNEL + 0x1000, start).code(USER, body);
    image.put(USER + 0x800, &[0xcd, DONE]);
    image
}
