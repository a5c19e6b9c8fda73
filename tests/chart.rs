//! A bar chart of ratios on a logarithmic axis, as SVG text.

use std::fmt::Write;

const LEFT: f64 = 190.0;
const WIDTH: f64 = 520.0;
const STEP: f64 = 20.0;
const TOP: f64 = 44.0;

/// A bar for each (name, ratio): to the right of 1 it is ahead, to the left behind. Ratios that are no positive
/// number get no bar.
#[must_use]
pub fn svg(title: &str, bars: &[(String, f64)]) -> String {
    let drawn = || bars.iter().filter(|(_, ratio)| ratio.is_finite() && *ratio > 0.0);
    let decades = |r: f64| r.log10();
    let low = drawn().map(|b| decades(b.1)).fold(-1.0, f64::min).floor();
    let high = drawn().map(|b| decades(b.1)).fold(1.0, f64::max).ceil();
    let x = |ratio: f64| LEFT + (decades(ratio) - low) / (high - low) * WIDTH;
    let bottom = TOP + STEP * drawn().count() as f64;
    let (full_width, full_height) = (LEFT + WIDTH + 70.0, bottom + 12.0);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{full_width}\" height=\"{full_height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"10\" y=\"18\" font-size=\"14\">{}</text>\n",
        escape(title)
    );
    let mut decade = low;
    while decade <= high {
        let (value, colour) = (10f64.powf(decade), if decade == 0.0 { "#000" } else { "#ccc" });
        let at = x(value);
        let _ = writeln!(
            out,
            "<text x=\"{at:.1}\" y=\"36\" text-anchor=\"middle\">{value}</text>\
             <path d=\"M{at:.1} 40V{bottom}\" stroke=\"{colour}\"/>"
        );
        decade += 1.0;
    }
    for (i, (name, ratio)) in drawn().enumerate() {
        let y = TOP + STEP * i as f64;
        let (from, to) = (x(1.0).min(x(*ratio)), x(1.0).max(x(*ratio)));
        let colour = if *ratio >= 1.0 { "#2a7" } else { "#c53" };
        let _ = writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
             <rect x=\"{from:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"14\" fill=\"{colour}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\">{ratio:.2}</text>",
            LEFT - 8.0,
            y + 13.0,
            escape(name),
            y + 2.0,
            to - from,
            to + 5.0,
            y + 13.0,
        );
    }
    out.push_str("</svg>\n");
    out
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_behind_ends_where_a_bar_ahead_begins() {
        let text = svg("t", &[("ahead".into(), 10.0), ("behind".into(), 0.1)]);
        let middle = LEFT + WIDTH / 2.0;
        assert!(text.contains(&format!("<rect x=\"{middle:.1}\" y=\"46.0\" width=\"{:.1}\"", WIDTH / 2.0)));
        assert!(text.contains(&format!("<rect x=\"{LEFT:.1}\" y=\"66.0\" width=\"{:.1}\"", WIDTH / 2.0)));
    }

    #[test]
    fn what_was_not_measured_has_no_bar_and_names_cannot_end_the_picture() {
        let text = svg("a < b", &[("</svg>".into(), 2.0), ("gone".into(), f64::NAN)]);
        assert!(!text.contains("gone") && !text.contains("NaN"));
        assert_eq!(text.matches("</svg>").count(), 1);
    }
}
