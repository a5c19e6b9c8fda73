//! FPU environments in memory.
