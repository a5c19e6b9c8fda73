//! QEMU's spellings (`-kernel FILE`, `-m size=256M`, `-nographic`, ...) translated into ours before the parser sees
//! them.

use std::ffi::{OsStr, OsString};

/// What one of QEMU's options becomes.
enum Rule {
    /// `-x VALUE` is our `--option=VALUE`.
    Value(&'static str),
    /// `-x` is these words of ours.
    Flag(&'static [&'static str]),
    /// `-x` is accepted and says nothing new.
    Ignore,
    /// `-x VALUE` is accepted if VALUE is one of these, which say nothing new.
    Only(&'static [&'static str]),
    /// `-x VALUE` needs code.
    With(fn(&str) -> Result<Vec<OsString>, String>),
}

/// QEMU's options we know, without the leading dash.
const RULES: &[(&str, Rule)] = &[
    ("kernel", Rule::Value("kernel")),
    ("initrd", Rule::Value("initrd")),
    ("append", Rule::Value("append")),
    ("m", Rule::Value("memory")),
    ("cpu", Rule::Value("cpu")),
    ("serial", Rule::Value("serial")),
    ("nographic", Rule::Flag(&["--nographic"])),
    ("no-reboot", Rule::Flag(&["--no-reboot"])),
    ("enable-kvm", Rule::Flag(&["--engine=kvm"])),
    ("accel", Rule::With(accel)),
    ("machine", Rule::With(machine)),
    ("M", Rule::With(machine)),
    ("device", Rule::With(device)),
    ("debugcon", Rule::With(debugcon)),
    ("d", Rule::Value("trace")),
    ("display", Rule::Only(&["none"])),
    ("vga", Rule::Only(&["none", "std"])),
    ("monitor", Rule::Only(&["none"])),
    ("net", Rule::Only(&["none"])),
    ("nic", Rule::Only(&["none"])),
    ("smp", Rule::Only(&["1"])),
    ("parallel", Rule::Only(&["none", "null"])),
    ("nodefaults", Rule::Ignore),
    ("no-user-config", Rule::Ignore),
    ("no-acpi", Rule::Ignore),
    ("no-hpet", Rule::Ignore),
    ("no-shutdown", Rule::With(|_| Err("QEMU's -no-shutdown is not supported".into()))),
];

/// Translates the words after `run`. The error is the line to show.
pub(super) fn translate(words: impl IntoIterator<Item = OsString>) -> Result<Vec<OsString>, String> {
    let mut words = words.into_iter();
    let mut out = Vec::new();
    while let Some(word) = words.next() {
        let Some(name) = qemu_name(&word) else {
            let last = word == "--";
            let ours_with_value = word == "-e";
            out.push(word);
            if last {
                out.extend(words.by_ref());
            } else if ours_with_value {
                out.extend(words.next());
            }
            continue;
        };
        // -m256 is a habit too.
        if let Some(size) = name.strip_prefix('m').filter(|s| s.starts_with(|c: char| c.is_ascii_digit())) {
            out.push(format!("--memory={size}").into());
            continue;
        }
        let Some((_, rule)) = RULES.iter().find(|(known, _)| *known == name) else {
            if name.chars().count() == 1 {
                out.push(word);
                continue;
            }
            return Err(format!("option '-{name}' is not known (QEMU's or ours); try 'subring run --help'"));
        };
        let mut value = || words.next().ok_or_else(|| format!("option '-{name}' needs a value"));
        let text = |value: OsString| {
            value.into_string().map_err(|v| format!("'-{name} {}' is not valid text", v.to_string_lossy()))
        };
        match rule {
            Rule::Value(ours) => {
                let mut joined = OsString::from(format!("--{ours}="));
                joined.push(value()?);
                out.push(joined);
            }
            Rule::Flag(ours) => out.extend(ours.iter().map(OsString::from)),
            Rule::Ignore => {}
            Rule::Only(allowed) => {
                let value = text(value()?)?;
                if !allowed.contains(&value.as_str()) {
                    return Err(format!("'-{name} {value}' is not supported; only {}", allowed.join(", ")));
                }
            }
            Rule::With(translate) if name == "no-shutdown" => out.extend(translate("")?),
            Rule::With(translate) => out.extend(translate(&text(value()?)?)?),
        }
    }
    Ok(out)
}

/// The name of a single-dash word: `-kernel`, but not `--kernel`, `-` or a number.
fn qemu_name(word: &OsStr) -> Option<&str> {
    let name = word.to_str()?.strip_prefix('-')?;
    let first = name.chars().next()?;
    (first.is_ascii_alphabetic()).then_some(name)
}

fn accel(value: &str) -> Result<Vec<OsString>, String> {
    match value.split(',').next() {
        Some("kvm") => Ok(vec!["--engine=kvm".into()]),
        Some("tcg") => Ok(vec!["--engine=auto".into()]),
        _ => Err(format!("'-accel {value}' is not supported; only kvm and tcg (which means --engine auto)")),
    }
}

fn machine(value: &str) -> Result<Vec<OsString>, String> {
    let mut out = Vec::new();
    for part in value.split(',') {
        match part.strip_prefix("type=").unwrap_or(part).split_once('=') {
            None if matches!(part, "pc" | "isapc" | "type=pc" | "type=isapc") => {}
            Some(("accel", name)) => out.extend(accel(name)?),
            Some(("acpi" | "hpet" | "graphics" | "usb", "off")) => {}
            _ => return Err(format!("'-machine {part}' is not supported; the machine is a plain PC")),
        }
    }
    Ok(out)
}

fn device(value: &str) -> Result<Vec<OsString>, String> {
    let mut parts = value.split(',');
    if parts.next() != Some("isa-debug-exit") {
        return Err(format!("'-device {value}' is not supported; only isa-debug-exit"));
    }
    let mut port = format!("{:#x}", crate::config::ISA_DEBUG_EXIT_PORT);
    for part in parts {
        match part.split_once('=') {
            Some(("iobase", base)) => port = base.to_owned(),
            Some(("iosize", _)) => {}
            _ => return Err(format!("isa-debug-exit has no option '{part}'")),
        }
    }
    Ok(vec![format!("--isa-debug-exit={port}").into()])
}

fn debugcon(value: &str) -> Result<Vec<OsString>, String> {
    match value {
        "stdio" | "/dev/stderr" | "file:/dev/stderr" => Ok(vec!["--debugcon".into()]),
        _ => Err(format!("'-debugcon {value}' is not supported; --debugcon writes to standard error")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn translated(line: &str) -> Result<String, String> {
        translate(line.split(' ').map(OsString::from))
            .map(|words| words.join(OsStr::new(" ")).into_string().unwrap())
    }

    #[test]
    fn a_qemu_command_line_becomes_ours() {
        assert_eq!(
            translated("-kernel k -initrd i -append console=ttyS0 -m size=256M -nographic -no-reboot")
                .unwrap(),
            "--kernel=k --initrd=i --append=console=ttyS0 --memory=size=256M --nographic --no-reboot"
        );
        assert_eq!(translated("-enable-kvm -m512").unwrap(), "--engine=kvm --memory=512");
        assert_eq!(
            translated("-device isa-debug-exit,iobase=0xf4,iosize=4").unwrap(),
            "--isa-debug-exit=0xf4"
        );
        assert_eq!(translated("-M pc,accel=kvm -display none").unwrap(), "--engine=kvm");
    }

    #[test]
    fn a_value_may_look_like_an_option() {
        assert_eq!(translated("-append -kernel x").unwrap(), "--append=-kernel x");
    }

    #[test]
    fn our_own_words_pass() {
        assert_eq!(translated("bzImage --stats -h -- -kernel").unwrap(), "bzImage --stats -h -- -kernel");
    }

    #[test]
    fn what_qemu_knows_and_we_do_not_is_refused_in_a_line() {
        for line in ["-cdrom a.iso", "-smp 4", "-device e1000", "-kernel", "-display gtk", "-M q35"] {
            let problem = translated(line).unwrap_err();
            assert!(!problem.contains('\n') && !problem.is_empty());
        }
    }
}
