//! What a guest sees as exceptions and interrupts, and what ends a guest.

/// An exception to be delivered to the guest. No error of ours.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Trap {
    /// Vector, 0..=31.
    pub vector: u8,
    /// The error code pushed, where the vector pushes one (SDM Vol. 3A, 6.15).
    pub error_code: Option<u32>,
    /// The faulting linear address for #PF: goes to CR2 on delivery.
    pub cr2: Option<u32>,
}

impl Trap {
    /// #DE.
    pub const DE: Trap = Trap::plain(0);
    /// #DB.
    pub const DB: Trap = Trap::plain(1);
    /// #BP.
    pub const BP: Trap = Trap::plain(3);
    /// #OF.
    pub const OF: Trap = Trap::plain(4);
    /// #BR.
    pub const BR: Trap = Trap::plain(5);
    /// #UD.
    pub const UD: Trap = Trap::plain(6);
    /// #NM.
    pub const NM: Trap = Trap::plain(7);
    /// #MF.
    pub const MF: Trap = Trap::plain(16);
    /// #XM.
    pub const XM: Trap = Trap::plain(19);

    /// A trap without error code.
    #[must_use]
    pub const fn plain(vector: u8) -> Trap {
        Trap { vector, error_code: None, cr2: None }
    }
    /// A trap with an error code.
    #[must_use]
    pub const fn with_code(vector: u8, error_code: u32) -> Trap {
        Trap { vector, error_code: Some(error_code), cr2: None }
    }
    /// #DF(0).
    #[must_use]
    pub const fn df() -> Trap {
        Trap::with_code(8, 0)
    }
    /// #TS.
    #[must_use]
    pub const fn ts(code: u32) -> Trap {
        Trap::with_code(10, code)
    }
    /// #NP.
    #[must_use]
    pub const fn np(code: u32) -> Trap {
        Trap::with_code(11, code)
    }
    /// #SS.
    #[must_use]
    pub const fn ss(code: u32) -> Trap {
        Trap::with_code(12, code)
    }
    /// #GP.
    #[must_use]
    pub const fn gp(code: u32) -> Trap {
        Trap::with_code(13, code)
    }
    /// #PF at `cr2`.
    #[must_use]
    pub const fn pf(code: u32, cr2: u32) -> Trap {
        Trap { vector: 14, error_code: Some(code), cr2: Some(cr2) }
    }
    /// #AC(0).
    #[must_use]
    pub const fn ac() -> Trap {
        Trap::with_code(17, 0)
    }
}

/// Something to deliver through the guest's IDT.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// A fault or trap raised by the CPU; EIP is where the pushed EIP must point.
    Exception(Trap),
    /// `int n`, `int3`, `into`: the gate's DPL is checked; EIP already points after the instruction.
    Software {
        /// Vector.
        vector: u8,
        /// `int3`/`into` (no V86 IOPL check) rather than `int n`.
        short_form: bool,
    },
    /// An external interrupt acknowledged from the interrupt controller.
    External {
        /// Vector.
        vector: u8,
    },
    /// The non-maskable interrupt.
    Nmi,
}
