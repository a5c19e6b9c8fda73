//! Orders for the mapper of a confined world: memory the monitor writes and the world can only read.
//!
//! An order is one system call with its arguments. The mapper ([`super::mapper`]) makes them one after the other until one
//! fails.

use std::io;
use std::mem::offset_of;
use std::sync::atomic::{AtomicU32, Ordering};

use super::arena::{COMMANDS, Cell, Command, ORDERS_VA, op};
use super::spawn::futex_wake;
use crate::shared::SharedMap;

/// How many orders fit: a command is one or two, and whoever enters the world has some more.
pub(crate) const ORDERS: usize = 2 * COMMANDS + 256;
/// `modify_ldt`: write a descriptor, in the manner of newer kernels.
const WRITE_LDT: u64 = 0x11;
/// Size of `struct user_desc`.
const USER_DESC: u64 = 16;
const HALF: u64 = 1 << 31;

/// Of [`Orders::wakes`], and what the mapper writes to [`Orders::signals`] before it wakes the world.
pub(crate) const WAKES: u32 = 1;

/// A system call.
#[derive(Clone, Copy, Default, Debug)]
#[repr(C)]
pub(crate) struct Order {
    /// Its number.
    pub(crate) call: u64,
    pub(crate) arguments: [u64; 6],
    /// What the mapper answers if it fails; not 0.
    pub(crate) name: u64,
}

/// The memory shared with the mapper.
#[repr(C, align(4096))]
pub(crate) struct Orders {
    /// Changes when there are new orders; the mapper sleeps here.
    pub(crate) go: AtomicU32,
    /// [`Orders::go`] of the last orders after which the monitor was to be woken, or one of which failed.
    pub(crate) done: AtomicU32,
    /// [`Order::name`] of the one that failed; 0: none.
    pub(crate) failed: AtomicU32,
    /// Where the world sleeps once the monitor has seen that it does.
    pub(crate) bed: AtomicU32,
    pub(crate) count: AtomicU32,
    /// [`WAKES`]: who is to be woken is the world, not the monitor. (The monitor, if one failed.)
    pub(crate) wakes: AtomicU32,
    /// The state of `spawn::Signals`.
    pub(crate) signals: AtomicU32,
    /// Not 0: a kick has been sent as a signal since the last look.
    pub(crate) sent: AtomicU32,
    /// How many threads of the monitor are about to send one.
    pub(crate) sending: AtomicU32,
    /// Not 0: the world sleeps in its bed.
    pub(crate) abed: AtomicU32,
    /// So many orders are there to be carried out before the world is entered by another one.
    pub(crate) prepared: AtomicU32,
    pub(crate) orders: [Order; ORDERS],
}

const _: () = assert!(size_of::<Order>() == 64 && size_of::<Orders>().is_multiple_of(4096));

/// What the mapper does behind the last command.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Then {
    /// Wakes the world.
    WakeWorld,
    /// Says that it is done, and wakes the monitor.
    Tell,
}

/// The monitor's mapping.
#[derive(Debug)]
pub(crate) struct OrdersMap(SharedMap);

impl OrdersMap {
    /// Those in cell `number`.
    pub(crate) fn in_cell(cells: &SharedMap, number: usize) -> io::Result<OrdersMap> {
        let at = number * size_of::<Cell>() + offset_of!(Cell, orders);
        Ok(OrdersMap(cells.part(at as u64, size_of::<Orders>())?))
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        const { assert!(offset_of!(Orders, orders) >= 20) };
        self.0.atomic_u32(offset as u64).unwrap_or_else(|| unreachable!("{offset} lies in the mapping"))
    }

    /// Where the world sleeps.
    pub(crate) fn bed(&self) -> &AtomicU32 {
        self.word(offset_of!(Orders, bed))
    }

    /// The state of `spawn::Signals`.
    pub(crate) fn signals(&self) -> &AtomicU32 {
        self.word(offset_of!(Orders, signals))
    }

    /// Not 0: a kick has been sent as a signal since the last look.
    pub(crate) fn sent(&self) -> &AtomicU32 {
        self.word(offset_of!(Orders, sent))
    }

    /// How many threads are about to send one.
    pub(crate) fn sending(&self) -> &AtomicU32 {
        self.word(offset_of!(Orders, sending))
    }

    /// Not 0: the world sleeps in its bed.
    pub(crate) fn abed(&self) -> &AtomicU32 {
        self.word(offset_of!(Orders, abed))
    }

    /// Orders up to this [`Orders::go`] are over.
    pub(crate) fn done(&self) -> &AtomicU32 {
        self.word(offset_of!(Orders, done))
    }

    /// Index of the command that failed.
    pub(crate) fn failed(&self) -> Option<usize> {
        (self.word(offset_of!(Orders, failed)).load(Ordering::SeqCst) as usize).checked_sub(1)
    }

    /// Writes the commands down for whoever enters the world, who has the mapper carry them out before.
    pub(crate) fn prepare(&self, commands: &[Command]) {
        let n = self.write(commands);
        self.prepared().store(n as u32, Ordering::SeqCst);
    }

    /// So many orders are there to be carried out before the world is entered by another one.
    pub(crate) fn prepared(&self) -> &AtomicU32 {
        self.word(offset_of!(Orders, prepared))
    }

    /// Has the mapper carry out the commands; yields what [`Self::done`] will be.
    pub(crate) fn give(&self, commands: &[Command], then: Then) -> u32 {
        let n = self.write(commands);
        self.word(offset_of!(Orders, failed)).store(0, Ordering::SeqCst);
        self.word(offset_of!(Orders, count)).store(n as u32, Ordering::SeqCst);
        let wakes = if then == Then::WakeWorld { WAKES } else { 0 };
        self.word(offset_of!(Orders, wakes)).store(wakes, Ordering::SeqCst);
        let word = self.word(offset_of!(Orders, go));
        let number = word.load(Ordering::SeqCst).wrapping_add(1);
        word.store(number, Ordering::SeqCst);
        futex_wake(word);
        number
    }

    /// Writes the commands as orders, and says how many these are.
    fn write(&self, commands: &[Command]) -> usize {
        let mut n = 0;
        for (i, c) in commands.iter().take(COMMANDS).enumerate() {
            let name = i as u64 + 1;
            for (call, arguments) in calls(c, n).into_iter().flatten() {
                self.put(n, &Order { call, arguments, name });
                n += 1;
            }
        }
        n
    }

    fn put(&self, index: usize, order: &Order) {
        let at = (offset_of!(Orders, orders) + index * size_of::<Order>()) as u64;
        let words = [order.call].into_iter().chain(order.arguments).chain([order.name]);
        for (i, word) in words.enumerate() {
            let _in_range = self.0.write_u64(at + 8 * i as u64, word);
        }
    }
}

/// The system calls of a command whose first order has this index.
fn calls(c: &Command, index: usize) -> [Option<(u64, [u64; 6])>; 2] {
    let (at, len) = (u64::from(c.a), u64::from(c.b));
    let unmap = |at, len| Some((libc::SYS_munmap as u64, [at, len, 0, 0, 0, 0]));
    let first = match c.op {
        op::MAP => {
            let flags = libc::MAP_SHARED | libc::MAP_FIXED | super::rc::populate(c.b);
            Some((libc::SYS_mmap as u64, [at, len, u64::from(c.c), flags as u64, u64::from(c.d), c.offset]))
        }
        op::UNMAP if c.b == 0 => return [unmap(0, HALF), unmap(HALF, HALF)],
        op::UNMAP => unmap(at, len),
        op::PROTECT => Some((libc::SYS_mprotect as u64, [at, len, u64::from(c.c), 0, 0, 0])),
        _ => {
            // The descriptor (`struct user_desc`: entry_number, base_addr, limit, flags) lies in the arguments not used.
            let order = offset_of!(Orders, orders) + index * size_of::<Order>();
            let place = ORDERS_VA + (order + offset_of!(Order, arguments) + 4 * 8) as u64;
            let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
            Some((
                libc::SYS_modify_ldt as u64,
                [WRITE_LDT, place, USER_DESC, 0, pair(c.a, c.b), pair(c.c, c.d)],
            ))
        }
    };
    [first, None]
}
