//! The machine's chips, one a file. Each is owned by the virtual CPU's thread, is told the guest time with every call,
//! answers with the levels of its interrupt lines, and never polls.

pub mod debug_ports;
pub mod i8042;
pub mod i8237;
pub mod i8254;
pub mod i8259;
pub mod mc146818;
pub mod ns16550a;
pub mod pci_config;
pub mod port61;
pub mod serial_backend;
pub mod system_control;
pub mod vga_text;
