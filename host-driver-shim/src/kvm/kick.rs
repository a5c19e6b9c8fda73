//! How another thread makes KVM_RUN return: a flag in the shared page for a run that has not begun, a signal for one that
//! has.
//!
//! A kick is never lost: it sets `wanted` first, then `immediate_exit`, then signals. The EMT clears in the same order, and
//! sets `immediate_exit` again if `wanted` came back in between.

use super::KvmError;
use super::run::RunPage;
use super::signal;
use crate::world::Kicker;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// The address of `immediate_exit` in a mapped page.
pub(super) struct ImmediateExit(pub(super) *mut u8);

// SAFETY: it is a place in a mapping shared with the kernel, written with single-byte volatile stores only, and only under
// the lock of `Shared::page`, which is emptied before the mapping goes.
unsafe impl Send for ImmediateExit {}

/// Between a vCPU and its kickers.
pub(super) struct Shared {
    wanted: AtomicBool,
    /// The thread in KVM_RUN; 0 before the first.
    thread: AtomicI32,
    page: Mutex<Option<ImmediateExit>>,
}

/// Makes a vCPU leave KVM_RUN.
#[derive(Clone)]
pub struct KvmKicker(pub(super) Arc<Shared>);

impl Shared {
    pub(super) fn new(immediate_exit: ImmediateExit) -> Result<Arc<Shared>, KvmError> {
        signal::install().map_err(|why| KvmError { what: "sigaction", why })?;
        let page = Mutex::new(Some(immediate_exit));
        Ok(Arc::new(Shared { wanted: AtomicBool::new(false), thread: AtomicI32::new(0), page }))
    }

    /// The calling thread is about to run the guest.
    pub(super) fn enter(&self) {
        if self.thread.load(Ordering::Relaxed) == 0 {
            self.thread.store(signal::this_thread(), Ordering::SeqCst);
        }
    }

    /// The kick has been answered.
    pub(super) fn take(&self) {
        let page = self.page.lock().unwrap_or_else(PoisonError::into_inner);
        self.wanted.store(false, Ordering::SeqCst);
        set(&page, false);
    }

    /// `immediate_exit` has served another purpose: back to what kickers want.
    pub(super) fn restore(&self, _: &RunPage) {
        let page = self.page.lock().unwrap_or_else(PoisonError::into_inner);
        set(&page, self.wanted.load(Ordering::SeqCst));
    }

    /// The page goes.
    pub(super) fn close(&self) {
        *self.page.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

fn set(page: &Option<ImmediateExit>, on: bool) {
    if let Some(ImmediateExit(at)) = page {
        // SAFETY: the mapping is there as long as the address is (see `ImmediateExit`).
        unsafe { at.write_volatile(u8::from(on)) };
    }
}

impl Kicker for KvmKicker {
    fn kick(&self) {
        let page = self.0.page.lock().unwrap_or_else(PoisonError::into_inner);
        self.0.wanted.store(true, Ordering::SeqCst);
        set(&page, true);
        let thread = self.0.thread.load(Ordering::SeqCst);
        if page.is_some() && thread != 0 {
            signal::send(thread);
        }
    }
}
