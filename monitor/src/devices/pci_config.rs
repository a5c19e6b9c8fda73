//! PCI configuration mechanism #1 with nothing on the bus (ports CF8h, CFCh-CFFh).
//!
//! Source: PCI Local Bus Specification 3.0, 3.2.2.3.2: only a 32-bit access reaches CONFIG_ADDRESS; a configuration
//! read that no device claims returns all ones.

/// CONFIG_ADDRESS.
pub const CONFIG_ADDRESS: u16 = 0xcf8;
/// CONFIG_DATA, four bytes wide.
pub const CONFIG_DATA: u16 = 0xcfc;

/// Bit 31 enables, bits 30-24 and 1-0 are reserved and read as zero.
const ADDRESS_WRITABLE: u32 = 0x80ff_fffc;

/// The host bridge's configuration address register.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PciConfig {
    address: u32,
}

impl PciConfig {
    /// 32-bit read of CF8h.
    #[must_use]
    pub fn address(&self) -> u32 {
        self.address
    }

    /// 32-bit write of CF8h.
    pub fn set_address(&mut self, value: u32) {
        self.address = value & ADDRESS_WRITABLE;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_enable_bit_reads_back_as_linux_checks() {
        // arch/x86/pci/direct.c, pci_check_type1.
        let mut p = PciConfig::default();
        p.set_address(0x8000_0000);
        assert_eq!(p.address(), 0x8000_0000);
        p.set_address(0xffff_ffff);
        assert_eq!(p.address(), 0x80ff_fffc);
    }
}
