//! Fault accounting: every exit, trap, interpreted instruction and injected event, by cause, instruction, site and
//! route, with time.
//!
//! 1. [`Account`] counts while the guest runs; recording is one look-up in a small hash table.
//! 2. [`Stats`] is the same as plain data, written as JSON (docs/stats-format.md) and read back by `subring report`.
//! 3. [`report`] prints the tables, [`symbols`] names the sites.

pub mod report;
mod stats;
pub mod symbols;

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasherDefault, Hasher};

use iced_x86::Mnemonic;

pub use stats::{ExitLine, InjectedLine, InlineLine, STATS_VERSION, Stats, StatsError, TrapSiteLine};

/// Declares an enum whose variants have names in reports.
macro_rules! named_enum {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        #[repr(u8)]
        pub enum $name { $($(#[$vdoc])* $variant,)* }

        impl $name {
            /// All of them in declaration order.
            pub const ALL: &'static [$name] = &[$($name::$variant,)*];
            /// The name in reports and in JSON.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $($name::$variant => $text,)* }
            }
        }
    };
}

named_enum! {
    /// Why the guest did not just go on.
    Cause {
        /// A sensitive or privileged instruction.
        Sensitive = "sensitive",
        /// Code that was not scanned yet was about to execute.
        Scan = "scan",
        /// A page the guest has mapped was not in the shadow.
        ShadowFault = "shadow-fault",
        /// A fault the guest itself must see.
        GuestFault = "guest-fault",
        /// A write to a page that has a code view.
        CodeWrite = "code-write",
        /// An access to memory-mapped I/O or to a hole.
        Mmio = "mmio",
        /// An access to the low linear addresses the host does not let us map.
        LowMemory = "low-memory",
        /// An interrupt became deliverable (the doorbell was touched).
        Interrupt = "interrupt",
        /// Another thread asked for attention.
        Kick = "kick",
        /// A system call instruction of guest user code.
        Syscall = "syscall",
        /// Ring-0 code about to execute that the scan had not proven (must stay zero).
        Unscanned = "unscanned",
        /// HLT.
        Halt = "halt",
        /// Port input or output.
        PortIo = "port-io",
        /// A control, debug or model-specific register was written.
        ControlRegister = "control-register",
        /// The guest switched address spaces.
        AddressSpace = "address-space",
        /// A segment register load or a descriptor that was not in place.
        Segment = "segment",
        /// CPUID.
        Cpuid = "cpuid",
        /// A mode the engine does not run natively: real mode, V86, 16-bit code.
        Mode = "mode",
        /// A stale code copy was executed after the guest changed the code.
        StaleCode = "stale-code",
        /// A fault inside a trampoline that had to be rolled forward or back.
        InPatch = "in-patch",
        /// The guest's segment limits or types made the host raise what the guest must see differently.
        SegmentLimit = "segment-limit",
        /// An instruction the hypervisor's own emulator does not know.
        Emulation = "emulation",
        /// The guest CPU shut down.
        Shutdown = "shutdown",
        /// Something else.
        Other = "other",
    }
}

named_enum! {
    /// Which way it took.
    Route {
        /// Completed inside a trampoline.
        InLine = "in-line",
        /// Left through a trampoline by far jump.
        FarExit = "far-exit",
        /// Left by a host fault, which arrives as a signal.
        Signal = "signal",
        /// Left a virtual machine of the host's.
        VmExit = "vm-exit",
        /// The interpreter executed it without leaving native code first.
        Interpreter = "interpreter",
    }
}

/// What kind of instruction it was: a mnemonic, or none.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Kind(u16);

impl Kind {
    /// No instruction to blame (a kick, an interrupt), or it was not decoded.
    pub const NONE: Kind = Kind(0);

    /// The instruction's name in Intel syntax, lower case; `-` for none.
    #[must_use]
    pub fn name(self) -> String {
        match Mnemonic::try_from(usize::from(self.0)) {
            Ok(Mnemonic::INVALID) | Err(_) => "-".into(),
            Ok(mnemonic) => format!("{mnemonic:?}").to_ascii_lowercase(),
        }
    }
}

impl From<Mnemonic> for Kind {
    fn from(mnemonic: Mnemonic) -> Self {
        Kind(mnemonic as u16)
    }
}

/// Count and time of one key.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Tally {
    /// How often.
    pub count: u64,
    /// How long in all, in nanoseconds.
    pub ns: u64,
}

/// Hashes a packed key: one multiplication, folded (Fibonacci hashing); the keys are not the guest's to choose in a
/// way that would matter, as the table is bounded.
#[derive(Default)]
struct PackedHasher(u64);

impl Hasher for PackedHasher {
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(self.0 ^ u64::from(byte));
        }
    }
    fn write_u64(&mut self, key: u64) {
        let product = u128::from(key) * 0x9e37_79b9_7f4a_7c15;
        self.0 = (product as u64) ^ ((product >> 64) as u64);
    }
    fn finish(&self) -> u64 {
        self.0
    }
}

/// The key of one tally: EIP in bits 0..=31, kind in 32..=43, cause in 44..=49, route in 50..=52, CPL in 53..=54.
#[derive(Clone, Copy)]
struct Key(u64);

const _: () = assert!(Cause::ALL.len() <= 64 && Route::ALL.len() <= 8);

impl Key {
    fn pack(cause: Cause, route: Route, kind: Kind, eip: u32, cpl: u8) -> Key {
        Key(u64::from(eip)
            | u64::from(kind.0 & 0xfff) << 32
            | u64::from(cause as u8) << 44
            | u64::from(route as u8) << 50
            | u64::from(cpl & 3) << 53)
    }
    fn eip(self) -> u32 {
        self.0 as u32
    }
    fn kind(self) -> Kind {
        Kind((self.0 >> 32) as u16 & 0xfff)
    }
    fn cause(self) -> Cause {
        Cause::ALL.get((self.0 >> 44) as usize & 63).copied().unwrap_or(Cause::Other)
    }
    fn route(self) -> Route {
        Route::ALL.get((self.0 >> 50) as usize & 7).copied().unwrap_or(Route::Signal)
    }
    fn cpl(self) -> u8 {
        (self.0 >> 53) as u8 & 3
    }
}

/// How many different sites are told apart; beyond it a site's EIP is counted as 0, so that a guest cannot make the
/// table grow for ever.
const MAX_KEYS: usize = 1 << 18;

/// The running account of one virtual machine.
#[derive(Default)]
pub struct Account {
    tallies: HashMap<u64, Tally, BuildHasherDefault<PackedHasher>>,
    injected: BTreeMap<u8, u64>,
    inline: BTreeMap<&'static str, u64>,
    gauges: BTreeMap<String, u64>,
    tactics: BTreeMap<&'static str, u64>,
    trap_sites: BTreeMap<u32, TrapSite>,
}

#[derive(Clone, Copy, Debug)]
struct TrapSite {
    kind: Kind,
    reason: &'static str,
}

impl Account {
    /// An empty account.
    #[must_use]
    pub fn new() -> Account {
        Account::default()
    }

    /// Counts one event. `eip` is the guest's EIP of the instruction, `ns` the time from leaving guest code to being
    /// ready to enter it again.
    pub fn record(&mut self, cause: Cause, route: Route, kind: Kind, eip: u32, cpl: u8, ns: u64) {
        let mut key = Key::pack(cause, route, kind, eip, cpl);
        if self.tallies.len() >= MAX_KEYS && !self.tallies.contains_key(&key.0) {
            key = Key::pack(cause, route, kind, 0, cpl);
        }
        let tally = self.tallies.entry(key.0).or_default();
        tally.count = tally.count.wrapping_add(1);
        tally.ns = tally.ns.wrapping_add(ns);
    }

    /// Counts an exception or interrupt delivered through the guest's IDT.
    pub fn record_injected(&mut self, vector: u8) {
        *self.injected.entry(vector).or_default() += 1;
    }

    /// Sets how often trampolines completed instructions of this kind in line (counted in the worlds, merged here).
    pub fn set_inline(&mut self, instruction: &'static str, count: u64) {
        self.inline.insert(instruction, count);
    }

    /// Sets a number that is no event count, such as `worlds`, `mappings`, `code_pages`, `monitor_rss_kib`.
    pub fn set_gauge(&mut self, name: impl Into<String>, value: u64) {
        self.gauges.insert(name.into(), value);
    }

    /// Sets how many patches were made with a tactic.
    pub fn set_patches(&mut self, tactic: &'static str, count: u64) {
        self.tactics.insert(tactic, count);
    }

    /// Notes a site that only a trapping byte could be put on, and why.
    pub fn add_trap_site(&mut self, eip: u32, kind: Kind, reason: &'static str) {
        if self.trap_sites.len() < MAX_KEYS {
            self.trap_sites.insert(eip, TrapSite { kind, reason });
        }
    }

    /// How often a cause was recorded, by every route.
    #[must_use]
    pub fn count(&self, cause: Cause) -> u64 {
        self.tallies.iter().filter(|(key, _)| Key(**key).cause() == cause).map(|(_, t)| t.count).sum()
    }

    /// The account as plain data.
    #[must_use]
    pub fn stats(&self, engine: &str, wall_ns: u64) -> Stats {
        let mut exits: Vec<ExitLine> = self
            .tallies
            .iter()
            .map(|(key, tally)| {
                let key = Key(*key);
                ExitLine {
                    cause: key.cause().name().into(),
                    route: key.route().name().into(),
                    instruction: key.kind().name(),
                    eip: key.eip(),
                    cpl: key.cpl(),
                    count: tally.count,
                    ns: tally.ns,
                }
            })
            .collect();
        exits.sort_by(|a, b| b.count.cmp(&a.count).then(a.eip.cmp(&b.eip)));
        Stats {
            version: STATS_VERSION,
            subring: env!("CARGO_PKG_VERSION").into(),
            engine: engine.into(),
            wall_ns,
            page_fault_handler: None,
            exits,
            inline: self
                .inline
                .iter()
                .map(|(name, count)| InlineLine { instruction: (*name).into(), count: *count })
                .collect(),
            injected: self
                .injected
                .iter()
                .map(|(vector, count)| InjectedLine { vector: *vector, count: *count })
                .collect(),
            gauges: self.gauges.clone(),
            patches: self.tactics.iter().map(|(name, value)| ((*name).into(), *value)).collect(),
            trap_sites: self
                .trap_sites
                .iter()
                .map(|(eip, site)| TrapSiteLine {
                    eip: *eip,
                    instruction: site.kind.name(),
                    reason: site.reason.into(),
                })
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_a_key_survives_packing() {
        for &cause in Cause::ALL {
            for &route in Route::ALL {
                let key = Key::pack(cause, route, Kind::from(Mnemonic::Xtest), 0xdead_beef, 3);
                assert_eq!((key.cause(), key.route()), (cause, route));
                assert_eq!((key.kind(), key.eip(), key.cpl()), (Kind::from(Mnemonic::Xtest), 0xdead_beef, 3));
            }
        }
    }

    #[test]
    fn every_mnemonic_fits_the_key() {
        assert!(Mnemonic::values().all(|m| (m as usize) < 0x1000));
    }

    #[test]
    fn events_add_up_by_site_and_route() {
        let mut account = Account::new();
        let cli = Kind::from(Mnemonic::Cli);
        account.record(Cause::Sensitive, Route::FarExit, cli, 0x10, 0, 5);
        account.record(Cause::Sensitive, Route::FarExit, cli, 0x10, 0, 7);
        account.record(Cause::Sensitive, Route::Signal, cli, 0x10, 0, 1);
        account.record(Cause::ShadowFault, Route::Signal, Kind::NONE, 0x10, 3, 1);
        let stats = account.stats("raw", 1);
        assert_eq!(account.count(Cause::Sensitive), 3);
        assert_eq!(stats.exits.len(), 3);
        let top = &stats.exits[0];
        assert_eq!((top.count, top.ns, top.instruction.as_str()), (2, 12, "cli"));
    }

    #[test]
    fn a_guest_cannot_make_the_table_grow_for_ever() {
        let mut account = Account::new();
        for eip in 0..(MAX_KEYS as u32 + 1000) {
            account.record(Cause::Sensitive, Route::Signal, Kind::NONE, eip, 0, 1);
        }
        assert!(account.tallies.len() <= MAX_KEYS + 1);
        assert_eq!(account.count(Cause::Sensitive), MAX_KEYS as u64 + 1000);
    }

    #[test]
    fn neighbouring_sites_do_not_collide() {
        let hash = |key: Key| {
            let mut hasher = PackedHasher::default();
            hasher.write_u64(key.0);
            hasher.finish()
        };
        let low_bits: std::collections::HashSet<u64> = (0..4096u32)
            .map(|i| {
                hash(Key::pack(Cause::Sensitive, Route::Signal, Kind::NONE, 0xc100_0000 + i * 16, 0)) & 0xffff
            })
            .collect();
        assert!(low_bits.len() > 3500, "{} different buckets of 4096", low_bits.len());
    }
}
