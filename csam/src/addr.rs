//! Address types. A guest has two address spaces the scanner and everything above it must not confuse.

use core::fmt;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident, $inner:ty) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub $inner);

        impl $name {
            /// The address `bytes` further on, wrapping at the end of the space.
            #[must_use]
            #[inline]
            pub const fn wrapping_add(self, bytes: $inner) -> Self {
                Self(self.0.wrapping_add(bytes))
            }
            /// The first address of the 4 KiB page this address lies in.
            #[must_use]
            #[inline]
            pub const fn page_base(self) -> Self {
                Self(self.0 & !0xfff)
            }
            /// The offset inside the 4 KiB page, 0..=4095.
            #[must_use]
            #[inline]
            pub const fn page_offset(self) -> usize {
                (self.0 & 0xfff) as usize
            }
            /// The number of the 4 KiB page.
            #[must_use]
            #[inline]
            pub const fn page_number(self) -> $inner {
                self.0 >> 12
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#010x})"), self.0)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:08x}", self.0)
            }
        }
    };
}

address!(
    /// A guest linear address: what segmentation yields and paging translates. 32 bits.
    GuestLin,
    u32
);
address!(
    /// A guest physical address. 64 bits wide, of which PAE uses 36 or more (SDM Vol. 3A, 4.1.4).
    GuestPhys,
    u64
);
