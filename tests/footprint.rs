//! An idle guest leaves the host's CPU alone, and a guest costs little memory beside its RAM.
//!
//! The bounds here hold on a busy machine; the numbers themselves are `bench-footprint`'s.

use std::time::Duration;
use subring_tests::cache::{self, SkipReason};
use subring_tests::harness::{Guest, one_guest_at_a_time};
use subring_tests::initramfs::USERLAND_MARKER;
use subring_tests::{or_skip, procs};

const BOOT: Duration = Duration::from_secs(120);
/// Share of one CPU. The aim is 0.03.
const IDLE_BOUND: f64 = 0.15;
/// Bytes beside guest RAM.
const MEMORY_BOUND: u64 = 64 << 20;

#[test]
fn an_idle_guest_costs_little_cpu_time_and_memory() {
    let _turn = one_guest_at_a_time();
    for kernel in [cache::kernel_686, cache::kernel_686_pae] {
        let kernel = or_skip!("footprint", kernel());
        let initrd = or_skip!("footprint", cache::initrd());
        let (kernel, initrd) = (kernel.display().to_string(), initrd.display().to_string());
        let arguments =
            ["run", "-kernel", &kernel, "-initrd", &initrd, "-append", "console=ttyS0", "-nographic"];
        let mut guest = Guest::spawn(arguments);
        guest.expect(USERLAND_MARKER, BOOT);
        guest.expect("/ # ", BOOT);
        std::thread::sleep(Duration::from_secs(1));
        let idle = procs::watch(guest.id(), Duration::from_secs(5)).expect("the guest lives");
        let refused = SkipReason("/proc shows nothing of the guest's processes to this user".into());
        let cost = or_skip!("footprint", procs::overhead(guest.id()).ok_or(refused));
        println!("{kernel}: {idle:?}, {cost:?}, {} MiB in all", cost.total() >> 20);
        assert!(idle.share() < IDLE_BOUND, "idle at {:.1} % of a CPU: {idle:?}", idle.share() * 100.0);
        assert!(cost.total() < MEMORY_BOUND, "{} MiB beside guest RAM: {cost:?}", cost.total() >> 20);
        guest.send("poweroff -f");
        assert_eq!(guest.wait_exit(BOOT), 0);
    }
}
