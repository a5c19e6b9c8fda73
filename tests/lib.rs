//! Helpers shared by the behaviour tests.

pub mod cache;
pub mod chart;
pub mod cpio;
pub mod exhaustive;
pub mod forms;
pub mod fuzz;
pub mod harness;
pub mod hostile;
pub mod initramfs;
pub mod measure;
pub mod oracle;
pub mod procs;
pub mod ring0_code;
