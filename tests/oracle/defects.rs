//! Deliberate defects.
