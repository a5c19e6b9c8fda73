//! Hostile code of ring 3 in a keyed world jumps to every byte of the trampolines that load PKRU, in code of all three sizes and
//! with segments of its choice: what is ring 0's stays as it is.

use csam::{CodeMap, CodeSize, GuestLin, ScanOptions, SliceSource};
use host_driver_shim::code_memory::CodeMemory;
use host_driver_shim::ram::GuestRam;
use host_driver_shim::raw::{self, RawEngine, RawWorld};
use host_driver_shim::world::{
    Backing, HostSegment, HwRegs, KEYED_CODE, KEYED_CODE_SLOT, KEYED_DATA, KEYED_DATA_SLOT, Prot, World,
    WorldError, WorldExit, WorldLin,
};
use patm::{Config, Keys, Patm, UserPatcher, vcpu_page as page};
use subring_tests::cache::{self, SkipReason};

const USER: u32 = 0x0040_0000;
const STACK: u32 = 0x0060_0000;
/// In guest RAM, ring 0's page that nothing is to change.
const CANARY: u64 = 0x0070_0000;
/// Ring 0's page with its tables and its stack.
const TABLES: u32 = 0x0071_0000;
const STACK0: u32 = TABLES + 0x800;
const KERNEL: u32 = 0xc100_0100;
const STUB: u32 = 0xffc0_0000;
const VCPU: u32 = 0xffc0_1000;
const TRANSIT: u32 = 0xffc0_5000;
const USER_TRAMP: u32 = 0x0100_0000;
const SECRET: u32 = 0xc9c9_c9c9;
const HOST_CS: u16 = 0x23;
const HOST_CS64: u16 = 0x33;
/// LDT slots of ring 3's own segments: 16-bit code at one of the trampolines, data so that the vCPU page's offsets from there
/// are in ring 0's page.
const CODE16_SLOT: u16 = 100;
const ODD_DATA_SLOT: u16 = 101;
const ODD_DATA: u16 = ODD_DATA_SLOT << 3 | 7;
/// Data that begins with ring 0's page.
const NEAR_DATA_SLOT: u16 = 102;
const NEAR_DATA: u16 = NEAR_DATA_SLOT << 3 | 7;
/// Ring 3's code for the case that it is ring 0's by then.
const PROOF: u32 = USER + 0x100;
/// From where a trampoline loads PKRU to the end of its first store behind that.
const FIRST_STORE: u32 = 28;

/// Where in a trampoline PKRU is loaded.
fn wrpkru(trampoline: &[u8]) -> usize {
    trampoline.windows(3).position(|w| w == [0x0f, 0x01, 0xef]).unwrap()
}

/// mov eax, 14h; int 80h
const CALL: [u8; 7] = [0xb8, 0x14, 0, 0, 0, 0xcd, 0x80];

struct Rig {
    ram: GuestRam,
    code: CodeMemory,
    engine: RawEngine,
    trampolines: [(u32, Vec<u8>); 2],
    patch: Vec<u8>,
    /// Where worlds have [`CANARY`]: where the first trampoline, as 64-bit code, would have the vCPU page.
    canary: u32,
    /// Code memory of ring 3's page, ring 0's, and two for each trampoline.
    pages: [u64; 6],
}

fn config(tramp_base: u32) -> Config {
    let keys = Some(Keys { code: KEYED_CODE, data: KEYED_DATA, transit: TRANSIT });
    Config { tramp_base, tramp_len: 16 << 20, vcpu_base: VCPU, count_inline: true, ring: 3, keys }
}

fn scanned(bytes: &[u8], at: u32) -> CodeMap {
    let mut map = CodeMap::new(CodeSize::Bits32);
    let mut source = SliceSource { base: GuestLin(at), bytes };
    map.scan(GuestLin(at), &mut source, &ScanOptions::default());
    map
}

impl Rig {
    fn new() -> Rig {
        let ram = GuestRam::new(16 << 20).unwrap();
        let code = CodeMemory::new(4 << 20).unwrap();
        let engine = RawEngine::new(&ram, &code, None).unwrap();
        let fetch = |bytes: &'static [u8], base: u32| {
            move |at: GuestLin, buf: &mut [u8]| {
                let rest = at.0.checked_sub(base).and_then(|o| bytes.get(o as usize..)).unwrap_or(&[]);
                let n = rest.len().min(buf.len());
                buf[..n].copy_from_slice(&rest[..n]);
                n
            }
        };
        let mut users = UserPatcher::new(config(USER_TRAMP));
        let map = scanned(&CALL, USER);
        let patch = users.patch_int(1, &map, fetch(&CALL, USER), GuestLin(USER + 5)).unwrap();
        let entry = (patch.trampoline.at, patch.trampoline.code.clone());
        let window = patch.write.bytes.clone();
        const IRET: [u8; 5] = [0x90, 0x90, 0x90, 0x90, 0xcf];
        let mut kernels = Patm::new(config(patm::good_bases(0xc1).next().unwrap()));
        let map = scanned(&IRET, KERNEL);
        let fetch = fetch(&IRET, KERNEL);
        let info = patm::MapView { map: &map, fetch, writable: |_, _| true };
        let patch = kernels.patch(GuestLin(KERNEL + 4), &info).unwrap();
        let exit = patch.trampoline.clone().unwrap();
        let canary =
            (entry.0 + wrpkru(&entry.1) as u32 + FIRST_STORE).wrapping_add(VCPU + page::SCRATCH_SS) & !0xfff;
        let pages = std::array::from_fn(|_| code.alloc().unwrap());
        Rig { ram, code, engine, trampolines: [entry, (exit.at, exit.code)], patch: window, canary, pages }
    }

    /// A new world, and memory as it is at first.
    fn world(&self) -> RawWorld {
        let mut w = self.engine.spawn_keyed().unwrap();
        for (slot, segment) in [
            (KEYED_CODE_SLOT, HostSegment::flat(0, true)),
            (KEYED_DATA_SLOT, HostSegment::flat(0, false)),
            (ODD_DATA_SLOT, HostSegment::flat(self.canary.wrapping_sub(VCPU), false)),
            (NEAR_DATA_SLOT, HostSegment::flat(self.canary, false)),
        ] {
            w.set_segment(slot, segment).unwrap();
        }
        let code = |at: u32, offset: u64, who: Prot, w: &mut RawWorld| {
            w.map(WorldLin(at & !0xfff), 4096, Backing::Code(offset), Prot::READ | Prot::EXEC | who).unwrap();
        };
        let [user, kernel, ref trampolines @ ..] = self.pages;
        code(USER, user, Prot::USER, &mut w);
        code(KERNEL, kernel, Prot::empty(), &mut w);
        for ((at, _), offsets) in self.trampolines.iter().zip(trampolines.chunks(2)) {
            code(*at, offsets[0], Prot::empty(), &mut w);
            code(at + 4096, offsets[1], Prot::empty(), &mut w);
        }
        let ram = |at: u32, from: u64, who: Prot, w: &mut RawWorld| {
            let rights = Prot::READ | Prot::WRITE | who;
            w.map(WorldLin(at), 4096, Backing::Ram(from), rights).unwrap();
        };
        ram(STACK, STACK.into(), Prot::USER, &mut w);
        ram(self.canary, CANARY, Prot::empty(), &mut w);
        ram(TABLES, TABLES.into(), Prot::empty(), &mut w);
        w.place_gate(WorldLin(STUB), WorldLin(VCPU)).unwrap();
        w.place_transit(WorldLin(TRANSIT)).unwrap();
        self.restore(&mut w);
        w
    }

    /// What a page of code shows, and the next one if it goes on there; the rest is `hlt`.
    fn show(&self, page: usize, at: u32, bytes: &[u8]) {
        let mut shown = [0xf4; 8192];
        let from = (at & 0xfff) as usize;
        shown[from..from + bytes.len()].copy_from_slice(bytes);
        let pages = if from + bytes.len() > 4096 { 2 } else { 1 };
        for (offset, bytes) in self.pages[page..page + pages].iter().zip(shown.chunks(4096)) {
            self.code.write(*offset, bytes).unwrap();
        }
    }

    /// Memory and the vCPU page as they are while ring 3 runs.
    fn restore(&self, w: &mut RawWorld) {
        // mov dword [CANARY], 0badh
        let proof = [&[0xc7, 0x05][..], &self.canary.to_le_bytes(), &[0xad, 0x0b, 0, 0]].concat();
        let mut users = self.patch.clone();
        users.resize((PROOF - USER) as usize, 0xf4);
        users.extend(proof);
        self.show(0, USER, &users);
        // The transit page is what ring 3 makes of it.
        for (at, value) in [
            (page::TRANSIT_STACK, STACK + 0x800),
            (page::TRANSIT_STACK + 4, u32::from(KEYED_DATA)),
            (page::TRANSIT_CODE, PROOF),
            (page::TRANSIT_CODE + 4, u32::from(KEYED_CODE)),
        ] {
            w.vcpu_write(at, value);
        }
        // Ring 0's code only ends the run.
        self.show(1, KERNEL, &[]);
        for (page, (at, bytes)) in self.trampolines.iter().enumerate() {
            self.show(2 + 2 * page, *at, bytes);
        }
        self.ram.fill(CANARY, 4096, 0xc9).unwrap();
        self.ram.fill(u64::from(TABLES), 4096, 0xc9).unwrap();
        self.ram.fill(u64::from(STACK), 4096, 0).unwrap();
        let put = |at: u32, value: u32| {
            self.ram.write(u64::from(TABLES + at), &value.to_le_bytes()).unwrap();
        };
        // Descriptors of CS, SS, ring 3's, and the gate, which are never loaded here, only compared; the TSS.
        for at in (0..0x40).step_by(4) {
            put(at, at + 1);
        }
        put(0x104, STACK0);
        put(0x108, 0x68);
        for at in (0..0x1000).step_by(4) {
            if !(raw::GATE..raw::GATE + 6).contains(&at) {
                w.vcpu_write(at, SECRET);
            }
        }
        for (word, offset) in [
            (page::IRET_DESC_AT, 0),
            (page::KERNEL_SS_DESC_AT, 8),
            (page::USER_CS_DESC_AT, 16),
            (page::USER_SS_DESC_AT, 24),
            (page::GATE_AT, 32),
        ] {
            w.vcpu_write(word, TABLES + offset);
            w.vcpu_write(word + 4, offset + 1);
            w.vcpu_write(word + 8, offset + 5);
        }
        let flat = u32::from(KEYED_DATA);
        for (at, value) in [
            (page::CPL, 3),
            (page::IF_FLAG, 0x200),
            (page::HIDDEN_FLAGS, 0),
            (page::PENDING, 0),
            (page::REFILL, 0),
            (page::IRET_REFUSES, 0),
            (page::USER_CS, 0x73),
            (page::USER_SS, 0x7b),
            (page::USER_CS_HOST + 4, u32::from(KEYED_CODE)),
            (page::USER_SS_HOST + 4, flat),
            (page::GATE_READY, 1),
            (page::GATE_VECTOR, 0x80),
            (page::GATE_TARGET, KERNEL),
            (page::GATE_IF_MASK, 0),
            (page::GATE_CS, 0x60),
            (page::IRET_CS, 0x60),
            (page::TSS_ESP0_AT, TABLES + 0x104),
            (page::KERNEL_SS, 0x68),
            (page::KERNEL_SS_HOST + 4, flat),
            (page::KERNEL_CS_HOST + 4, u32::from(HOST_CS)),
        ] {
            w.vcpu_write(at, value);
        }
        for n in [0, 3, 4, 5] {
            w.vcpu_write(page::HOST_RING0 + 4 * n, flat);
            w.vcpu_write(page::HOST_RING3 + 4 * n, flat);
        }
    }

    /// What ring 3 cannot have changed: all of ring 0's memory but the frame on its stack.
    fn assert_untouched(&self, what: &str) {
        let mut bytes = vec![0; 4096];
        self.ram.read(CANARY, &mut bytes).unwrap();
        assert!(bytes.iter().all(|b| *b == 0xc9), "{what}: ring 0's page was written to");
        self.ram.read(u64::from(TABLES), &mut bytes).unwrap();
        let words = bytes.chunks(4).map(|w| u32::from_le_bytes(w.try_into().unwrap())).enumerate();
        for (i, word) in words {
            let at = 4 * i as u32;
            let expected = match at {
                0..0x40 => at + 1,
                0x104 => STACK0,
                0x108 => 0x68,
                _ => SECRET,
            };
            let frame = (STACK0 - TABLES - 20..STACK0 - TABLES).contains(&at);
            assert!(frame || word == expected, "{what}: {word:x} at {at:x} of ring 0's tables");
        }
    }
}

fn regs(eip: u32, sel: [u16; 6], eax: u32, canary: u32) -> HwRegs {
    // ECX and EDX are 0, as whoever loads PKRU must have them; the others point to ring 0's page.
    let gpr = [eax, 0, 0, canary, STACK + 0x800, canary, canary, canary];
    HwRegs { gpr, eip, eflags: 0x202, sel }
}

fn has_keys() -> bool {
    if let Some(why) = raw::keys::refusal() {
        cache::skip("keyed", &SkipReason(why));
        return false;
    }
    true
}

#[test]
fn a_system_call_arrives_and_its_way_back_ends_in_ring_3() {
    if !has_keys() {
        return;
    }
    let rig = Rig::new();
    let mut w = rig.world();
    let data = [KEYED_DATA, KEYED_CODE, KEYED_DATA, KEYED_DATA, KEYED_DATA, KEYED_DATA];
    let mut r = regs(USER, data, 0, rig.canary);
    let exit = w.run(&mut r).unwrap();
    assert_eq!((exit, r.eip), (WorldExit::Fault { vector: 13, error_code: 0, cr2: 0 }, KERNEL));
    assert_eq!((r.sel[1], r.gpr[0], r.gpr[4]), (HOST_CS, 0x14, STACK0 - 20));
    assert_eq!((r.gpr[1], r.gpr[2], r.gpr[3]), (0, 0, rig.canary));
    assert_eq!(w.vcpu_read(page::CPL), 0);
    let mut frame = [0u8; 20];
    rig.ram.read(u64::from(STACK0 - 20), &mut frame).unwrap();
    let frame: Vec<u32> = frame.chunks(4).map(|w| u32::from_le_bytes(w.try_into().unwrap())).collect();
    assert_eq!(frame, [USER + 7, SECRET, 0x202, STACK + 0x800, SECRET]);
    // Back: the frame's selectors are the guest's.
    for (at, value) in [(16, 0x73u32), (8, 0x7b)].map(|(below, value)| (STACK0 - below, value)) {
        let at = if value == 0x7b { STACK0 - 4 } else { at };
        rig.ram.write(u64::from(at), &value.to_le_bytes()).unwrap();
    }
    r.eip = rig.trampolines[1].0;
    let exit = w.run(&mut r).unwrap();
    assert_eq!((exit, r.eip), (WorldExit::Fault { vector: 13, error_code: 0, cr2: 0 }, USER + 7));
    assert_eq!((r.sel[1], r.gpr[0], r.gpr[4]), (KEYED_CODE, 0x14, STACK + 0x800));
    assert_eq!((r.gpr[1], r.gpr[2], r.gpr[3]), (0, 0, rig.canary));
    assert_eq!(w.vcpu_read(page::CPL), 3);
    // And it is ring 3 again: mov eax, [CANARY] faults there.
    r = regs(USER, data, 0, rig.canary);
    rig.show(0, USER, &[&[0xa1][..], &rig.canary.to_le_bytes()].concat());
    let exit = w.run(&mut r).unwrap();
    assert_eq!(exit, WorldExit::Fault { vector: 14, error_code: 5, cr2: rig.canary });
}

#[test]
fn no_byte_of_a_trampoline_is_a_way_to_ring_0s_memory() {
    if !has_keys() {
        return;
    }
    let rig = Rig::new();
    let mut w = rig.world();
    let (mut deaths, mut entries, mut others) = (0, 0, 0);
    for (at, bytes) in rig.trampolines.clone() {
        let wrpkru = wrpkru(&bytes);
        for offset in 0..bytes.len() {
            let near = offset.abs_diff(wrpkru) < 40;
            for code in [KEYED_CODE, HOST_CS, CODE16_SLOT << 3 | 7, HOST_CS64] {
                // Nearly all 64-bit code ends its world, which takes a while to replace.
                if code == HOST_CS64 && !near && offset % 8 != 0 {
                    continue;
                }
                for data in [KEYED_DATA, ODD_DATA, NEAR_DATA] {
                    for eax in if near { 0..4 } else { 0..1 } {
                        let offset = offset as u32;
                        let what = format!("{at:x}+{offset:x} as {code:x}, data {data:x}, eax {eax}");
                        rig.restore(&mut w);
                        let sel = [data, code, data, data, data, data];
                        let mut r = regs(at + offset, sel, eax, rig.canary);
                        if code == CODE16_SLOT << 3 | 7 {
                            // EIP is 16 bits wide there.
                            let segment = HostSegment { big: false, ..HostSegment::flat(at, true) };
                            w.set_segment(CODE16_SLOT, segment).unwrap();
                            r.eip = offset;
                            if data == NEAR_DATA {
                                (r.gpr[3], r.gpr[6], r.gpr[7]) = (0, 0, 0);
                            }
                        } else if code == HOST_CS64 {
                            // A far jump: `run` does not start 64-bit code.
                            let far = [&(at + offset).to_le_bytes()[..], &[HOST_CS64 as u8, 0]].concat();
                            rig.show(0, USER, &[&[0xea][..], &far].concat());
                            (r.eip, r.sel[1]) = (USER, KEYED_CODE);
                        }
                        let exit = w.run(&mut r);
                        rig.assert_untouched(&what);
                        match exit {
                            Err(WorldError::Died(_)) => {
                                deaths += 1;
                                w = rig.world();
                            }
                            Err(error) => panic!("{what}: {error}"),
                            Ok(_) if w.vcpu_read(page::CPL) == 0 => {
                                // A system call like any other: it arrives where all do.
                                assert_eq!((r.eip, r.sel[1]), (KERNEL, HOST_CS), "{what}");
                                entries += 1;
                            }
                            Ok(_) => {
                                assert!(!r.gpr.contains(&SECRET), "{what}: {r:x?}");
                                others += 1;
                            }
                        }
                    }
                }
            }
        }
    }
    println!("{deaths} worlds ended, {entries} system calls, {others} other exits");
    assert!(deaths > 100 && entries > 10 && others > 100);
}
