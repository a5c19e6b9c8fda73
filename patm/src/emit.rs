//! The emitter: trampoline bytes and, with each instruction, the guest state its boundary stands for.
//!
//! Bytes are position independent until [`Emitter::finish`] is told the address; the length never depends on it.

use crate::map::{EipMap, Finish, Fix, Point};
use crate::patch::{Keys, LongGate};
use crate::vcpu_page as page;
use alloc::vec::Vec;
use csam::pkru::loader_in;

pub(crate) const EAX: u8 = 0;
pub(crate) const ECX: u8 = 1;
pub(crate) const EDX: u8 = 2;
pub(crate) const ESP: u8 = 4;

/// Condition codes as in the opcode (SDM Vol. 2, B.1.4.7).
#[derive(Clone, Copy)]
pub(crate) enum Cond {
    Equal = 4,
    NotEqual = 5,
    BelowOrEqual = 6,
    Above = 7,
}

/// A place in the trampoline that may not be emitted yet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Label(usize);

#[derive(Clone, Copy)]
enum Target {
    Guest(u32),
    Label(Label),
}

struct Reloc {
    /// Offset of the field.
    offset: usize,
    field: Field,
    target: Target,
}

/// How an instruction names its target.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Field {
    /// An 8-bit displacement, which ends the instruction.
    Short,
    /// The same with 32 bits.
    Near,
    /// The 32-bit address.
    Absolute,
}

/// A way out of line: undo what the fast path did, then leave by the gate.
struct Slow {
    label: Label,
    state: Fix,
    reason: u32,
    /// SS holds the ring-0 stack segment and must be given back its ring-3 one.
    user_stack: bool,
}

pub(crate) struct Emitter {
    vcpu: u32,
    code: Vec<u8>,
    map: EipMap,
    relocs: Vec<Reloc>,
    labels: Vec<Option<u32>>,
    slow: Vec<Slow>,
    /// Where the transit page is, in a keyed world.
    transit: Option<u32>,
    /// Offsets of the instructions that load PKRU and are meant to. In a keyed world there must be no others.
    pkru: Vec<usize>,
    /// The CPL of the code the trampoline stands for, if it is not only ring 0's.
    cpl: Option<u8>,
    /// What the state before the next instruction stands for.
    pub(crate) state: Fix,
}

impl Emitter {
    pub(crate) fn new(vcpu: u32, cpl: Option<u8>) -> Self {
        Self {
            vcpu,
            code: Vec::new(),
            map: EipMap::default(),
            relocs: Vec::new(),
            labels: Vec::new(),
            slow: Vec::new(),
            transit: None,
            pkru: Vec::new(),
            cpl,
            state: Fix::default(),
        }
    }

    /// For worlds where ring 3 can jump into the trampoline and must find nothing that loads PKRU but [`Self::wrpkru`].
    pub(crate) fn keyed(mut self, keys: Option<Keys>) -> Self {
        self.transit = keys.map(|keys| keys.transit);
        self
    }

    /// Loads PKRU.
    pub(crate) fn wrpkru(&mut self) {
        self.pkru.push(self.code.len());
        self.op(&[0x0f, 0x01, 0xef]);
    }

    /// The linear address of a word of the vCPU page or the transit page.
    fn place(&self, offset: u32) -> u32 {
        match (self.transit, offset.checked_sub(page::TRANSIT)) {
            (Some(transit), Some(into)) => transit.wrapping_add(into),
            _ => self.vcpu.wrapping_add(offset),
        }
    }

    fn here(&self) -> u32 {
        self.code.len() as u32
    }

    /// The state is exactly the guest's, at `eip`.
    pub(crate) fn at(&self, eip: u32) -> Fix {
        Fix { resume: eip, cpl: self.cpl, ..Fix::default() }
    }

    /// The guest instruction at `eip` starts here.
    pub(crate) fn begin(&mut self, eip: u32) {
        self.state = self.at(eip);
        let here = self.here();
        let n = self.map.starts.partition_point(|s| s.0 < eip);
        self.map.starts.insert(n, (eip, here));
    }

    /// From here on the current instruction has taken effect.
    pub(crate) fn commit(&mut self, next: u32) {
        self.state.resume = next;
        self.state.committed = true;
    }

    /// One instruction.
    pub(crate) fn op(&mut self, bytes: &[u8]) {
        self.map.points.push(Point { offset: self.here(), fix: self.state });
        self.code.extend_from_slice(bytes);
    }

    /// One instruction in pieces.
    pub(crate) fn op_parts(&mut self, parts: &[&[u8]]) {
        self.op(&[]);
        for part in parts {
            self.code.extend_from_slice(part);
        }
    }

    /// `opcode reg, ss:[vcpu + offset]`.
    pub(crate) fn page_op(&mut self, opcode: &[u8], reg: u8, offset: u32) {
        let disp = self.place(offset).to_le_bytes();
        self.op_parts(&[&[0x36], opcode, &[(reg & 7) << 3 | 5], &disp]);
    }

    /// `mov reg, ss:[vcpu + offset]`.
    pub(crate) fn load(&mut self, reg: u8, offset: u32) {
        self.page_op(&[0x8b], reg, offset);
    }

    /// `mov ss:[vcpu + offset], reg`.
    pub(crate) fn store(&mut self, offset: u32, reg: u8) {
        self.page_op(&[0x89], reg, offset);
    }

    /// `mov dword ss:[vcpu + offset], value`.
    pub(crate) fn store_imm(&mut self, offset: u32, value: u32) {
        let disp = self.place(offset).to_le_bytes();
        self.op_parts(&[&[0x36, 0xc7, 0x05], &disp, &value.to_le_bytes()]);
    }

    /// `mov esp, vcpu + offset`.
    pub(crate) fn point_esp_at(&mut self, offset: u32) {
        self.op_parts(&[&[0xb8 | ESP], &self.place(offset).to_le_bytes()]);
    }

    /// `test byte ss:[vcpu + offset], mask`.
    pub(crate) fn test_page_byte(&mut self, offset: u32, mask: u8) {
        let disp = self.place(offset).to_le_bytes();
        self.op_parts(&[&[0x36, 0xf6, 0x05], &disp, &[mask]]);
    }

    /// `opcode reg, ss:[ecx*2 + vcpu + offset]`: an entry of the segment cache when ECX is selector & ~7.
    pub(crate) fn cache_op(&mut self, opcode: &[u8], reg: u8, offset: u32) {
        let disp = self.vcpu.wrapping_add(page::SEGMENT_CACHE).wrapping_add(offset).to_le_bytes();
        self.op_parts(&[&[0x36], opcode, &[(reg & 7) << 3 | 4, 0x4d], &disp]);
    }

    /// `test byte ss:[ecx*2 + vcpu + offset], mask`, likewise.
    pub(crate) fn cache_test_byte(&mut self, offset: u32, mask: u8) {
        let disp = self.vcpu.wrapping_add(page::SEGMENT_CACHE).wrapping_add(offset).to_le_bytes();
        self.op_parts(&[&[0x36, 0xf6, 0x04, 0x4d], &disp, &[mask]]);
    }

    /// `operation dword ss:[vcpu + offset], value` with the operation as in ModRM.reg of opcode 81h.
    pub(crate) fn page_imm(&mut self, operation: u8, offset: u32, value: u32) {
        let disp = self.place(offset).to_le_bytes();
        self.op_parts(&[&[0x36, 0x81, operation << 3 | 5], &disp, &value.to_le_bytes()]);
    }

    /// `cmp dword ss:[vcpu + offset], value`.
    pub(crate) fn cmp_imm(&mut self, offset: u32, value: u32) {
        self.page_imm(7, offset, value);
    }

    /// Keeps the guest's `reg` in its scratch slot; it may be clobbered afterwards.
    pub(crate) fn save(&mut self, reg: u8) {
        self.store(page::SCRATCH + 4 * u32::from(reg), reg);
        self.state.restore.insert(reg);
    }

    /// Gives `reg` its guest value back.
    pub(crate) fn restore(&mut self, reg: u8) {
        self.load(reg, page::SCRATCH + 4 * u32::from(reg));
        self.state.restore.remove(reg);
    }

    /// Keeps the arithmetic flags. EAX must have been saved.
    pub(crate) fn save_flags(&mut self) {
        self.op(&[0x9f]); // lahf
        self.op(&[0x0f, 0x90, 0xc0]); // seto al
        self.store(page::SCRATCH_FLAGS, EAX);
        self.state.restore_flags = true;
    }

    /// Gives the arithmetic flags back. EAX must still be saved.
    pub(crate) fn restore_flags(&mut self) {
        self.load(EAX, page::SCRATCH_FLAGS);
        self.op(&[0x04, 0x7f]); // add al, 7fh: OF from bit 0
        self.op(&[0x9e]); // sahf
        self.state.restore_flags = false;
    }

    pub(crate) fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    pub(crate) fn bind(&mut self, label: Label) {
        let here = self.here();
        if let Some(slot) = self.labels.get_mut(label.0) {
            *slot = Some(here);
        }
    }

    fn reloc(&mut self, field: Field, target: Target) {
        self.relocs.push(Reloc { offset: self.code.len(), field, target });
        self.code.extend_from_slice(if field == Field::Short { &[0] } else { &[0; 4] });
    }

    /// `jcc rel32` to a label.
    pub(crate) fn jcc(&mut self, cond: Cond, label: Label) {
        self.op(&[0x0f, 0x80 | cond as u8]);
        self.reloc(Field::Near, Target::Label(label));
    }

    /// A branch with an 8-bit displacement to a label.
    pub(crate) fn short_branch(&mut self, opcode: &[u8], label: Label) {
        self.op(opcode);
        self.reloc(Field::Short, Target::Label(label));
    }

    /// A branch with a 32-bit displacement to a guest EIP (or what stands for it in this trampoline).
    pub(crate) fn guest_branch(&mut self, opcode: &[u8], eip: u32) {
        self.op(opcode);
        self.reloc(Field::Near, Target::Guest(eip));
    }

    /// Leaves through the gate with this reason word. Touches no register and no flag.
    pub(crate) fn gate(&mut self, reason: u32) {
        self.store_imm(page::GATE_REASON, reason);
        self.page_op(&[0xff], 5, page::GATE);
    }

    /// Leaves by a gate in 64-bit code, with `next` in R8D; R9 is clobbered, nothing else.
    pub(crate) fn long_gate(&mut self, gate: LongGate, next: u32) {
        let long = self.label();
        self.op(&[0xea]); // jmp far selector:long
        self.reloc(Field::Absolute, Target::Label(long));
        self.code.extend_from_slice(&gate.selector.to_le_bytes());
        self.bind(long);
        // 64-bit code: nothing the map knows about.
        self.code.extend_from_slice(&gate.exit_code(next));
    }

    /// A label that undoes everything done since `begin` and leaves through the gate.
    pub(crate) fn slow_path(&mut self, reason: u32) -> Label {
        let label = self.label();
        self.slow.push(Slow { label, state: self.state, reason, user_stack: false });
        label
    }

    /// The same from where SS holds the ring-0 stack segment though the state is ring 3's.
    pub(crate) fn slow_path_to_user_stack(&mut self, reason: u32) -> Label {
        let label = self.label();
        self.slow.push(Slow { label, state: self.state, reason, user_stack: true });
        label
    }

    /// Adds one to a counter of the vCPU page; the state is the guest's before and after.
    pub(crate) fn count(&mut self, counter: u32) {
        let offset = page::COUNTERS + 4 * (counter % page::COUNTERS_LEN);
        self.save(EDX);
        self.load(EDX, offset);
        self.op(&[0x8d, 0x52, 0x01]); // lea edx, [edx + 1]
        self.store(offset, EDX);
        self.restore(EDX);
    }

    /// Emits what goes out of line. Must be last.
    pub(crate) fn flush_slow_paths(&mut self) {
        for slow in core::mem::take(&mut self.slow) {
            debug_assert!(slow.state.finish == Finish::Nothing && slow.state.esp_add == 0);
            self.bind(slow.label);
            self.state = slow.state;
            if slow.user_stack {
                self.load(EAX, page::USER_SS_HOST + 4);
                self.op(&[0x8e, 0xd0]); // mov ss, eax
            }
            if self.state.restore_flags {
                self.restore_flags();
            }
            for reg in self.state.restore.iter() {
                self.restore(reg);
            }
            self.gate(slow.reason);
        }
    }

    pub(crate) fn len(&self) -> u32 {
        self.here()
    }

    /// The bytes for a trampoline at EIP `at`. None if a short branch does not reach (an error in a sequence), or if bytes of
    /// the guest's or of an address would load PKRU.
    pub(crate) fn finish(mut self, at: u32) -> Option<(Vec<u8>, EipMap)> {
        for reloc in &self.relocs {
            let end = reloc.offset + if reloc.field == Field::Short { 1 } else { 4 };
            let target = match reloc.target {
                Target::Label(label) => at.wrapping_add((*self.labels.get(label.0)?)?),
                Target::Guest(eip) => match self.map.forward(eip) {
                    Some(offset) => at.wrapping_add(offset),
                    None => eip,
                },
            };
            let rel = target.wrapping_sub(at.wrapping_add(end as u32));
            let field = self.code.get_mut(reloc.offset..end)?;
            match reloc.field {
                Field::Near => field.copy_from_slice(&rel.to_le_bytes()),
                Field::Absolute => field.copy_from_slice(&target.to_le_bytes()),
                Field::Short => field.copy_from_slice(&i8::try_from(rel.cast_signed()).ok()?.to_le_bytes()),
            }
        }
        let loads = self.transit.and_then(|_| loader_in(&self.code, |at| self.pkru.contains(&at)));
        loads.is_none().then_some((self.code, self.map))
    }
}
