//! The command on a terminal: what is typed reaches the guest, Ctrl-A commands reach us, and the terminal comes back as it
//! was whatever happens. The guest is Debian's 686 kernel with a busybox shell.

use nix::sys::signal::{Signal, kill};
use nix::sys::termios::LocalFlags;
use nix::unistd::Pid;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;
use subring_tests::cache::{SkipReason, initrd, kernel_686};
use subring_tests::harness::{Guest, one_guest_at_a_time, subring_binary};
use subring_tests::or_skip;

/// Hosts are shared, and now and then slow: what must not last is not timed here.
const SOON: Duration = Duration::from_secs(60);
const BOOT: Duration = Duration::from_secs(240);
const PROMPT: &str = "/ # ";

/// The command line that boots Debian's kernel to its shell.
fn debian(more: &[&str]) -> Result<Vec<String>, SkipReason> {
    let (kernel, initrd) = (kernel_686()?, initrd()?);
    let path = |p: std::path::PathBuf| p.display().to_string();
    let mut args = vec!["run".into(), path(kernel), "--initrd".into(), path(initrd)];
    args.extend(["--append", "console=ttyS0 quiet"].map(String::from));
    args.extend(more.iter().map(ToString::to_string));
    Ok(args)
}

fn send_signal(guest: &Guest, signal: Signal) {
    kill(Pid::from_raw(guest.id() as i32), signal).expect("the program runs");
}

#[test]
fn a_session_on_a_terminal() {
    let _turn = one_guest_at_a_time();
    let args = or_skip!("a_session_on_a_terminal", debian(&[]));
    let mut guest = Guest::spawn_on_terminal(args);
    let before = guest.settings_before();
    guest.expect("SUBRING-USERLAND", BOOT);
    guest.expect(PROMPT, BOOT);
    let raw = guest.terminal_settings().local_flags;
    assert!(!raw.intersects(LocalFlags::ECHO | LocalFlags::ICANON | LocalFlags::ISIG));

    guest.send("echo hello$((1+1))");
    guest.expect("hello2", SOON);
    guest.expect(PROMPT, SOON);

    // Ctrl-C belongs to the guest.
    // Once the program is heard, which has no handler: in the shell's line editor Ctrl-C is a key, and a shell that starts
    // something may miss it.
    guest.send("cat /proc/version -");
    guest.expect("Linux version", SOON);
    guest.send_bytes(b"\x03");
    guest.expect(PROMPT, SOON);

    guest.send_bytes(b"\x01h");
    guest.expect("Ctrl-A x  quit\r\n", SOON);
    guest.send_bytes(b"\x01c");
    for (topic, shown) in [
        ("registers", "eflags="),
        ("pic", "irr"),
        ("patches", "refused"),
        ("csam", "scans"),
        ("faults", "top sites"),
        ("worlds", "all rings of cr3"),
        ("memory", "256 MiB"),
    ] {
        guest.expect("(subring) ", SOON);
        guest.send_bytes(format!("info {topic}\r").as_bytes());
        guest.expect(&format!("info {topic}\r\n"), SOON);
        guest.expect(shown, SOON);
    }

    // A stopped guest answers nothing until it is let run.
    guest.expect("(subring) ", SOON);
    guest.send_bytes(b"stop\r");
    guest.expect("stopped", SOON);
    guest.send_bytes(b"\x01c");
    guest.expect("back to the guest", SOON);
    guest.send("echo a$((20+3))b");
    assert!(guest.try_expect("a23b", Duration::from_secs(1)).is_err());
    guest.send_bytes(b"\x01ccont\r\x01c");
    guest.expect("a23b", SOON);

    guest.send_bytes(b"\x01cnmi\r\x01c");
    // The kernel says so on the console by itself, wherever the shell's output is then.
    guest.expect("trying to continue\r\n", SOON);
    guest.send("dmesg | grep -c 'NMI received'");
    guest.expect("NMI received'\r\n1\r\n", SOON);

    // The machine starts anew, and the terminal stays ours.
    guest.send_bytes(b"\x01creset\r\x01c");
    guest.expect("SUBRING-USERLAND", BOOT);
    guest.expect(PROMPT, BOOT);
    guest.send("echo again$((1+1))");
    guest.expect("again2", SOON);

    guest.send_bytes(b"\x01x");
    assert_eq!(guest.wait_exit(SOON), 0);
    assert_eq!(guest.terminal_settings(), before);
}

#[test]
fn a_signal_restores_the_terminal_and_ends_with_130() {
    let _turn = one_guest_at_a_time();
    let args = or_skip!("a_signal_restores_the_terminal_and_ends_with_130", debian(&[]));
    let mut guest = Guest::spawn_on_terminal(args);
    let before = guest.settings_before();
    guest.expect("SUBRING-USERLAND", BOOT);
    assert_ne!(guest.terminal_settings(), before);
    send_signal(&guest, Signal::SIGTERM);
    assert_eq!(guest.wait_exit(SOON), 130);
    assert_eq!(guest.terminal_settings(), before);
}

#[test]
fn ctrl_c_on_a_pipe_ends_the_run_with_130() {
    let _turn = one_guest_at_a_time();
    let args = or_skip!("ctrl_c_on_a_pipe_ends_the_run_with_130", debian(&[]));
    // Tests that were started in the background ignore the signal, and a program that finds it ignored leaves it so.
    let mut command = Command::new("env");
    command.arg("--default-signal=INT").arg(subring_binary()).args(args);
    let mut guest = Guest::spawn_command(command);
    guest.expect(PROMPT, BOOT);
    // As a terminal does it: to the whole process group, the world processes included.
    let group = Pid::from_raw(guest.id() as i32);
    nix::sys::signal::killpg(group, Signal::SIGINT).expect("the program runs");
    assert_eq!(guest.wait_exit(SOON), 130);
    let said = guest.console();
    assert!(said.trim_end().ends_with("subring: interrupted"), "{said}");
}

#[test]
fn a_guest_that_cannot_go_on_leaves_the_terminal_as_it_was() {
    let _turn = one_guest_at_a_time();
    let path = std::env::temp_dir().join(format!("subring-ud2-{}", std::process::id()));
    // lidt of a limit that has a double fault's gate, but of no handler; then an invalid instruction.
    let code = [
        0x0f, 0x01, 0x1d, 0x10, 0x00, 0x20, 0x00, // lidt [0x200010]
        0x0f, 0x0b, // ud2
        0, 0, 0, 0, 0, 0, 0, // to 0x10
        0xff, 0x07, 0x00, 0x00, 0x30, 0x00, // limit 0x7ff, base 0x300000: nothing is there
    ];
    std::fs::write(&path, code).unwrap();
    let file = path.display().to_string();
    let mut guest = Guest::spawn_on_terminal(["run", "--raw", &file, "--load-addr", "0x200000"]);
    let before = guest.settings_before();
    let code = guest.wait_exit(SOON);
    std::fs::remove_file(&path).unwrap();
    assert_eq!(code, 3, "{}", guest.console());
    assert_eq!(guest.terminal_settings(), before);
}

#[test]
fn the_end_of_standard_input_does_not_end_a_run() {
    let _turn = one_guest_at_a_time();
    let args = or_skip!("the_end_of_standard_input_does_not_end_a_run", debian(&[]));
    let mut guest = Guest::spawn(args);
    // Typed before there is a shell; then nothing can be typed any more.
    guest.expect("SUBRING-USERLAND", BOOT);
    guest.send_bytes(b"sleep 1; echo after$((1+1)); poweroff -f\n");
    guest.close_stdin();
    guest.expect("after2", BOOT);
    assert_eq!(guest.wait_exit(BOOT), 0);
}

#[test]
fn nographic_finds_commands_on_a_pipe_and_plain_stdio_passes_them_on() {
    let _turn = one_guest_at_a_time();
    let test = "nographic_finds_commands_on_a_pipe_and_plain_stdio_passes_them_on";
    let mut guest = Guest::spawn(or_skip!(test, debian(&["-nographic"])));
    guest.expect(PROMPT, BOOT);
    guest.send_bytes(b"\x01cinfo registers\n");
    guest.expect("eflags=", SOON);
    guest.expect("(subring) ", SOON);
    guest.send_bytes(b"\x01x");
    assert_eq!(guest.wait_exit(SOON), 0);

    let mut guest = Guest::spawn(or_skip!(test, debian(&[])));
    guest.expect(PROMPT, BOOT);
    // In busybox' line editor Ctrl-A goes to the beginning of the line.
    guest.send_bytes(b" x$((1+1))y\x01echo\n");
    guest.expect("x2y", SOON);
}

#[test]
fn four_kilobytes_pasted_and_a_megabyte_shown_arrive_whole() {
    let _turn = one_guest_at_a_time();
    let args = or_skip!("four_kilobytes_pasted_and_a_megabyte_shown_arrive_whole", debian(&[]));
    let mut guest = Guest::spawn_on_terminal(args);
    guest.expect(PROMPT, BOOT);
    let mut pasted = String::new();
    while pasted.len() < 4096 {
        pasted += &format!("line {} of what is pasted at once\n", pasted.len());
    }
    guest.send("echo runs$((1+1)); cat > /pasted");
    guest.expect("runs2\r\n", SOON);
    guest.send_bytes(pasted.as_bytes());
    guest.send_bytes(b"\x04");
    guest.expect(PROMPT, SOON);
    guest.send("wc -c < /pasted");
    guest.expect(&format!("/pasted\r\n{}\r\n", pasted.len()), SOON);

    // As commands to the shell itself, too: it reads in raw mode.
    let mut script = String::new();
    for n in 0..100 {
        script += &format!(": a comment to fill the line; echo {n} >> /lines\n");
    }
    assert!(script.len() >= 4096);
    guest.send_bytes(script.as_bytes());
    guest.send("echo lines=$(wc -l < /lines),sum=$(awk '{s+=$1} END {print s}' /lines)");
    guest.expect("lines=100,sum=4950", SOON);

    let shown = guest.console().len();
    guest.send("yes 0123456789abcdef0123456789abcdef | head -n 30000; echo en\"\"d");
    guest.expect("\r\nend\r\n", SOON * 2);
    let text = guest.console();
    let lines = text[shown..].matches("0123456789abcdef0123456789abcdef\r\n").count();
    assert_eq!(lines, 30000);
    guest.send_bytes(b"\x01x");
    assert_eq!(guest.wait_exit(SOON), 0);
    assert!(!guest.console().contains("were lost"));
}

#[test]
fn other_ports_lead_to_a_socket_a_pseudo_terminal_and_a_file() {
    let _turn = one_guest_at_a_time();
    let scratch = |name: &str| std::env::temp_dir().join(format!("subring-{name}-{}", std::process::id()));
    let (socket, file) = (scratch("com1"), scratch("com3"));
    let serial = [
        format!("--serial=unix={}", socket.display()),
        "--serial=pty".into(),
        format!("--serial=file={}", file.display()),
    ];
    let args = or_skip!(
        "other_ports_lead_to_a_socket_a_pseudo_terminal_and_a_file",
        debian(&serial.each_ref().map(String::as_str))
    );
    let mut guest = Guest::spawn(args);
    guest.expect(&format!("subring: COM1 is {}\n", socket.display()), SOON);
    guest.expect("subring: COM2 is /dev/pts/", SOON);
    guest.expect("\n", SOON);
    let said = guest.console();
    let pty = said.lines().find_map(|l| l.strip_prefix("subring: COM2 is ")).unwrap().to_owned();
    let mut com1 = UnixStream::connect(&socket).unwrap();
    com1.set_read_timeout(Some(BOOT)).unwrap();
    let until = |com1: &mut UnixStream, what: &str| {
        let (mut seen, mut byte) = (Vec::new(), [0u8]);
        while !seen.ends_with(what.as_bytes()) {
            com1.read_exact(&mut byte).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&seen)));
            seen.push(byte[0]);
        }
    };
    until(&mut com1, PROMPT);
    com1.write_all(b"echo to-com2 > /dev/ttyS1; echo to-com3 > /dev/ttyS2; echo do\"\"ne\n").unwrap();
    until(&mut com1, "done\r\n");
    let mut com2 = std::fs::File::open(&pty).unwrap();
    let mut got = [0u8; 9];
    com2.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"to-com2\r\n");
    com1.write_all(b"poweroff -f\n").unwrap();
    assert_eq!(guest.wait_exit(BOOT), 0);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "to-com3\r\n");
    assert!(!socket.exists());
    std::fs::remove_file(&file).unwrap();
}
