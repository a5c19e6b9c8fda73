//! What the patch manager makes of every sensitive instruction of Debian's kernels, offline.

use std::collections::BTreeMap;

use csam::{CodeMap, CodeSize, CodeSource, GuestLin, SensitiveKind};
use monitor::scan::image::Image;
use patm::{Config, MapView, Patm, Route, Tactic};
use subring_tests::{cache, or_skip};

/// By kind of instruction: how many sites are done in line, leave by the gate, are a trapping byte.
type Routes = BTreeMap<SensitiveKind, [u64; 3]>;

fn patch_all(image: &Image) -> (Patm, Routes) {
    let mut map = CodeMap::new(CodeSize::Bits32);
    for entries in [&[image.entry][..], &image.functions, &image.relocated, &image.resumed] {
        let at: Vec<_> = entries.iter().copied().map(GuestLin).collect();
        map.scan_all(&at, &mut { image }, &csam::ScanOptions::default());
    }
    let top = (image.entry >> 24) as u8;
    let mut patm = Patm::new(Config {
        tramp_base: patm::good_bases(top).next().expect("a base for the trampolines"),
        tramp_len: 16 << 20,
        vcpu_base: 0xffe0_0000,
        count_inline: false,
        ring: 3,
        keys: None,
    });
    let view = MapView {
        map: &map,
        fetch: |at, buf: &mut [u8]| CodeSource::fetch(&mut { image }, at, buf),
        writable: |_, _| true,
    };
    let sites: Vec<GuestLin> = map.sites().map(|s| s.at).collect();
    for site in sites {
        let _ = patm.patch(site, &view);
    }
    let mut routes = Routes::new();
    for ((kind, route), n) in &patm.stats().sites {
        let column = match route {
            Route::InLine => 0,
            Route::Gate => 1,
            Route::TrapByte => 2,
        };
        routes.entry(*kind).or_default()[column] += n;
    }
    (patm, routes)
}

fn print(name: &str, patm: &Patm, routes: &Routes) {
    println!("{name}: {:?}", patm.stats().tactics);
    println!("trap bytes: {:?}, refused: {:?}", patm.stats().trap_bytes, patm.stats().refused);
    println!("{:<20} {:>8} {:>8} {:>8}", "", "in line", "gate", "trap");
    for (kind, [inline, gate, trap]) in routes {
        println!("{:<20} {inline:>8} {gate:>8} {trap:>8}", kind.name());
    }
    for patch in patm.patches().filter(|p| p.tactic == Tactic::TrapByte) {
        for site in &patch.sites {
            println!(
                "trap byte at {:08x}: {} ({})",
                site.at.0,
                site.kind.name(),
                patch.why.map_or("", |w| w.name())
            );
        }
    }
    for patch in patm.patches() {
        for site in patch.sites.iter().filter(|s| s.route == Route::Gate) {
            println!("gate at {:08x}: {}", site.at.0, site.kind.name());
        }
    }
}

#[test]
fn nearly_every_sensitive_instruction_of_debians_kernel_gets_a_jump() {
    for (name, kernel) in [("686", cache::kernel_686()), ("686-pae", cache::kernel_686_pae())] {
        let bytes = std::fs::read(or_skip!("patch_debian", kernel)).expect("the kernel can be read");
        let image = Image::read(bytes, None).expect("Debian's kernel is a bzImage");
        let (patm, routes) = patch_all(&image);
        print(name, &patm, &routes);
        let all: u64 = routes.values().flatten().sum();
        let traps: u64 = routes.values().map(|r| r[2]).sum();
        assert!(all > 3000, "{name}: {all} sites");
        assert!(traps * 50 < all, "{name}: {traps} trap bytes among {all} sites");
    }
}
