//! The `subring` command.

fn main() {}
