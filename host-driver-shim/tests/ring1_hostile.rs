//! A guest in ring 1 or 3 that does what it likes: the monitor's pages stay what they are, and the next guest code runs.
//!
//! The code here is not scanned: it is what a guest could run at worst.

mod common_ring1;
use common_ring1::*;
use host_driver_shim::ring1::Ring1Engine;
use host_driver_shim::world::{HwRegs, Kicker, World, WorldExit};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// The monitor is as it was and guest code runs as ever.
fn unharmed(g: &mut Guest, after: &str) {
    assert!(g.engine.is_intact(), "the monitor's pages changed after {after}");
    // mov eax, 42; push eax; pop ecx; hlt
    let (exit, r) = g.run_code(&[0xb8, 42, 0, 0, 0, 0x50, 0x59, 0xf4]);
    assert_eq!((exit, r.gpr[ECX], r.eip), (GP, 42, CODE + 7), "after {after}");
}

/// Kicks a world every so often, for code that does not end.
struct Alarm(Arc<AtomicBool>, Option<std::thread::JoinHandle<()>>);

impl Alarm {
    fn every(pause: Duration, g: &Guest) -> Alarm {
        Alarm::of(pause, g.world.kicker())
    }

    fn of(pause: Duration, kicker: Arc<dyn Kicker>) -> Alarm {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                std::thread::sleep(pause);
                kicker.kick();
            }
        });
        Alarm(stop, Some(thread))
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
        if let Some(thread) = self.1.take() {
            let _ended = thread.join();
        }
    }
}

#[test]
fn no_selector_but_null_and_its_own_can_be_loaded() {
    in_both_rings(|mut g| {
        // mov ds, eax; hlt
        g.put(&[0x8e, 0xd8, 0xf4]);
        for selector in 0..=0xffffu32 {
            let mut r = g.regs();
            r.gpr[EAX] = selector;
            let exit = g.run(&mut r);
            let own = selector & !3 == u32::from(g.ds()) & !3 && selector & 3 <= u32::from(g.ring);
            if selector & !3 == 0 || own {
                assert_eq!((exit, r.eip), (GP, CODE + 2), "{selector:x}");
            } else {
                let refused = WorldExit::Fault { vector: 13, error_code: selector & !3, cr2: 0 };
                let absent = WorldExit::Fault { vector: 11, error_code: selector & !3, cr2: 0 };
                assert!(exit == refused || exit == absent, "{selector:x}: {exit:?}");
                assert_eq!((r.eip, r.sel[3]), (CODE, g.ds()));
            }
        }
        unharmed(&mut g, "every selector");
    });
}

#[test]
fn no_far_transfer_leads_to_the_monitor() {
    in_both_rings(|mut g| {
        let resume_like = 0x220u32;
        for opcode in [0xea, 0x9a] {
            for selector in (0..0x100u32).chain([0x4000, 0x4007, 0xffff]) {
                // jmp or call far selector:offset
                let mut code = vec![opcode];
                code.extend(resume_like.to_le_bytes());
                code.extend((selector as u16).to_le_bytes());
                let (exit, r) = g.run_code(&code);
                assert_eq!(r.sel[1] & 3, u16::from(g.ring), "{selector:x}: {exit:?}");
            }
        }
        for vector in 0..=255u8 {
            let (exit, r) = g.run_code(&[0xcd, vector]);
            let expected = match vector {
                3 | 4 => WorldExit::Fault { vector, error_code: 0, cr2: 0 },
                _ => WorldExit::Fault { vector: 13, error_code: u32::from(vector) * 8 + 2, cr2: 0 },
            };
            assert_eq!((exit, r.sel[1]), (expected, g.cs()), "int {vector}");
        }
        unharmed(&mut g, "far transfers");
    });
}

#[test]
fn every_opcode_of_one_and_two_bytes_leaves_the_monitor_alone() {
    in_both_rings(|mut g| {
        let alarm = Alarm::every(Duration::from_millis(20), &g);
        let start = END - Ring1Engine::segment_rules().hole;
        let mut code = Vec::new();
        for op in 0..=0xffu8 {
            // Register, memory and other forms of group opcodes by their /digit.
            for modrm in [0x00u8, 0xc8, 0x17, 0x1f, 0x27, 0xef, 0x37, 0xf8] {
                code.push(vec![op, modrm, 0, 0, 0, 0, 0, 0]);
                code.push(vec![0x0f, op, modrm, 0, 0, 0, 0, 0, 0]);
            }
        }
        for bytes in code {
            let mut page = vec![0xf4; 64];
            page[..bytes.len()].copy_from_slice(&bytes);
            g.put(&page);
            let mut r = HwRegs { eflags: 0x302, ..g.regs() };
            // Pointers into the region's writable page.
            for i in [0, 3, 5, 6, 7] {
                r.gpr[i] = (start + 0x2f00).wrapping_sub(if g.ring == 1 { END } else { 0 });
            }
            r.gpr[ECX] = 3;
            let result = g.world.run(&mut r);
            assert!(result.is_ok(), "{bytes:x?}: {result:?}");
            assert!(matches!(r.sel[1] & 3, 1 | 3), "{bytes:x?}: {r:x?}");
            if r.sel[1] & 3 != u16::from(g.ring) {
                panic!("{bytes:x?} changed the ring: {r:x?}");
            }
        }
        drop(alarm);
        // A kick may be left over.
        let mut r = g.regs();
        let _kick = g.run(&mut r);
        unharmed(&mut g, "every opcode");
    });
}

#[test]
fn the_whole_address_space_is_the_guests_own_or_nothing() {
    in_both_rings(|mut g| {
        let start = END - Ring1Engine::segment_rules().hole;
        // or dword [edi], 0: reads and writes; hlt
        g.put(&[0x83, 0x0f, 0x00, 0xf4]);
        let step = (0..0x800u32).map(|i| i << 21);
        for at in step.chain([CODE, DATA, STACK - 0x1000, STUB, VCPU]).chain((start..END).step_by(0x1000)) {
            let mut r = g.regs();
            r.gpr[7] = g.data(at);
            let exit = g.run(&mut r);
            let mine = [DATA, STACK - 0x1000, VCPU].contains(&at) && r.eip == CODE + 3;
            match exit {
                GP if mine => {}
                GP if r.eip == CODE && (start..END).contains(&at) => {} // the limit
                // Where limits are not looked at (TCG): the stack's page, which nobody believes.
                GP if g.ring == 1 && at == start + 0x2000 => {}
                WorldExit::Fault { vector: 14, cr2, .. } if cr2 == at && r.eip == CODE => {}
                other => panic!("{at:x}: {other:?}, {r:x?}"),
            }
        }
        unharmed(&mut g, "the whole address space");
    });
}

#[test]
fn an_iret_with_nt_set_is_the_monitor_processs_to_look_into() {
    in_both_rings(|mut g| {
        // iretd
        g.put(&[0xcf]);
        let mut r = HwRegs { eflags: 0x4202, ..g.regs() };
        let exit = g.run(&mut r);
        assert!(matches!(exit, WorldExit::Fault { vector: 10 | 13, .. }), "{exit:?}");
        assert_eq!((r.eip, r.sel[1]), (CODE, g.cs()));
        unharmed(&mut g, "iret with NT");
    });
}

#[test]
fn a_storm_of_signals_and_kicks_loses_no_register() {
    in_both_rings(|mut g| {
        // inc eax; add ecx, 2; jmp $-4
        g.put(&[0x40, 0x83, 0xc1, 0x02, 0xeb, 0xfa]);
        // Kicks of another world interrupt KVM_RUN and are not this world's business.
        let other = g.engine.spawn_world().unwrap();
        let storm = Alarm::of(Duration::from_micros(200), other.kicker());
        let alarm = Alarm::every(Duration::from_millis(2), &g);
        let mut r = g.regs();
        for _ in 0..100 {
            assert_eq!(g.run(&mut r), WorldExit::Kick);
            let behind = u32::from(r.eip == CODE + 1);
            assert!([CODE, CODE + 1, CODE + 4].contains(&r.eip), "{r:x?}");
            assert_eq!(r.gpr[ECX], (r.gpr[EAX].wrapping_sub(behind)).wrapping_mul(2), "{r:x?}");
        }
        drop((alarm, storm));
    });
}
