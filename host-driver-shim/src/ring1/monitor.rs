//! The monitor: what runs in ring 0 of the virtual machine, under guest code in rings 1 and 3.
//!
//! 1. [`Frame`]: the registers of the guest as the stubs leave them on the monitor's stack, the whole contract with the
//!    host's side.
//! 2. The assembly: an IDT stub for each vector, one way out (`out`), one way in (`iretd`), and between them the short cut:
//!    what guest ring 3 does for which the host has said where the guest's handler is ([`Reflect`]) goes there at once.
//! 3. Where its pages lie: the *region*, at the same place in every world. Its segments start at the region, so the
//!    code does not know where that is and can be moved by other descriptors.
//! 4. [`tables_page`]: GDT, IDT and TSS for a region at an address.
//!
//! For pages guest ring 1 is as good as ring 0. What keeps it out of the region is, first, that its data segments end
//! before it and its code segment is not readable; second, that all pages of the region are read-only but the stack's,
//! and on that nothing is believed that was not written after guest code stopped (`docs/decisions/0004-ring1.md`).

use std::mem::{offset_of, size_of};

use super::reflect::{EVENTS, Event, GUEST_FRAME, REFLECT_WORDS, Reflect};
use crate::raw::rc_deliver::{CPL, FIXED, HIDDEN_FLAGS, HOST_RING0, HOST_RING3, IF, IF_FLAG, IOPL, NATIVE};
use crate::raw::rc_deliver::{REFLECTED, SELECTORS, USER_ONLY};

/// The frame the stubs build, from its lowest address: what they push, then what the CPU does (SDM vol. 3, 6.12.1).
#[derive(Clone, Copy, Default, Debug)]
#[repr(C)]
pub(super) struct Frame {
    pub(super) cr2: u32,
    pub(super) gs: u32,
    pub(super) fs: u32,
    pub(super) es: u32,
    pub(super) ds: u32,
    pub(super) edi: u32,
    pub(super) esi: u32,
    pub(super) ebp: u32,
    /// ESP in the stub, as `pushad` has it.
    pub(super) own_esp: u32,
    pub(super) ebx: u32,
    pub(super) edx: u32,
    pub(super) ecx: u32,
    pub(super) eax: u32,
    pub(super) vector: u32,
    pub(super) error_code: u32,
    pub(super) eip: u32,
    pub(super) cs: u32,
    pub(super) eflags: u32,
    pub(super) esp: u32,
    pub(super) ss: u32,
}

/// Number of words of a [`Frame`].
pub(super) const FRAME_WORDS: usize = size_of::<Frame>() / 4;

/// Pages of the region, from its start: the code; GDT, IDT and TSS; control words and stack; the LDT.
pub(super) const CODE: u32 = 0;
pub(super) const TABLES: u32 = 0x1000;
pub(super) const STATE: u32 = 0x2000;
pub(super) const LDT: u32 = 0x3000;
/// Bytes of the LDT: the most an LDT can have.
pub(super) const LDT_LEN: u32 = 0x1_0000;
/// Bytes of the region.
pub(super) const REGION: u32 = LDT + LDT_LEN;

/// In the state page: the CR3 to load before guest code runs again, 0: keep the one that is loaded and its TLB.
pub(super) const NEW_CR3: u32 = STATE;
/// The top of the stack, where a frame of the guest ends.
pub(super) const STACK_TOP: u32 = LDT;
/// Where a frame of the guest begins.
pub(super) const FRAME: u32 = STACK_TOP - size_of::<Frame>() as u32;

/// Selectors of the GDT.
pub(super) const MONITOR_CS: u16 = 0x08;
pub(super) const MONITOR_DS: u16 = 0x10;
/// Flat code of guest ring 0. Both are execute-only: what is read through CS is the code view, not the guest's memory.
pub(super) const KERNEL_CS: u16 = 0x18 | 1;
/// Flat code of guest ring 3.
pub(super) const USER_CS: u16 = 0x20 | 3;
pub(super) const LDT_SELECTOR: u16 = 0x28;
pub(super) const TSS_SELECTOR: u16 = 0x30;
pub(super) const GDT_LEN: u32 = 0x38;
/// Bytes of a 32-bit TSS.
pub(super) const TSS_LEN: u32 = 104;
/// Where they are in the tables page.
pub(super) const IDT_AT: u32 = 0;
pub(super) const GDT_AT: u32 = 0x400;
pub(super) const TSS_AT: u32 = 0x800;
/// Where [`Reflect`] is.
pub(super) const REFLECT_AT: u32 = 0x900;

/// The vector of the doorbell, the only interrupt there is.
pub(super) const DOORBELL: u8 = 32;
/// IDT entries: the exceptions and the doorbell. `int n` for others is beyond the limit and #GP.
const VECTORS: u32 = 33;
/// Bytes of the IDT.
pub(super) const IDT_LEN: u32 = VECTORS * 8;
/// Bytes from stub to stub.
const STUB_LEN: u32 = 16;
/// Exceptions for which the CPU pushes an error code (SDM vol. 3, table 6-1; 29 and 30: APM vol. 2, table 8-1).
const WITH_ERROR_CODE: u32 =
    1 << 8 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 17 | 1 << 21 | 1 << 29 | 1 << 30;

/// The port an exit is written to, and what is written: the frame is that of guest code.
pub(super) const PORT: u16 = 0xf4;
pub(super) const EXIT_GUEST: u8 = 0;
/// The state could not be loaded.
pub(super) const EXIT_BAD_STATE: u8 = 1;

std::arch::global_asm!(
    ".pushsection .rodata.subring_ring1, \"a\"",
    ".balign 16",
    ".hidden subring_ring1_start",
    ".globl subring_ring1_start",
    ".hidden subring_ring1_resume",
    ".globl subring_ring1_resume",
    ".hidden subring_ring1_end",
    ".globl subring_ring1_end",
    ".code32",
    // EDX: a table entry the host knows, as [`Table`]; leaves by the way out unless the guest has the same there.
    ".macro subring_ring1_check",
    "mov esi, dword ptr ss:[edx]",
    "mov eax, [esi]",
    "cmp eax, dword ptr ss:[edx + 4]",
    "jne 9f",
    "mov eax, [esi + 4]",
    "cmp eax, dword ptr ss:[edx + 8]",
    "jne 9f",
    ".endm",
    "subring_ring1_start:",
    // The stubs: error code (0 where the CPU pushes none), vector.
    ".set subring_ring1_v, 0",
    ".rept {vectors}",
    ".balign {stub}, 0xcc",
    ".if (subring_ring1_v == 32) || ((({with_code}) >> (subring_ring1_v & 31)) & 1) == 0",
    ".byte 0x6a, 0",
    ".endif",
    ".byte 0x6a, subring_ring1_v",
    "jmp 2f",
    ".set subring_ring1_v, subring_ring1_v + 1",
    ".endr",
    // The way out.
    "2:",
    "pushad",
    // push ds; push es; push fs; push gs: the assembler would make them 16 bits wide.
    ".byte 0x1e, 0x06, 0x0f, 0xa0, 0x0f, 0xa8",
    "mov eax, cr2",
    "push eax",
    "test byte ptr [esp + {cs}], 3",
    "jz 4f",
    // The short cut, if the host has told of this event. Until the commit nothing of the guest's has changed but what lies
    // below its stack, and any fault leads to the way out. ECX: what the host has told.
    "cmp word ptr [esp + {cs}], {user_cs}",
    "jne 9f",
    "mov ecx, {r} + {r_events}",
    "5:",
    "mov eax, [esp + {vector}]",
    "cmp eax, dword ptr ss:[ecx + {e_vector}]",
    "jne 6f",
    "mov eax, [esp + {error}]",
    "cmp eax, dword ptr ss:[ecx + {e_error}]",
    "je 7f",
    "6:",
    "add ecx, {event_len}",
    "cmp ecx, {r} + {r_events} + {events} * {event_len}",
    "jne 5b",
    "jmp 9f",
    "7:",
    "test dword ptr [esp + {eflags}], {user_only}",
    "jnz 9f",
    "movzx eax, word ptr [esp + {ss}]",
    "cmp eax, dword ptr ss:[{r} + {r_user_ss}]",
    "jne 9f",
    ".globl subring_ring1_try",
    ".hidden subring_ring1_try",
    "subring_ring1_try:",
    // DS: guest data as ring 0 sees it. EBX: the vCPU page there.
    "mov eax, dword ptr ss:[{r} + {r_ss_host}]",
    "mov ds, eax",
    "mov ebx, dword ptr ss:[{r} + {r_vcpu}]",
    "cmp dword ptr [ebx + {cpl}], 3",
    "jne 9f",
    // `int n` has no prefix, so that what is behind it is two bytes further on.
    "mov edx, dword ptr ss:[ecx + {e_instruction}]",
    "test edx, edx",
    "jz 5f",
    "mov esi, [esp + {eip}]",
    "sub esi, dword ptr ss:[{r} + {r_base}]",
    "cmp word ptr [esi], dx",
    "jne 9f",
    "5:",
    // The data segments are those we know.
    "mov ax, [esp + {es}]",
    "cmp ax, [ebx + {host_ring3}]",
    "jne 9f",
    "mov ax, [esp + {ds}]",
    "cmp ax, [ebx + {host_ring3} + 12]",
    "jne 9f",
    "mov ax, [esp + {fs}]",
    "cmp ax, [ebx + {host_ring3} + 16]",
    "jne 9f",
    "mov ax, [esp + {gs}]",
    "cmp ax, [ebx + {host_ring3} + 20]",
    "jne 9f",
    // The guest's tables say what the host found in them.
    "lea edx, [ecx + {e_gate}]",
    "subring_ring1_check",
    "mov edx, {r} + {r_cs_descriptor}",
    "subring_ring1_check",
    "mov edx, {r} + {r_ss_descriptor}",
    "subring_ring1_check",
    // EDI: ring 0's stack, with room for the frame, and away from ours.
    "mov esi, dword ptr ss:[{r} + {r_tss}]",
    "movzx eax, word ptr [esi + 4]",
    "cmp eax, dword ptr ss:[{r} + {r_ss}]",
    "jne 9f",
    "mov edi, [esi]",
    "sub edi, {guest_frame}",
    "jb 9f",
    "cmp edi, dword ptr ss:[{r} + {r_last}]",
    "ja 9f",
    // SS, ESP, EFLAGS, CS, EIP.
    "mov eax, [ebx + {selectors} + 8]",
    "mov [edi + 16], eax",
    "mov eax, [esp + {esp}]",
    "mov [edi + 12], eax",
    "mov eax, [esp + {eflags}]",
    "and eax, {native}",
    "mov edx, [ebx + {hidden}]",
    "and edx, {iopl}",
    "or eax, edx",
    "or eax, dword ptr ss:[ecx + {e_flags}]",
    "mov [edi + 8], eax",
    "mov eax, [ebx + {selectors} + 4]",
    "mov [edi + 4], eax",
    "mov eax, [esp + {eip}]",
    "add eax, dword ptr ss:[ecx + {e_behind}]",
    "mov [edi], eax",
    // Ring 0's selectors for the same segments can be loaded: the page is the guest's to write.
    "mov ebp, [ebx + {host_ring0} + 12]",
    "mov es, ebp",
    "mov edx, [ebx + {host_ring0}]",
    "mov es, edx",
    "mov esi, [ebx + {host_ring0} + 16]",
    "mov fs, esi",
    "mov eax, [ebx + {host_ring0} + 20]",
    "mov gs, eax",
    ".globl subring_ring1_commit",
    ".hidden subring_ring1_commit",
    "subring_ring1_commit:",
    "mov [esp + {gs}], eax",
    "mov [esp + {fs}], esi",
    "mov [esp + {es}], edx",
    "mov [esp + {ds}], ebp",
    "mov [esp + {esp}], edi",
    "and dword ptr [esp + {eflags}], {native}",
    "or dword ptr [esp + {eflags}], {fixed} + {int_flag}",
    "mov dword ptr [esp + {cs}], {kernel_cs}",
    "mov eax, dword ptr ss:[{r} + {r_ss_host}]",
    "mov [esp + {ss}], eax",
    "mov eax, dword ptr ss:[ecx + {e_target}]",
    "mov [esp + {eip}], eax",
    "mov eax, dword ptr ss:[{r} + {r_ss}]",
    "mov [ebx + {selectors} + 8], eax",
    "mov eax, dword ptr ss:[{r} + {r_cs}]",
    "mov [ebx + {selectors} + 4], eax",
    "mov eax, dword ptr ss:[ecx + {e_if_mask}]",
    "and [ebx + {if_flag}], eax",
    "and dword ptr [ebx + {hidden}], {iopl}",
    "mov dword ptr [ebx + {cpl}], 0",
    "inc dword ptr [ebx + {reflected}]",
    "jmp 3f",
    "9:",
    "mov al, {exit_guest}",
    "out {port}, al",
    // The way in: the frame is the host's.
    "subring_ring1_resume:",
    "mov esp, {frame}",
    "mov eax, dword ptr ss:[{new_cr3}]",
    "test eax, eax",
    "jz 3f",
    "mov cr3, eax",
    "3:",
    "pop eax",
    // pop gs; pop fs; pop es; pop ds
    ".byte 0x0f, 0xa9, 0x0f, 0xa1, 0x07, 0x1f",
    "popad",
    "add esp, 8",
    "iretd",
    // A fault in the monitor. Of the short cut: the guest's frame still is where it was, and the host's to look at.
    "4:",
    // mov eax, [esp + eip]; sub eax, the short cut's begin; cmp eax, its length
    "mov eax, [esp + {eip}]",
    ".byte 0x2d",
    ".long subring_ring1_try - subring_ring1_start",
    ".byte 0x3d",
    ".long subring_ring1_commit - subring_ring1_try",
    "jae 8f",
    "mov esp, {frame}",
    "jmp 9b",
    // Of the way in: the host is told, and brings another frame.
    "8:",
    "mov al, {exit_bad}",
    "out {port}, al",
    "jmp subring_ring1_resume",
    "subring_ring1_end:",
    ".code64",
    ".popsection",
    vectors = const VECTORS,
    stub = const STUB_LEN,
    with_code = const WITH_ERROR_CODE,
    vector = const offset_of!(Frame, vector),
    error = const offset_of!(Frame, error_code),
    eip = const offset_of!(Frame, eip),
    cs = const offset_of!(Frame, cs),
    eflags = const offset_of!(Frame, eflags),
    esp = const offset_of!(Frame, esp),
    ss = const offset_of!(Frame, ss),
    es = const offset_of!(Frame, es),
    ds = const offset_of!(Frame, ds),
    fs = const offset_of!(Frame, fs),
    gs = const offset_of!(Frame, gs),
    r = const TABLES + REFLECT_AT,
    r_events = const offset_of!(Reflect, events),
    events = const EVENTS,
    event_len = const size_of::<Event>(),
    e_vector = const offset_of!(Event, vector),
    e_error = const offset_of!(Event, error),
    e_instruction = const offset_of!(Event, instruction),
    e_behind = const offset_of!(Event, behind),
    e_flags = const offset_of!(Event, flags),
    e_gate = const offset_of!(Event, gate),
    e_target = const offset_of!(Event, target),
    e_if_mask = const offset_of!(Event, if_mask),
    r_ss_host = const offset_of!(Reflect, ss_host),
    r_base = const offset_of!(Reflect, base),
    r_vcpu = const offset_of!(Reflect, vcpu),
    r_user_ss = const offset_of!(Reflect, user_ss_host),
    r_cs_descriptor = const offset_of!(Reflect, cs_descriptor),
    r_ss_descriptor = const offset_of!(Reflect, ss_descriptor),
    r_tss = const offset_of!(Reflect, tss_esp0),
    r_last = const offset_of!(Reflect, stack_last),
    r_ss = const offset_of!(Reflect, ss),
    r_cs = const offset_of!(Reflect, cs),
    guest_frame = const GUEST_FRAME,
    user_cs = const USER_CS,
    kernel_cs = const KERNEL_CS,
    user_only = const USER_ONLY,
    native = const NATIVE,
    fixed = const FIXED,
    int_flag = const IF,
    iopl = const IOPL,
    cpl = const CPL,
    if_flag = const IF_FLAG,
    hidden = const HIDDEN_FLAGS,
    selectors = const SELECTORS,
    host_ring0 = const HOST_RING0,
    host_ring3 = const HOST_RING3,
    reflected = const REFLECTED,
    exit_guest = const EXIT_GUEST,
    exit_bad = const EXIT_BAD_STATE,
    port = const PORT,
    frame = const FRAME,
    new_cr3 = const NEW_CR3,
);

unsafe extern "C" {
    static subring_ring1_start: u8;
    static subring_ring1_resume: u8;
    static subring_ring1_end: u8;
}

/// The monitor's code.
pub(super) fn code() -> &'static [u8] {
    let (start, end) = (&raw const subring_ring1_start, &raw const subring_ring1_end);
    // SAFETY: both labels are of one read-only section, the end behind the start; the bytes never change.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

/// Where the way in begins, relative to the region.
pub(super) fn resume() -> u32 {
    CODE + ((&raw const subring_ring1_resume).addr() - (&raw const subring_ring1_start).addr()) as u32
}

/// A segment as descriptors and KVM's segment registers have it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Descriptor {
    pub(super) base: u32,
    /// In units of the granularity, 20 bits.
    pub(super) limit: u32,
    /// The type field, 4 bits.
    pub(super) kind: u8,
    /// Code or data.
    pub(super) s: bool,
    pub(super) dpl: u8,
    /// D/B.
    pub(super) big: bool,
    /// Limit counts pages.
    pub(super) pages: bool,
}

impl Descriptor {
    /// The eight bytes (SDM vol. 3, 3.4.5), present.
    pub(super) fn bytes(&self) -> u64 {
        let (base, limit) = (u64::from(self.base), u64::from(self.limit & 0xf_ffff));
        let access = u64::from(self.kind) | u64::from(self.s) << 4 | u64::from(self.dpl) << 5 | 1 << 7;
        limit & 0xffff
            | (base & 0xff_ffff) << 16
            | access << 40
            | (limit >> 16) << 48
            | u64::from(self.big) << 54
            | u64::from(self.pages) << 55
            | (base >> 24) << 56
    }

    /// The other way round; `None`: not present.
    pub(super) fn from_bytes(bytes: u64) -> Option<Descriptor> {
        let bit = |n: u32| bytes >> n & 1 != 0;
        bit(47).then_some(Descriptor {
            base: (bytes >> 16 & 0xff_ffff) as u32 | (bytes >> 56 << 24) as u32,
            limit: (bytes & 0xffff) as u32 | (bytes >> 32 & 0xf_0000) as u32,
            kind: (bytes >> 40 & 0xf) as u8,
            s: bit(44),
            dpl: (bytes >> 45 & 3) as u8,
            big: bit(54),
            pages: bit(55),
        })
    }
}

/// The monitor's own code segment for a region at `at`.
pub(super) fn monitor_cs(at: u32) -> Descriptor {
    Descriptor { base: at, limit: REGION - 1, kind: 0xb, s: true, dpl: 0, big: true, pages: false }
}

/// Its data and stack segment.
pub(super) fn monitor_ds(at: u32) -> Descriptor {
    Descriptor { kind: 3, ..monitor_cs(at) }
}

/// The LDT of the worlds.
pub(super) fn ldt(at: u32) -> Descriptor {
    Descriptor { base: at + LDT, limit: LDT_LEN - 1, kind: 2, s: false, dpl: 0, big: false, pages: false }
}

/// The TSS. `kind` 9 is an available, 11 a busy one.
pub(super) fn tss(at: u32, kind: u8) -> Descriptor {
    Descriptor { base: at + TABLES + TSS_AT, limit: TSS_LEN - 1, kind, ..ldt(at) }
}

/// GDT, IDT and TSS for a region at `at`.
pub(super) fn tables_page(at: u32) -> Vec<u8> {
    let mut page = vec![0; 4096];
    let mut put = |offset: u32, bytes: &[u8]| {
        page[offset as usize..][..bytes.len()].copy_from_slice(bytes);
    };
    // Types with the accessed bit set: the page is read-only.
    let flat =
        |kind, dpl| Descriptor { base: 0, limit: 0xf_ffff, kind, s: true, dpl, big: true, pages: true };
    let gdt = [
        (MONITOR_CS, monitor_cs(at)),
        (MONITOR_DS, monitor_ds(at)),
        (KERNEL_CS, flat(9, 1)),
        (USER_CS, flat(9, 3)),
        (LDT_SELECTOR, ldt(at)),
        (TSS_SELECTOR, tss(at, 11)),
    ];
    for (selector, descriptor) in gdt {
        put(GDT_AT + u32::from(selector & !7), &descriptor.bytes().to_le_bytes());
    }
    for vector in 0..VECTORS {
        // `int3` and `into` are allowed in every ring, `int n` for the others is #GP.
        let dpl: u64 = if matches!(vector, 3 | 4) { 3 } else { 0 };
        let offset = u64::from(CODE + vector * STUB_LEN);
        let gate =
            offset & 0xffff | u64::from(MONITOR_CS) << 16 | (0x8e | dpl << 5) << 40 | (offset >> 16) << 48;
        put(IDT_AT + vector * 8, &gate.to_le_bytes());
    }
    put(TSS_AT + 4, &STACK_TOP.to_le_bytes());
    put(TSS_AT + 8, &u32::from(MONITOR_DS).to_le_bytes());
    // No I/O permission map: it would start behind the limit.
    put(TSS_AT + 102, &(TSS_LEN as u16).to_le_bytes());
    page
}

const _: () = {
    assert!(size_of::<Frame>() == 80 && offset_of!(Frame, eip) == 60);
    assert!(IDT_AT + IDT_LEN <= GDT_AT && GDT_AT + GDT_LEN <= TSS_AT && TSS_AT + TSS_LEN <= REFLECT_AT);
    assert!(REFLECT_AT as usize + 4 * REFLECT_WORDS <= 4096);
};

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Code, Decoder, DecoderOptions, Instruction};

    fn decode(at: u32) -> Vec<Instruction> {
        let code = code();
        let mut d = Decoder::with_ip(32, &code[at as usize..], u64::from(at), DecoderOptions::NONE);
        d.iter().collect()
    }

    #[test]
    fn every_stub_pushes_two_words_or_what_the_cpu_did_not_and_goes_the_common_way() {
        let mut common = None;
        for vector in 0..VECTORS {
            let mut i = decode(vector * STUB_LEN).into_iter();
            let mut first = i.next().unwrap();
            if vector == 32 || WITH_ERROR_CODE >> vector & 1 == 0 {
                assert_eq!((first.code(), first.immediate8()), (Code::Pushd_imm8, 0));
                first = i.next().unwrap();
            }
            assert_eq!((first.code(), u32::from(first.immediate8())), (Code::Pushd_imm8, vector));
            let jump = i.next().unwrap();
            assert!(jump.is_jmp_short_or_near() && jump.next_ip() <= u64::from((vector + 1) * STUB_LEN));
            assert_eq!(*common.get_or_insert(jump.near_branch_target()), jump.near_branch_target());
        }
    }

    #[test]
    fn the_way_in_takes_a_frame_apart_as_the_way_out_builds_it() {
        let slots = |from: u32, end: Code, step: &dyn Fn(&Instruction) -> usize| -> usize {
            decode(from).iter().take_while(|i| i.code() != end).map(step).sum()
        };
        let pops = |i: &Instruction| match i.code() {
            Code::Popad => 8,
            Code::Pop_r32 | Code::Popd_FS | Code::Popd_GS | Code::Popd_DS | Code::Popd_ES => 1,
            Code::Add_rm32_imm8 => i.immediate8() as usize / 4,
            _ => 0,
        };
        // `iretd` takes EIP, CS, EFLAGS, ESP and SS.
        assert_eq!(slots(resume(), Code::Iretd, &pops) + 5, FRAME_WORDS);
        let pushes = |i: &Instruction| match i.code() {
            Code::Pushad => 8,
            Code::Push_r32 | Code::Pushd_FS | Code::Pushd_GS | Code::Pushd_DS | Code::Pushd_ES => 1,
            _ => 0,
        };
        let common = decode(0)[2].near_branch_target() as u32;
        // Error code and vector are the stubs', the rest the CPU's.
        assert_eq!(slots(common, Code::Out_imm8_AL, &pushes) + 2 + 5, FRAME_WORDS);
    }

    #[test]
    fn no_other_instruction_touches_memory_but_the_stack_segments_and_what_the_guest_lent() {
        use iced_x86::{InstructionInfoFactory, Register};
        let mut factory = InstructionInfoFactory::new();
        for i in decode(0).iter().filter(|i| i.code() != Code::INVALID) {
            for m in factory.info(i).used_memory() {
                // In the short cut: the vCPU page, the guest's tables, its stack.
                let lent = matches!(m.base(), Register::EBX | Register::ESI | Register::EDI);
                assert_eq!(m.segment(), if lent { Register::DS } else { Register::SS }, "{i}");
            }
        }
        assert!(code().len() < 4096, "one page");
    }

    #[test]
    fn descriptors_are_as_the_manual_draws_them() {
        assert_eq!(tables_page(0)[GDT_AT as usize + 0x20..][..8], 0x00cf_f900_0000_ffffu64.to_le_bytes());
        assert_eq!(tables_page(0)[GDT_AT as usize + 0x18..][..8], 0x00cf_b900_0000_ffffu64.to_le_bytes());
        let d = monitor_cs(0x1234_5000).bytes();
        assert_eq!(d, 0x1241_9b34_5000_2fff);
        for d in [monitor_cs(0x1234_5000), ldt(0xfff0_0000), tss(0x89ab_c000, 9)] {
            assert_eq!(Descriptor::from_bytes(d.bytes()), Some(d));
        }
        assert_eq!(Descriptor::from_bytes(0), None);
    }
}
