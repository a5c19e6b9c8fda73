//! Tiny guests that misbehave: builds their images, runs them as a user would, and says how they ended.

use crate::harness::{Guest, subring_binary};
use iced_x86::IcedError;
use iced_x86::code_asm::{CodeAssembler, dx, eax};
use std::process::Command;
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Where an image begins, and where it is entered.
pub const LOAD: u32 = 0x10_0000;
/// Ring-0 code of the test proper.
pub const KERNEL: u32 = 0x11_0000;
/// Ring-3 code of the test proper.
pub const USER: u32 = 0x12_0000;
/// A page directory, where paging is wanted.
pub const PAGE_DIRECTORY: u32 = 0x20_0000;
/// From here on tests have memory of their own.
pub const FREE: u32 = 0x40_0000;
const GDT: u32 = 0x10_2000;
const IDT: u32 = 0x10_3000;
const TSS: u32 = 0x10_4000;
/// What the gates of [`Image::kernel`] lead to, 32 bytes a vector.
pub const STUBS: u32 = 0x10_5000;
/// Where ring 0's stack begins.
pub const KERNEL_STACK: u32 = 0x10_f000;
/// Top of the ring-3 stack.
pub const USER_STACK: u32 = 0x12_f000;

/// Selectors of the guests' GDT.
pub const CODE0: u32 = 0x08;
/// Ring-0 data.
pub const DATA0: u32 = 0x10;
/// Ring-3 code.
pub const CODE3: u32 = 0x1b;
/// Ring-3 data.
pub const DATA3: u32 = 0x23;

/// The port that ends a run with a value.
pub const EXIT_PORT: u16 = 0x501;
/// A guest's word for: all is as it should be.
pub const FINE: u32 = 0x200;
/// A guest's word for: that was wrong.
pub const WRONG: u32 = 0x300;

/// What an exception or interrupt with this vector ends in.
#[must_use]
pub const fn event(vector: u32) -> u32 {
    0x100 + vector
}

/// The bytes of a raw binary from [`LOAD`] on.
#[derive(Clone, Default)]
pub struct Image {
    bytes: Vec<u8>,
}

/// Assembles 32-bit code for address `at`.
///
/// # Panics
/// When the code does not assemble.
pub fn assemble(at: u32, f: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut a = CodeAssembler::new(32).expect("32 bits are fine");
    f(&mut a).expect("the instructions exist");
    a.assemble(u64::from(at)).expect("the code assembles")
}

/// Ends the run with `value`.
pub fn finish(a: &mut CodeAssembler, value: u32) -> Result<(), IcedError> {
    a.mov(eax, value)?;
    a.mov(dx, u32::from(EXIT_PORT))?;
    a.out(dx, eax)?;
    a.cli()?;
    a.hlt()
}

/// Jumps out of the code to an absolute address.
pub fn jump(a: &mut CodeAssembler, at: u32) -> Result<(), IcedError> {
    a.jmp(u64::from(at))
}

impl Image {
    /// The bytes as a file would hold them.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Puts bytes at a physical address.
    pub fn put(&mut self, at: u32, data: &[u8]) -> &mut Image {
        let from = (at - LOAD) as usize;
        if self.bytes.len() < from + data.len() {
            self.bytes.resize(from + data.len(), 0);
        }
        self.bytes[from..from + data.len()].copy_from_slice(data);
        self
    }

    /// Puts a word at a physical address.
    pub fn word(&mut self, at: u32, value: u32) -> &mut Image {
        self.put(at, &value.to_le_bytes())
    }

    /// Puts code at its address.
    pub fn code(
        &mut self,
        at: u32,
        f: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) -> &mut Image {
        let bytes = assemble(at, f);
        self.put(at, &bytes)
    }

    /// Nothing but these bytes, entered with the boot state.
    #[must_use]
    pub fn bare(bytes: &[u8]) -> Image {
        Image { bytes: bytes.to_vec() }
    }

    /// A kernel with GDT, TSS and an IDT whose every gate ends the run with [`event`]; it goes on at [`KERNEL`].
    #[must_use]
    pub fn kernel() -> Image {
        let mut image = Image::default();
        let gdt: [u64; 6] = [
            0,
            0x00cf_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00cf_fb00_0000_ffff,
            0x00cf_f300_0000_ffff,
            0x0000_8900_0000_0067 | u64::from(TSS) << 16,
        ];
        for (i, descriptor) in gdt.iter().enumerate() {
            image.put(GDT + 8 * i as u32, &descriptor.to_le_bytes());
        }
        for vector in 0..256 {
            let stub = STUBS + 0x20 * vector;
            image.code(stub, |a| finish(a, event(vector)));
            image.word(IDT + 8 * vector, CODE0 << 16 | stub & 0xffff);
            image.word(IDT + 8 * vector + 4, (stub & 0xffff_0000) | 0xee00);
        }
        image.word(TSS + 4, KERNEL_STACK).word(TSS + 8, DATA0).word(TSS + 100, 0x68 << 16);
        image.put(LOAD + 0x800, &pointer(GDT, 47)).put(LOAD + 0x810, &pointer(IDT, 0x7ff));
        let mut start: Vec<u8> = vec![
            0x0f, 0x01, 0x15, 0x00, 0x08, 0x10, 0x00, // lgdt [LOAD + 800h]
            0x0f, 0x01, 0x1d, 0x10, 0x08, 0x10, 0x00, // lidt [LOAD + 810h]
            0xea, 0x15, 0x00, 0x10, 0x00, 0x08, 0x00, // jmp 8:next
        ];
        let next = LOAD + start.len() as u32;
        start.extend(assemble(next, |a| {
            use iced_x86::code_asm::*;
            a.mov(eax, DATA0)?;
            a.mov(ds, eax)?;
            a.mov(es, eax)?;
            a.mov(ss, eax)?;
            a.mov(esp, KERNEL_STACK)?;
            a.mov(eax, 0x28u32)?;
            a.ltr(ax)?;
            jump(a, KERNEL)
        }));
        image.put(LOAD, &start);
        image
    }

    /// A kernel that goes to ring 3 at [`USER`].
    #[must_use]
    pub fn user() -> Image {
        let mut image = Image::kernel();
        image.code(KERNEL, enter_user);
        image
    }

    /// Identity maps all 4 GiB by large pages that ring 3 may use, too, and lets the kernel turn paging on before
    /// it goes on at `then`.
    pub fn paging(&mut self, then: u32) -> &mut Image {
        for i in 0..1024u32 {
            self.word(PAGE_DIRECTORY + 4 * i, i << 22 | 0x87);
        }
        self.code(KERNEL, |a| {
            paging_on(a)?;
            jump(a, then)
        })
    }

    /// Runs the image.
    #[must_use]
    pub fn run(&self, engine: &str, limit: Duration) -> End {
        self.run_with(engine, &[], limit)
    }

    /// Runs the image with more options. If it has not ended after `limit`, SIGTERM ends it.
    ///
    /// # Panics
    /// When the run neither ends by itself nor by SIGTERM, or the monitor panicked, or a world was left over.
    #[must_use]
    pub fn run_with(&self, engine: &str, options: &[&str], limit: Duration) -> End {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let file = std::env::temp_dir().join(format!("subring-hostile-{}-{number}", std::process::id()));
        std::fs::write(&file, &self.bytes).expect("the temporary directory can be written");
        let mut command = Command::new(subring_binary());
        command.args(BEFORE_IMAGE).arg(&file).args(AFTER_IMAGE);
        command.args(["--engine", engine]).args(options);
        let end = run_command(command, limit);
        let _ = std::fs::remove_file(&file);
        end
    }
}

/// The operand of LGDT and LIDT.
#[must_use]
pub fn pointer(base: u32, limit: u16) -> [u8; 6] {
    let mut p = [0; 6];
    p[..2].copy_from_slice(&limit.to_le_bytes());
    p[2..].copy_from_slice(&base.to_le_bytes());
    p
}

/// Large pages, paging, write protection on.
pub fn paging_on(a: &mut CodeAssembler) -> Result<(), IcedError> {
    use iced_x86::code_asm::*;
    a.mov(eax, PAGE_DIRECTORY)?;
    a.mov(cr3, eax)?;
    a.mov(eax, 0x10u32)?;
    a.mov(cr4, eax)?;
    a.mov(eax, cr0)?;
    a.or(eax, 0x8001_0000u32)?;
    a.mov(cr0, eax)
}

/// Loads DS, ES, FS and GS; EAX is lost.
pub fn data_segments(a: &mut CodeAssembler, selector: u32) -> Result<(), IcedError> {
    use iced_x86::code_asm::*;
    a.mov(eax, selector)?;
    for segment in [ds, es, fs, gs] {
        a.mov(segment, eax)?;
    }
    Ok(())
}

/// To ring 3 at [`USER`], interrupts off.
pub fn enter_user(a: &mut CodeAssembler) -> Result<(), IcedError> {
    data_segments(a, DATA3)?;
    a.push(DATA3)?;
    a.push(USER_STACK)?;
    a.push(2u32)?;
    a.push(CODE3)?;
    a.push(USER)?;
    a.iretd()
}

/// How a run ended.
#[derive(Debug)]
pub struct End {
    /// The exit code.
    pub code: i32,
    /// Everything that was printed.
    pub console: String,
    /// SIGTERM was needed.
    pub stopped: bool,
}

impl End {
    /// What the guest said to the exit port, if that ended the run with a failure.
    #[must_use]
    pub fn said(&self) -> Option<u32> {
        let (_, rest) = self.console.split_once("reported failure (0x")?;
        u32::from_str_radix(rest.split_once(' ')?.0, 16).ok()
    }

    /// The guest ended the run with `value`.
    ///
    /// # Panics
    /// When it did not.
    #[track_caller]
    pub fn expect_said(&self, value: u32) {
        assert_eq!(self.said(), Some(value), "expected {value:#x}: {self:?}");
        assert_eq!(self.code, 5, "{self:?}");
    }

    /// The guest was stopped with exit code 3, and the dump has what a dump must have.
    ///
    /// # Panics
    /// When it was not.
    #[track_caller]
    pub fn expect_fatal(&self, reason: &str) {
        assert_eq!(self.code, 3, "{self:?}");
        let first = self.console.lines().find(|l| l.starts_with("subring: guest fatal: "));
        assert!(first.is_some_and(|l| l.contains(reason)), "no {reason:?} in the first line: {self:?}");
        for part in ["eip=", "cr3=", "cs="] {
            assert!(self.console.contains(part), "the dump lacks {part}: {self:?}");
        }
    }

    /// One line, and this exit code.
    ///
    /// # Panics
    /// When it is otherwise.
    #[track_caller]
    pub fn expect_line(&self, code: i32, part: &str) {
        assert_eq!(self.code, code, "{self:?}");
        assert_eq!(self.console.lines().count(), 1, "{self:?}");
        assert!(
            self.console.starts_with("subring: ") && self.console.contains(part),
            "no {part:?}: {self:?}"
        );
    }

    /// Did not end by itself, and SIGTERM ended it.
    ///
    /// # Panics
    /// When it is otherwise.
    #[track_caller]
    pub fn expect_stopped(&self) {
        assert!(self.stopped && self.code == 130, "{self:?}");
    }
}

/// What `subring run` wants before an image's file and after it.
pub const BEFORE_IMAGE: [&str; 2] = ["run", "--raw"];
/// See [`BEFORE_IMAGE`].
pub const AFTER_IMAGE: [&str; 3] = ["--load-addr", "0x100000", "--isa-debug-exit"];

/// Runs a command that is, or becomes, subring.
///
/// # Panics
/// As [`Image::run_with`].
#[must_use]
pub fn run_command(command: Command, limit: Duration) -> End {
    adopt_orphans();
    let mut guest = Guest::spawn_command(command);
    let mut stopped = false;
    let code = match guest.try_wait_exit(limit) {
        Ok(code) => code,
        Err(_) => {
            stopped = true;
            wait_for_handler(guest.id());
            let pid = nix::unistd::Pid::from_raw(guest.id().cast_signed());
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
            guest.wait_exit(Duration::from_secs(60))
        }
    };
    let _ = guest.try_expect("\u{0}the end of the console", Duration::from_secs(30));
    let console = guest.console();
    assert!(!console.contains("panicked"), "the monitor panicked: {console}");
    assert!(code != 101 && code < 131, "exit code {code}: {console}");
    no_world_is_left();
    End { code, console, stopped }
}

/// Waits until the program takes SIGTERM itself, which may come late on a host that is busy; a program that never does, is let go on.
fn wait_for_handler(pid: u32) {
    const SIGTERM: u64 = 1 << (libc::SIGTERM - 1);
    let deadline = Instant::now() + Duration::from_secs(30);
    while Instant::now() < deadline {
        // Fields of proc_pid_status(5): masks of the signals that are blocked and that are caught.
        let Ok(status) = std::fs::read_to_string(format!("/proc/{pid}/status")) else { return };
        let takes = |line: &str| {
            let mask = line.strip_prefix("SigBlk:").or_else(|| line.strip_prefix("SigCgt:"));
            mask.and_then(|m| u64::from_str_radix(m.trim(), 16).ok()).is_some_and(|m| m & SIGTERM != 0)
        };
        if status.lines().any(takes) {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// From here on this process is the parent of every orphan below it.
fn adopt_orphans() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        nix::sys::prctl::set_child_subreaper(true).expect("a process may adopt its descendants");
    });
}

/// No world whose monitor is gone is still alive: such a world would be our child now.
fn no_world_is_left() {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let left = orphaned_worlds();
        if left.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "worlds outlive their monitor: {left:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn orphaned_worlds() -> Vec<u32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").expect("there is /proc").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        let Some((_, fields)) = stat.rsplit_once(") ") else { continue };
        let mut fields = fields.split(' ');
        let (state, parent) = (fields.next(), fields.next().and_then(|p| p.parse::<u32>().ok()));
        if state == Some("Z") || parent != Some(std::process::id()) {
            continue;
        }
        if std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|c| c.starts_with(b"subring-world")) {
            found.push(pid);
        }
    }
    found
}
