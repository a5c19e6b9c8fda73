//! What a run's user takes away from the CPU the guest sees: `-cpu host,-pge`, as QEMU spells it.

use super::features::{FEATURES, FeatureBit, Rule};

/// QEMU's names of features the manuals name otherwise.
const QEMU_NAMES: [(&str, &str); 5] = [
    ("clflush", "CLFSH"),
    ("invtsc", "InvariantTSC"),
    ("kvmclock", "CLOCKSOURCE2"),
    ("lahflm", "LAHF"),
    ("shani", "SHA"),
];

/// The host's CPU without some features.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CpuModel {
    /// Not shown, whatever their rows say.
    pub hidden: Vec<&'static FeatureBit>,
}

impl CpuModel {
    /// Parses `host` or `max`, followed by `,-NAME`, `,+NAME`, `,NAME=off` or `,NAME=on` for single features. To ask for what
    /// is shown anyway changes nothing. The error is the line to show.
    pub fn parse(text: &str) -> Result<CpuModel, String> {
        let mut words = text.split(',');
        let name = words.next().unwrap_or_default();
        if !matches!(name, "host" | "max") {
            return Err(format!("there is no CPU '{name}'; say 'host', or 'host,-FEATURE'"));
        }
        let mut model = CpuModel::default();
        for word in words {
            let (feature, shown) =
                match (word.strip_prefix('-'), word.strip_prefix('+'), word.split_once('=')) {
                    (Some(name), ..) | (_, _, Some((name, "off"))) => (find(name)?, false),
                    (_, Some(name), _) | (_, _, Some((name, "on"))) => (find(name)?, true),
                    _ => {
                        return Err(format!(
                            "'{word}' is no change of a CPU; say '-FEATURE' or 'FEATURE=off'"
                        ));
                    }
                };
            model.hidden.retain(|other| *other != feature);
            match (shown, feature.rule) {
                (true, Rule::Hidden) => {
                    return Err(format!("{} is never shown to a guest: {}", feature.name, feature.why));
                }
                (true, _) => {}
                (false, _) => model.hidden.push(feature),
            }
        }
        Ok(model)
    }
}

fn find(name: &str) -> Result<&'static FeatureBit, String> {
    let wanted = plain(name);
    let wanted =
        QEMU_NAMES.iter().find(|(qemus, _)| *qemus == wanted).map_or(wanted, |(_, manuals)| plain(manuals));
    FEATURES
        .iter()
        .find(|feature| plain(feature.name) == wanted)
        .ok_or_else(|| format!("there is no CPU feature '{name}'"))
}

/// Letters and digits, in lower case: `SSE4.1`, `sse4_1` and `sse4-1` are one name.
fn plain(name: &str) -> String {
    name.chars().filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_lowercase()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hidden(text: &str) -> Vec<&'static str> {
        CpuModel::parse(text).unwrap().hidden.iter().map(|feature| feature.name).collect()
    }

    #[test]
    fn features_are_taken_away_in_any_spelling() {
        assert_eq!(hidden("host"), [""; 0]);
        assert_eq!(hidden("host,-pge,sse4_1=off,-SSE4.2,-clflush"), ["PGE", "SSE4.1", "SSE4.2", "CLFSH"]);
        assert_eq!(hidden("max,-pge,-nx,+pge,nx=on"), [""; 0]);
    }

    #[test]
    fn what_cannot_be_is_one_line() {
        for text in ["", "486", "host,pge", "host,-", "host,-warp", "host,+avx", "host,pge=perhaps"] {
            let line = CpuModel::parse(text).unwrap_err();
            assert!(!line.is_empty() && !line.contains('\n'), "{text}: {line}");
        }
    }

    #[test]
    fn no_two_features_have_one_name() {
        for (i, a) in FEATURES.iter().enumerate() {
            assert!(FEATURES[i + 1..].iter().all(|b| plain(a.name) != plain(b.name)), "{}", a.name);
        }
    }
}
