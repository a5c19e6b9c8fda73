//! The guest's lines to the outside: serial backends and the terminal.

use crate::config::{RunConfig, SerialTarget};
use crate::devices::ns16550a::{SerialSink, WriterSink};
use crate::em::attention::{Attention, Request};
use crate::outcome::Ending;
use std::io::Read;
use std::sync::Arc;

/// tmp
pub struct Console {
    stdio: Option<usize>,
}
impl Console {
    /// tmp
    pub fn open(config: &RunConfig, attention: &Arc<Attention>) -> Result<Console, Ending> {
        let stdio = config.serial.iter().position(|s| matches!(s, SerialTarget::Stdio { .. }));
        if let Some(port) = stdio {
            let attention = attention.clone();
            std::thread::spawn(move || {
                let mut buf = [0u8; 256];
                while let Ok(n) = std::io::stdin().read(&mut buf) {
                    if n == 0 {
                        break;
                    }
                    attention.request(Request::SerialInput(port, buf[..n].to_vec()));
                }
            });
        }
        Ok(Console { stdio })
    }
    /// tmp
    pub fn sinks(&self) -> [Option<Box<dyn SerialSink>>; 4] {
        let mut s: [Option<Box<dyn SerialSink>>; 4] = [None, None, None, None];
        if let Some(i) = self.stdio {
            s[i] = Some(Box::new(WriterSink(std::io::stdout())));
        }
        s
    }
    /// tmp
    pub fn flush(&self) {}
}
