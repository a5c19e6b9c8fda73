//! Guests that misbehave cost nobody but themselves: they get what bare metal would give them, or are stopped with a
//! dump, and the monitor and its worlds are gone afterwards.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use monitor::em::raw::layout::{Layout, TRAMP_LEN};
use std::time::Duration;
use subring_tests::exhaustive::guests;
use subring_tests::hostile::*;

const LIMIT: Duration = Duration::from_secs(60);
/// For guests that never end by themselves.
const A_WHILE: Duration = Duration::from_millis(700);
/// Beyond the first 512. Each is nine exits: all of them take a minute on raw.
const EVERY_NTH_SELECTOR: u32 = 17;
const ENGINES: [&str; 2] = ["raw", "interp"];

fn kernel(f: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Image {
    let mut image = Image::kernel();
    image.code(KERNEL, f);
    image
}

fn user(f: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Image {
    let mut image = Image::user();
    image.code(USER, f);
    image
}

/// Ring 0 with paging on; the code runs at KERNEL + 1000h.
fn paged(f: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Image {
    let mut image = Image::kernel();
    image.paging(KERNEL + 0x1000).code(KERNEL + 0x1000, f);
    image
}

fn both(image: &Image, check: impl Fn(&End)) {
    for engine in ENGINES {
        println!("-- {engine}");
        check(&image.run(engine, LIMIT));
    }
}

/// A small generator: the same seeds every time (Marsaglia's xorshift).
struct Random(u32);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 17;
        self.0 ^= self.0 << 5;
        self.0
    }
}

#[test]
fn hlt_with_interrupts_disabled_ends_the_run_well() {
    both(&Image::bare(&[0xf4]), |end| assert_eq!(end.code, 0, "{end:?}"));
}

#[test]
fn an_exception_before_there_is_an_idt_is_fatal() {
    both(&Image::bare(&[0x0f, 0x0b]), |end| end.expect_fatal("triple fault"));
}

#[test]
fn an_exception_after_the_idt_was_emptied_is_a_restart() {
    let mut image = kernel(|a| {
        a.lidt(ptr(KERNEL + 0x100))?;
        a.int3()
    });
    image.put(KERNEL + 0x100, &pointer(0, 0));
    both(&image, |end| end.expect_line(0, "triple fault"));
}

#[test]
fn a_triple_fault_through_a_broken_idt_is_fatal() {
    let mut image = kernel(|a| {
        a.lidt(ptr(KERNEL + 0x100))?;
        a.ud2()
    });
    image.put(KERNEL + 0x100, &pointer(FREE, 0x7ff));
    both(&image, |end| end.expect_fatal("triple fault"));
}

#[test]
fn a_jump_to_where_no_memory_is_raises_what_the_bus_gives() {
    // Ones from an empty bus are FF FF, an invalid opcode.
    let image = kernel(|a| {
        a.mov(eax, 0x9000_0000u32)?;
        a.jmp(eax)
    });
    both(&image, |end| end.expect_said(event(6)));
}

#[test]
fn a_jump_to_an_unmapped_page_is_a_page_fault() {
    let mut image = paged(|a| {
        a.mov(eax, 0x9000_0000u32)?;
        a.jmp(eax)
    });
    image.word(PAGE_DIRECTORY + 4 * (0x9000_0000u32 >> 22), 0);
    both(&image, |end| end.expect_said(event(14)));
}

#[test]
fn random_bytes_as_a_kernel_end_or_can_be_stopped() {
    for seed in 1..=6u32 {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9));
        let bytes: Vec<u8> = (0..4096).map(|_| random.next() as u8).collect();
        for engine in ENGINES {
            let end = Image::bare(&bytes).run(engine, A_WHILE);
            assert!([0, 3, 5, 130].contains(&end.code), "seed {seed} on {engine}: {end:?}");
        }
    }
}

#[test]
fn random_bytes_behind_an_idt_end_or_can_be_stopped() {
    for seed in 1..=6u32 {
        let mut random = Random(seed.wrapping_mul(0x517c_c1b7));
        let bytes: Vec<u8> = (0..4096).map(|_| random.next() as u8).collect();
        for (mut image, at) in [(Image::kernel(), KERNEL), (Image::user(), USER)] {
            image.put(at, &bytes);
            for engine in ENGINES {
                let end = image.run(engine, A_WHILE);
                assert!([0, 3, 5, 130].contains(&end.code), "seed {seed} on {engine}: {end:?}");
            }
        }
    }
}

#[test]
fn an_endless_loop_with_interrupts_disabled_can_be_stopped() {
    for engine in ENGINES {
        Image::bare(&[0xeb, 0xfe]).run(engine, A_WHILE).expect_stopped();
        let image = user(|a| jump(a, USER));
        image.run(engine, A_WHILE).expect_stopped();
    }
}

#[test]
fn code_that_changes_its_next_instruction_executes_the_new_one() {
    let image = kernel(|a| {
        a.mov(eax, 0u32)?; // 5 bytes
        a.mov(byte_ptr(KERNEL + 12), 0x40)?; // 7 bytes: inc eax over nop
        a.nop()?;
        a.add(eax, FINE - 1)?;
        a.mov(dx, u32::from(EXIT_PORT))?;
        a.out(dx, eax)
    });
    both(&image, |end| end.expect_said(FINE));
}

#[test]
fn code_that_rewrites_itself_in_a_loop_sees_every_change() {
    // The immediate of `add eax, imm32` is counted up before each execution: 0 + 1 + .. + 999.
    for ring3 in [false, true] {
        let at = if ring3 { USER } else { KERNEL };
        let body = |a: &mut CodeAssembler| {
            let mut again = a.create_label();
            a.xor(eax, eax)?; // 2 bytes
            a.xor(ecx, ecx)?; // 2 bytes
            a.set_label(&mut again)?;
            a.mov(dword_ptr(at + 11), ecx)?; // 6 bytes
            a.db(&[0x05, 0, 0, 0, 0])?;
            a.inc(ecx)?;
            a.cmp(ecx, 1000)?;
            a.jne(again)?;
            a.cmp(eax, 499_500)?;
            let mut good = a.create_label();
            a.je(good)?;
            a.int(0x41)?;
            a.set_label(&mut good)?;
            a.int(0x40)
        };
        let image = if ring3 { user(body) } else { kernel(body) };
        both(&image, |end| end.expect_said(event(0x40)));
    }
}

#[test]
fn a_loop_that_overwrites_itself_with_the_same_bytes_can_be_stopped() {
    let image = kernel(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.mov(esi, KERNEL)?;
        a.mov(edi, esi)?;
        a.mov(ecx, 16u32)?;
        a.cld()?;
        a.rep().movsb()?;
        a.jmp(again)
    });
    for engine in ENGINES {
        image.run(engine, A_WHILE).expect_stopped();
    }
}

#[test]
fn ring_0_cannot_reach_64_bit_mode() {
    let mut image = kernel(|_| Ok(()));
    image.put(KERNEL, &[0xea, 0, 0, 0x12, 0, 0x33, 0]);
    both(&image, |end| end.expect_said(event(13)));
}

#[test]
fn ring_3_that_reaches_64_bit_mode_is_stopped() {
    let delta = Layout::CANDIDATES[0].delta;
    let escapes: [(&str, &[u8]); 5] = [
        ("syscall", &[0xb8, 0x27, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xfe]),
        ("read at 0", &[0x31, 0xc0, 0x48, 0x8b, 0x00, 0xeb, 0xfe]),
        ("loop", &[0xeb, 0xfe]),
        // mov rax, 7ffffffff000h; jmp rax
        ("jump to nowhere above", &[0x48, 0xb8, 0, 0xf0, 0xff, 0xff, 0xff, 0x7f, 0, 0, 0xff, 0xe0]),
        ("int3", &[0xcc]),
    ];
    for (what, code) in escapes {
        // In 64-bit mode no segment has a base: one of these is the code view, the other one the data view.
        for target in [USER + 0x100, USER.wrapping_add(delta) + 0x100] {
            println!("-- {what} at {target:#x}");
            let mut image = Image::user();
            let mut jump = vec![0xea];
            jump.extend(target.to_le_bytes());
            jump.extend([0x33, 0]);
            image.put(USER, &jump).put(USER + 0x100, code);
            let end = image.run("raw", Duration::from_secs(2));
            // Refused where the page was scanned because of what is in it; a native jump costs the guest its life.
            if end.said() != Some(event(13)) && !end.stopped {
                end.expect_fatal("the guest broke its world");
            }
            image.run("interp", LIMIT).expect_said(event(13));
        }
    }
}

#[test]
fn selectors_of_the_host_are_not_the_guests() {
    // 2bh is the TSS with RPL 3 in the guest's GDT, the others are beyond it.
    let cases = [
        (0x2bu32, ds),
        (0x33, ss),
        (0x7b, es),
        (0x33, fs),
        (0x6b, gs),
        (0x4007, ds),
        (0x400f, es),
        (0x2b, ss),
    ];
    for (selector, segment) in cases {
        let load = |a: &mut CodeAssembler| {
            a.mov(eax, selector)?;
            a.mov(segment, eax)?;
            a.int(0x40)
        };
        println!("-- {selector:#x}");
        kernel(load).run("raw", LIMIT).expect_said(event(13));
        let end = user(load).run("raw", LIMIT);
        // The host's flat data selector cannot be told from the guest's own where both are flat.
        assert!(
            end.said() == Some(event(13)) || selector == 0x2b && end.said() == Some(event(0x40)),
            "{end:?}"
        );
    }
    let load = |a: &mut CodeAssembler| {
        a.mov(eax, 0x2b)?;
        a.mov(ds, eax)?;
        a.int(0x40)
    };
    kernel(load).run("interp", LIMIT).expect_said(event(13));
    user(load).run("interp", LIMIT).expect_said(event(13));
}

#[test]
fn a_far_jump_of_ring_3_to_the_hosts_32_bit_code_segment_is_refused() {
    // 23h is a data segment in the guest's GDT.
    let mut image = Image::user();
    image.put(USER, &[0xea, 0, 1, 0x12, 0, 0x23, 0]).code(USER + 0x100, |a| a.int(0x40));
    image.run("interp", LIMIT).expect_said(event(13));
    // Where the guest's own flat code runs behind that selector, the jump cannot be told from a near one.
    let end = image.run("raw", LIMIT);
    assert!(matches!(end.said(), Some(v) if v == event(13) || v == event(0x40)), "{end:?}");
}

#[test]
fn random_far_jumps_end() {
    let mut random = Random(77);
    for _ in 0..8 {
        let (offset, selector) = (random.next(), random.next() as u16 & 0xff);
        let mut bytes = vec![0xea];
        bytes.extend(offset.to_le_bytes());
        bytes.extend(selector.to_le_bytes());
        for (mut image, at) in [(Image::kernel(), KERNEL), (Image::user(), USER)] {
            image.put(at, &bytes);
            let (raw, interp) = (image.run("raw", LIMIT), image.run("interp", LIMIT));
            assert_eq!(
                (raw.code, raw.said()),
                (interp.code, interp.said()),
                "{selector:#x}:{offset:#x} {raw:?}"
            );
        }
    }
}

#[test]
fn a_wild_stack_pointer_of_ring_0_with_paging_is_fatal() {
    let mut image = paged(|a| {
        a.mov(esp, 0x9000_0010u32)?;
        a.push(eax)?;
        a.nop()
    });
    image.word(PAGE_DIRECTORY + 4 * (0x9000_0000u32 >> 22), 0);
    both(&image, |end| end.expect_fatal("triple fault"));
}

#[test]
fn a_wild_stack_pointer_of_ring_3_is_a_page_fault() {
    let mut image = Image::kernel();
    image.paging(KERNEL + 0x1000).code(KERNEL + 0x1000, enter_user).code(USER, |a| {
        a.mov(esp, 0x9000_0010u32)?;
        a.push(eax)
    });
    image.word(PAGE_DIRECTORY + 4 * (0x9000_0000u32 >> 22), 0);
    both(&image, |end| end.expect_said(event(14)));
}

#[test]
fn page_tables_outside_of_ram_are_fatal() {
    let image = kernel(|a| {
        a.mov(eax, 0x7f00_0000u32)?;
        a.mov(cr3, eax)?;
        a.mov(eax, cr0)?;
        a.or(eax, 0x8000_0000u32)?;
        a.mov(cr0, eax)?;
        a.nop()?;
        finish(a, WRONG)
    });
    both(&image, |end| end.expect_fatal("triple fault"));
}

#[test]
fn page_tables_can_be_changed_through_themselves() {
    // The last entry of the directory is the directory: fffff000 is the directory, ffc00000 + n * 1000h is table n.
    let table = FREE;
    let mut image = paged(|a| {
        a.mov(dword_ptr(0xffff_f000u32 + 4 * 0x240), table | 7)?; // 90000000h
        a.mov(dword_ptr(0xffc0_0000u32 + 0x1000 * 0x240), (FREE + 0x1000) | 7)?;
        a.mov(dword_ptr(FREE + 0x1000), 0x1234u32)?;
        a.mov(dword_ptr(FREE + 0x2000), 0x5678u32)?;
        a.mov(ecx, dword_ptr(0x9000_0000u32))?;
        a.mov(dword_ptr(0xffc0_0000u32 + 0x1000 * 0x240), (FREE + 0x2000) | 7)?;
        a.invlpg(ptr(0x9000_0000u32))?;
        a.add(ecx, dword_ptr(0x9000_0000u32))?;
        a.mov(eax, ecx)?;
        a.mov(dx, u32::from(EXIT_PORT))?;
        a.out(dx, eax)
    });
    image.word(PAGE_DIRECTORY + 4 * 0x3ff, PAGE_DIRECTORY | 7);
    image.word(PAGE_DIRECTORY + 4 * 0x240, 0);
    both(&image, |end| end.expect_said(0x1234 + 0x5678));
}

/// Pages where the raw engine may have something of its own.
fn reservations() -> Vec<u32> {
    let mut pages = Vec::new();
    for l in Layout::CANDIDATES {
        let tramp = l.tramp.wrapping_add(l.delta);
        let views = [LOAD, KERNEL, KERNEL + 0x1000, STACK_PAGE]
            .map(|p| [p.wrapping_add(l.delta), p.wrapping_sub(l.delta)])
            .concat();
        pages.extend([l.vcpu, l.gate, tramp, tramp.wrapping_add(TRAMP_LEN - 0x1000), l.tramp]);
        pages.extend([
            l.tramp.wrapping_sub(l.delta),
            l.vcpu.wrapping_add(l.delta),
            l.gate.wrapping_add(l.delta),
        ]);
        pages.extend(views);
    }
    pages.sort_unstable();
    pages.dedup();
    pages.retain(|p| *p >= 0x1000_0000);
    pages
}

const STACK_PAGE: u32 = 0x10_e000;

/// Where the memory behind a reserved page can be seen, too: RAM at 64 MiB, mapped as it is.
fn alias(at: u32) -> u32 {
    0x0400_0000 | at & 0x3f_ffff
}

/// The 4 MiB around `page` mean RAM at 64 MiB; all else above RAM is not mapped.
fn only(image: &mut Image, page: u32) {
    for i in 0x40..0x400u32 {
        image.word(PAGE_DIRECTORY + 4 * i, if i == page >> 22 { 0x0400_0087 } else { 0 });
    }
}

/// Runs `body` for each reserved page; it says FINE in a page of its own mapping.
fn for_each_reservation(ring3: bool, body: impl Fn(&mut CodeAssembler, u32) -> Result<(), IcedError>) {
    for page in reservations() {
        let mut image = Image::kernel();
        image.paging(KERNEL + 0x1000);
        if ring3 {
            image.code(KERNEL + 0x1000, enter_user).code(USER, |a| body(a, page));
        } else {
            image.code(KERNEL + 0x1000, |a| body(a, page));
        }
        only(&mut image, page);
        println!("-- {page:#x}");
        image.run("raw", LIMIT).expect_said(event(0x40));
    }
}

/// `int 41h` unless the last comparison said equal.
fn must_be_equal(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut good = a.create_label();
    a.je(good)?;
    a.int(0x41)?;
    a.set_label(&mut good)?;
    a.nop()
}

#[test]
fn the_guest_can_write_wherever_our_own_pages_lie() {
    for_each_reservation(false, |a, page| {
        a.mov(dword_ptr(page + 0x124), page)?;
        a.cmp(dword_ptr(page + 0x124), page)?;
        must_be_equal(a)?;
        a.cmp(dword_ptr(alias(page + 0x124)), page)?;
        must_be_equal(a)?;
        a.int(0x40)
    });
}

#[test]
fn the_guest_can_read_wherever_our_own_pages_lie() {
    for_each_reservation(false, |a, page| {
        a.mov(dword_ptr(alias(page)), page)?;
        a.cmp(dword_ptr(page), page)?;
        must_be_equal(a)?;
        a.int(0x40)
    });
}

#[test]
fn the_guest_can_execute_wherever_our_own_pages_lie() {
    for ring3 in [false, true] {
        for_each_reservation(ring3, |a, page| {
            a.xor(ebx, ebx)?;
            a.mov(dword_ptr(alias(page + 0x124)), 0x00c3_9043u32)?; // inc ebx; nop; ret
            a.mov(eax, page + 0x124)?;
            a.call(eax)?;
            a.cmp(ebx, 1)?;
            must_be_equal(a)?;
            a.cmp(dword_ptr(page + 0x124), 0x00c3_9043u32)?;
            must_be_equal(a)?;
            a.int(0x40)
        });
    }
}

#[test]
fn more_scattered_pages_than_the_host_maps_are_no_trouble() {
    // 96 tables, each of which shows every other page of RAM: no two neighbours can share a host mapping. They are
    // seen at 1 GiB and above, 1,024 * 768 pages.
    let mut image = paged(|a| {
        let (mut table, mut page) = (a.create_label(), a.create_label());
        // Table 400000h: entry n is frame 8 MiB + ((n * 7) & 3ff) pages.
        a.xor(ecx, ecx)?;
        a.set_label(&mut table)?;
        a.imul_3(eax, ecx, 7)?;
        a.and(eax, 0x3ff)?;
        a.shl(eax, 12)?;
        a.add(eax, 0x80_0000 | 7)?;
        a.mov(dword_ptr(ecx * 4 + FREE), eax)?;
        a.inc(ecx)?;
        a.cmp(ecx, 0x400)?;
        a.jne(table)?;
        a.mov(edi, 0x4000_0000u32)?;
        a.set_label(&mut page)?;
        a.mov(dword_ptr(edi), edi)?;
        a.cmp(dword_ptr(edi), edi)?;
        let mut good = a.create_label();
        a.je(good)?;
        finish(a, WRONG)?;
        a.set_label(&mut good)?;
        a.add(edi, 0x1000)?;
        a.cmp(edi, 0x6000_0000)?;
        a.jne(page)?;
        finish(a, FINE)
    });
    for i in 0x100..0x400u32 {
        image.word(PAGE_DIRECTORY + 4 * i, FREE | 7);
    }
    image.run("raw", Duration::from_secs(60)).expect_said(FINE);
}

#[test]
fn more_pages_of_code_than_the_host_maps_are_no_trouble() {
    // The same scattered view, executed: a `ret` in every page, from both rings.
    for ring3 in [false, true] {
        let body = |a: &mut CodeAssembler| {
            let mut page = a.create_label();
            a.mov(edi, 0x4000_0000u32)?;
            a.set_label(&mut page)?;
            a.call(edi)?;
            a.add(edi, 0x1000)?;
            a.cmp(edi, 0x5400_0000)?;
            a.jne(page)?;
            a.int(0x40)
        };
        let mut image = Image::kernel();
        image.paging(KERNEL + 0x1000);
        if ring3 {
            image.code(KERNEL + 0x1000, enter_user).code(USER, body);
        } else {
            image.code(KERNEL + 0x1000, body);
        }
        for i in 0x40..0x400u32 {
            image.word(PAGE_DIRECTORY + 4 * i, if (0x100..0x150).contains(&i) { FREE | 7 } else { 0 });
        }
        for n in 0..0x400u32 {
            image.word(FREE + 4 * n, (0x80_0000 + (((n * 7) & 0x3ff) << 12)) | 7);
            image.put(0x80_0000 + (n << 12), &[0xc3]);
        }
        image.run("raw", Duration::from_secs(60)).expect_said(event(0x40));
    }
}

#[test]
fn all_of_a_large_memory_is_the_guests_without_paging() {
    let image = kernel(|a| {
        let (mut fill, mut check) = (a.create_label(), a.create_label());
        a.mov(edi, FREE)?;
        a.set_label(&mut fill)?;
        a.mov(dword_ptr(edi), edi)?;
        a.add(edi, 0x1_0000)?;
        a.cmp(edi, 0xbfff_0000u32)?;
        a.jb(fill)?;
        a.mov(edi, FREE)?;
        a.set_label(&mut check)?;
        a.cmp(dword_ptr(edi), edi)?;
        let mut good = a.create_label();
        a.je(good)?;
        finish(a, WRONG)?;
        a.set_label(&mut good)?;
        a.add(edi, 0x1_0000)?;
        a.cmp(edi, 0xbfff_0000u32)?;
        a.jb(check)?;
        for page in reservations().into_iter().filter(|p| *p < 0xc000_0000) {
            a.mov(dword_ptr(page + 8), page)?;
            a.cmp(dword_ptr(page + 8), page)?;
            let mut good = a.create_label();
            a.je(good)?;
            finish(a, WRONG + 1)?;
            a.set_label(&mut good)?;
        }
        finish(a, FINE)
    });
    image.run_with("raw", &["-m", "3072"], Duration::from_secs(60)).expect_said(FINE);
}

#[test]
fn system_call_instructions_mean_what_they_mean_to_the_guest() {
    type Body = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    let cases: [(&str, Body, u32); 3] = [
        ("int 80h", |a| a.int(0x80), event(0x80)),
        // Not there: CPUID says so.
        ("syscall", |a| a.db(&[0x0f, 0x05]), event(6)),
        ("sysenter", |a| a.db(&[0x0f, 0x34]), event(6)),
    ];
    for (what, body, expected) in cases {
        println!("-- {what}");
        both(&kernel(body), |end| end.expect_said(expected));
        if what != "int 80h" {
            // The host's kernel takes them (SYSCALL on AMD) before anybody sees them, and forgets where they were:
            // some fault must come of it, and nothing else.
            user(body).run("interp", LIMIT).expect_said(expected);
            let end = user(body).run("raw", LIMIT);
            assert!(
                matches!(end.said(), Some(v) if v == event(6) || v == event(13) || v == event(14)),
                "{end:?}"
            );
        } else {
            both(&user(body), |end| end.expect_said(expected));
        }
    }
}

#[test]
fn what_tries_everything_is_told_the_same_by_both_engines() {
    for guest in guests(EVERY_NTH_SELECTOR) {
        println!("-- {}", guest.name);
        let [raw, interp] = ENGINES.map(|engine| guest.image.run(engine, Duration::from_secs(60)));
        guest.compare(("raw", &raw), ("interp", &interp));
    }
}
