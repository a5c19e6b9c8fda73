//! Executes a command on a host whose kernel has no modify_ldt, as far as the command can tell.

use seccompiler::{SeccompAction, SeccompFilter, TargetArch};
use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::process::Command;

fn main() {
    let rules = BTreeMap::from([(libc::SYS_modify_ldt, vec![])]);
    let absent = SeccompAction::Errno(libc::ENOSYS as u32);
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, absent, TargetArch::x86_64)
        .and_then(TryInto::<seccompiler::BpfProgram>::try_into)
        .expect("the filter is well formed");
    seccompiler::apply_filter(&filter).expect("a process may filter its own system calls");
    let mut words = std::env::args_os().skip(1);
    let program = words.next().expect("usage: without-modify-ldt COMMAND [ARGUMENT...]");
    let error = Command::new(&program).args(words).exec();
    eprintln!("{}: {error}", program.display());
    std::process::exit(127);
}
