//! Keyed worlds: what ring 3 reaches in them even when it breaks out of its 32 bits and jumps into the runtime.

mod common;
use common::*;
use host_driver_shim::world::{Backing, HwRegs, KEYED_CODE, Prot, World, WorldError, WorldExit, WorldLin};

const RAM_VA: u64 = 0x2000_0000_0000;
const ARENA_VA: u64 = 0x1000_0000_0000;

/// A #PF of ring 3 at ring 0's page: present, user, and a write or not.
fn refused(write: bool) -> WorldExit {
    WorldExit::Fault { vector: 14, error_code: 5 | u32::from(write) << 1, cr2: KERNEL }
}

/// Runs this in a keyed world of its own, or the rest of the test is skipped.
fn run(code: &[u8]) -> Option<(Guest, HwRegs, Result<WorldExit, WorldError>)> {
    let mut g = Guest::keyed(code)?;
    let mut r = keyed_regs();
    let exit = g.world.run(&mut r);
    Some((g, r, exit))
}

fn is_untouched(g: &Guest) -> bool {
    let mut page = [0u8; 4096];
    g.ram.read(u64::from(KERNEL), &mut page).unwrap();
    page == [CANARY; 4096]
}

fn mov(opcode: u8, value: u32) -> Vec<u8> {
    [&[opcode][..], &value.to_le_bytes()].concat()
}

#[test]
fn ring_3_has_its_own_pages_and_no_others() {
    // mov [DATA], eax; mov eax, [DATA]; mov eax, [KERNEL]
    let own = [mov(0xa3, DATA), mov(0xa1, DATA), mov(0xa1, KERNEL)].concat();
    let Some((g, r, exit)) = run(&own) else { return };
    assert_eq!((exit.unwrap(), r.eip, r.sel[1]), (refused(false), CODE + 10, KEYED_CODE));
    assert!(is_untouched(&g));
    let (g, _, exit) = run(&mov(0xa3, KERNEL)).unwrap();
    assert_eq!(exit.unwrap(), refused(true));
    assert!(is_untouched(&g));
    // The same by the host's flat selectors: mov edx, 2bh; mov ds, edx; mov eax, [KERNEL]
    let (.., exit) = run(&[mov(0xba, 0x2b), vec![0x8e, 0xda], mov(0xa1, KERNEL)].concat()).unwrap();
    assert_eq!(exit.unwrap(), refused(false));
    // And in the host's code segment: jmp 23h:CODE+7; mov eax, [KERNEL]
    let far = [mov(0xea, CODE + 7), vec![0x23, 0], mov(0xa1, KERNEL)].concat();
    let (_, r, exit) = run(&far).unwrap();
    assert_eq!((exit.unwrap(), r.sel[1]), (refused(false), CS));
    // The vCPU page and the gate's code are not its own either.
    for at in [VCPU, STUB] {
        let (.., exit) = run(&mov(0xa1, at)).unwrap();
        assert!(matches!(exit.unwrap(), WorldExit::Fault { vector: 14, cr2, .. } if cr2 == at));
    }
}

#[test]
fn a_page_becomes_ring_3s_or_ceases_to_be() {
    let Some(mut g) = Guest::keyed(&mov(0xa1, KERNEL)) else { return };
    let mut show = |more: Prot| {
        let backing = Backing::Ram(u64::from(KERNEL));
        g.world.map(WorldLin(KERNEL), 4096, backing, Prot::READ | more).unwrap();
        let mut r = keyed_regs();
        g.world.run(&mut r).map(|exit| (exit, r.gpr[EAX])).unwrap()
    };
    // Behind the load there is nothing but filler.
    assert_eq!(show(Prot::USER), (GP, u32::from_le_bytes([CANARY; 4])));
    assert_eq!(show(Prot::empty()), (refused(false), 0));
}

#[test]
fn ring_0_reaches_both() {
    let Some(mut g) = Guest::keyed(&[mov(0xa1, KERNEL), mov(0xa3, DATA), vec![0xf4]].concat()) else {
        return;
    };
    g.world.vcpu_write(host_driver_shim::raw::rc_deliver::CPL, 0);
    let mut r = regs();
    assert_eq!((g.world.run(&mut r).unwrap(), r.eip), (GP, CODE + 10));
    assert_eq!(g.ram.read_u32(0x1000), Some(u32::from_le_bytes([CANARY; 4])));
}

#[test]
fn sixty_four_bit_code_reaches_nothing_more_and_ends_its_world() {
    for at in [u64::from(KERNEL), u64::from(VCPU), ARENA_VA, RAM_VA, ARENA_VA + 0x1000_0000] {
        for opcode in [0x8a, 0x88] {
            let code = [&[0x48, 0xb8][..], &at.to_le_bytes(), &[opcode, 0x00, 0xeb, 0xfe]].concat();
            let Some((g, _, exit)) = run(&escape(&code)) else { return };
            let Err(WorldError::Died(why)) = exit else { panic!("{at:x}: {exit:?}") };
            assert!(why.contains("left its 32-bit mode"), "{at:x}: {why}");
            assert!(is_untouched(&g));
        }
    }
}

/// Where [`jump_to`] says that it has come back: in ring 3's stack page, and in guest RAM.
const BACK: u32 = STACK - 0xf00;
const BACK_IN_RAM: u64 = 0x2100;
/// What it writes.
const CAME_BACK: u32 = 0x0bad_0bad;

/// 64-bit code: a jump to `at` with registers as an attacker would like them, and on its stack where `ret` or `iretq` would come
/// back. If one does, it says so, and writes to ring 0's page.
fn jump_to(at: u64, rax: u64, others: u64) -> Vec<u8> {
    const BEHIND: u8 = 0xa0;
    let imm64 = |opcode: [u8; 2], value: u64| [&opcode[..], &value.to_le_bytes()].concat();
    let mut c = Vec::new();
    // rbx, rbp, rsi, rdi, r8, r9
    for opcode in [[0x48, 0xbb], [0x48, 0xbd], [0x48, 0xbe], [0x48, 0xbf], [0x49, 0xb8], [0x49, 0xb9]] {
        c.extend(imm64(opcode, others));
    }
    c.extend(imm64([0x49, 0xbb], at)); // r11
    // push 2bh; mov eax, STACK - 200h; push rax; push 202h; push 33h; mov eax, back; push rax
    c.extend([0x6a, 0x2b]);
    c.extend([mov(0xb8, STACK - 0x200), vec![0x50], mov(0x68, 0x202), vec![0x6a, 0x33]].concat());
    c.extend([mov(0xb8, CODE + u32::from(BEHIND)), vec![0x50]].concat());
    c.extend(imm64([0x48, 0xb8], rax));
    c.extend([0x31, 0xc9, 0x31, 0xd2]); // xor ecx, ecx; xor edx, edx
    c.extend([0x41, 0xff, 0xe3]); // jmp r11
    let mut code = escape(&c);
    assert!(code.len() < usize::from(BEHIND));
    code.resize(usize::from(BEHIND), 0x90);
    // mov ebx, BACK; mov dword [rbx], ..; mov ebx, KERNEL; mov dword [rbx], ..
    for at in [BACK, KERNEL] {
        code.extend([mov(0xbb, at), vec![0xc7, 0x03], CAME_BACK.to_le_bytes().to_vec()].concat());
    }
    code.extend([0x0f, 0x0b]); // ud2
    code
}

/// At every byte around every place of the runtime that loads PKRU, makes system calls or returns from signals.
#[test]
fn who_jumps_into_the_runtime_by_himself_gets_nowhere() {
    let Some(first) = Guest::keyed(&[0x90]) else { return };
    let count = first.world.runtime_places().len();
    drop(first);
    let (mmap, sigreturn) = (libc::SYS_mmap as u64, libc::SYS_rt_sigreturn as u64);
    let mut back = Vec::new();
    for place in 0..count {
        for (rax, others) in [
            (0, u64::from(DATA)),
            (3, ARENA_VA),
            (libc::SYS_sched_yield as u64, 0),
            (mmap, 4096),
            (sigreturn, 0),
        ] {
            for offset in 0..24 {
                let mut g = Guest::keyed(&[]).unwrap();
                let at = g.world.runtime_places()[place] + offset;
                g.put(&jump_to(at, rax, others));
                let mut r = keyed_regs();
                r.gpr[ESP] = STACK - 0x400; // the runtime reads above its frame
                let exit = g.world.run(&mut r);
                assert!(
                    matches!(exit, Err(WorldError::Died(_))),
                    "place {place}+{offset}, rax {rax}: {exit:?}"
                );
                assert!(is_untouched(&g), "place {place}+{offset}, rax {rax}");
                if g.ram.read_u32(BACK_IN_RAM) == Some(CAME_BACK) {
                    back.push((place, offset));
                }
            }
        }
    }
    // Through `iretq` or `ret` of the runtime it may, still without ring 0's page; not behind a system call.
    assert!(back.contains(&(6, 0)), "{back:?}");
    assert!(!back.iter().any(|&(place, offset)| place == 8 || place == 7 && offset <= 2), "{back:?}");
}

/// A mapping of ring 0's page for itself is what an attacker would have the runtime make. Made it may be; used it is not.
#[test]
fn a_system_call_by_the_runtimes_own_instruction_is_the_last_thing_code_of_ring_3_does() {
    let Some(mut g) = Guest::keyed(&[]) else { return };
    let site = g.world.runtime_places()[7];
    let mut c = Vec::new();
    let flags = (libc::MAP_SHARED | libc::MAP_FIXED) as u64;
    let arguments = [u64::from(DATA), 4096, (libc::PROT_READ | libc::PROT_WRITE) as u64, flags];
    for (i, value) in arguments.into_iter().enumerate() {
        c.extend(argument(i, value));
    }
    // mov r8d, 3 (guest RAM); mov r9d, KERNEL; mov eax, mmap; mov r15, site; jmp r15
    c.extend([0x41, 0xb8, 3, 0, 0, 0, 0x41, 0xb9]);
    c.extend(KERNEL.to_le_bytes());
    c.extend(mov(0xb8, libc::SYS_mmap as u32));
    c.extend([0x49, 0xbf]);
    c.extend(site.to_le_bytes());
    c.extend([0x41, 0xff, 0xe7]);
    g.put(&escape(&c));
    let exit = g.world.run(&mut keyed_regs());
    let Err(WorldError::Died(why)) = exit else { panic!("{exit:?}") };
    assert!(why.contains("left its 32-bit mode"), "{why}");
    assert!(is_untouched(&g));
}

#[test]
fn kicks_reach_ring_3_and_ring_0_of_a_keyed_world() {
    for cpl in [3, 0] {
        let Some(mut g) = Guest::keyed(&[0x40, 0xeb, 0xfd]) else { return };
        g.world.vcpu_write(host_driver_shim::raw::rc_deliver::CPL, cpl);
        let kicker = g.world.kicker();
        let mut r = if cpl == 3 { keyed_regs() } else { regs() };
        let before = r;
        for round in 0..200 {
            let kicker = kicker.clone();
            let thread = std::thread::spawn(move || {
                std::thread::sleep(std::time::Duration::from_micros(round * 7));
                kicker.kick();
            });
            assert_eq!(g.run(&mut r), WorldExit::Kick);
            thread.join().unwrap();
            assert!((CODE..CODE + 3).contains(&r.eip), "{:x}", r.eip);
            assert_eq!((r.sel, r.gpr[ESP], r.gpr[ECX]), (before.sel, before.gpr[ESP], before.gpr[ECX]));
        }
        assert!(r.gpr[EAX] > 1000);
    }
}
