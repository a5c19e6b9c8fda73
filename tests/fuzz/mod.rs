//! The bodies of the fuzz targets in `fuzz/`, here so that their inputs are replayed without a fuzzer too.

pub mod boot_file;
pub mod interp;
pub mod patch_structure;
pub mod scan;

use crate::forms;
use crate::oracle::{case, rewrite, rig::Rig};
use host_driver_shim::native32::Native32;
use std::cell::RefCell;

/// Every target by name.
pub const TARGETS: [&str; 7] =
    ["scan", "patch_structure", "boot_file", "interp", "patch_semantics", "code_write", "interp_vs_cpu"];

thread_local! {
    static RIG: RefCell<Option<Rig>> = const { RefCell::new(None) };
    static NATIVE: RefCell<Option<Native32>> = const { RefCell::new(None) };
}

/// Feeds one input to a target. The worlds of an oracle live as long as the thread that made them.
///
/// # Errors
/// When this host cannot run the target, with the reason.
///
/// # Panics
/// When the target finds something.
pub fn run(target: &str, bytes: &[u8]) -> Result<(), String> {
    match target {
        "scan" => scan::fuzz(bytes),
        "patch_structure" => patch_structure::fuzz(bytes),
        "boot_file" => boot_file::fuzz(bytes),
        "interp" => interp::fuzz(bytes),
        "patch_semantics" => with(&RIG, on_one_cpu, |rig| case::fuzz(rig, bytes))?,
        "code_write" => with(&RIG, on_one_cpu, |rig| rewrite::fuzz(rig, bytes))?,
        "interp_vs_cpu" => {
            with(&NATIVE, || Native32::new().map_err(|e| e.to_string()), |n| forms::fuzz(n, bytes))?;
        }
        _ => return Err(format!("there is no target {target}")),
    }
    Ok(())
}

/// Uses what is made once a thread.
fn with<T>(
    of: &'static std::thread::LocalKey<RefCell<Option<T>>>,
    make: impl FnOnce() -> Result<T, String>,
    use_it: impl FnOnce(&mut T),
) -> Result<(), String> {
    of.with_borrow_mut(|slot| {
        let it = match slot {
            Some(it) => it,
            None => slot.insert(make()?),
        };
        use_it(it);
        Ok(())
    })
}

/// A rig whose worlds share the calling thread's CPU, to which that is bound: a hand-over across CPUs takes long.
fn on_one_cpu() -> Result<Rig, String> {
    let placement = monitor::em::placement::Placement::current().map_err(|e| e.to_string())?;
    let rig = Rig::new(Some(placement.cpu()))?;
    placement.bind().map_err(|e| e.to_string())?;
    Ok(rig)
}
