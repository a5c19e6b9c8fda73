//! Benchmark bookkeeping: medians, spread, and what machine it was.

use serde_json::{Value, json};

/// Some measurements of one thing, in one unit.
#[derive(Clone, Debug, Default)]
pub struct Series(pub Vec<f64>);

impl Series {
    /// The middle value (of an even number: the mean of the middle two); NaN of none.
    #[must_use]
    pub fn median(&self) -> f64 {
        let mut v = self.0.clone();
        v.sort_by(f64::total_cmp);
        match v.len() {
            0 => f64::NAN,
            n if n % 2 == 1 => v[n / 2],
            n => (v[n / 2 - 1] + v[n / 2]) / 2.0,
        }
    }
    /// The smallest value; infinity of none.
    #[must_use]
    pub fn min(&self) -> f64 {
        self.0.iter().copied().fold(f64::INFINITY, f64::min)
    }
    /// The largest value; minus infinity of none.
    #[must_use]
    pub fn max(&self) -> f64 {
        self.0.iter().copied().fold(f64::NEG_INFINITY, f64::max)
    }
    /// Largest less smallest, as a share of the median.
    #[must_use]
    pub fn spread(&self) -> f64 {
        (self.max() - self.min()) / self.median()
    }
    /// One line for people.
    #[must_use]
    pub fn line(&self, unit: &str) -> String {
        format!(
            "median {:.3} {unit}, {:.3} to {:.3}, spread {:.1} % of {}",
            self.median(),
            self.min(),
            self.max(),
            self.spread() * 100.0,
            self.0.len()
        )
    }
    /// For machines.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({ "values": self.0, "median": self.median(), "min": self.min(), "max": self.max() })
    }
}

/// What a result must be read with: CPU, host kernel, load.
#[must_use]
pub fn host() -> Value {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let cpu = cpuinfo.lines().find_map(|l| l.strip_prefix("model name")).unwrap_or("");
    json!({
        "cpu": cpu.trim_start_matches([' ', '\t', ':']),
        "cpus": std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "loadavg": read("/proc/loadavg").split(' ').next().unwrap_or(""),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_does_not_depend_on_the_order_and_ignores_one_outlier() {
        assert_eq!(Series(vec![5.0, 1.0, 100.0]).median(), 5.0);
        assert_eq!(Series(vec![4.0, 1.0, 2.0, 3.0]).median(), 2.5);
        assert!(Series::default().median().is_nan());
    }

    #[test]
    fn the_spread_is_relative_to_the_median() {
        assert!((Series(vec![9.0, 10.0, 11.0]).spread() - 0.2).abs() < 1e-12);
    }
}
