//! One plot by hand: which part of the nodes had it by when, and what each sends at rest.

use std::fmt::Write as _;
use std::time::Duration;

use super::stats::Times;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 360.0;
const MARGIN: f64 = 48.0;
/// Height of a bar or a note below the plot.
const LINE: f64 = 22.0;
const COLOURS: [&str; 6] = ["#1b6ca8", "#c8553d", "#3a7d44", "#8a4fff", "#b8860b", "#444444"];

/// A quantity per node beside its bound, drawn as a bar.
#[derive(Debug, Clone)]
pub(crate) struct Bar {
    /// What it is, with its unit.
    pub(crate) name: String,
    pub(crate) value: f64,
    pub(crate) bound: f64,
}

/// Draws one line per series, the part of the nodes (0 to 1) over time, the bars below, and `notes` under them.
pub(crate) fn plot(title: &str, series: &[(String, Times)], bars: &[Bar], notes: &[&str]) -> String {
    let end = series.iter().map(|(_, times)| times.max()).max().unwrap_or_default().max(Duration::from_millis(1));
    let (inner_width, inner_height) = (WIDTH - 2.0 * MARGIN, HEIGHT - 2.0 * MARGIN);
    let x = |time: Duration| MARGIN + inner_width * time.as_secs_f64() / end.as_secs_f64();
    let y = |part: f64| HEIGHT - MARGIN - inner_height * part;
    let whole_height = HEIGHT + LINE * (bars.len() + notes.len()) as f64;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {whole_height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{whole_height}\" fill=\"white\"/>\n\
         <text x=\"{MARGIN}\" y=\"24\" font-size=\"15\">{title}</text>\n"
    );
    for tick in 0..=4 {
        let part = f64::from(tick) / 4.0;
        let time = end.mul_f64(part);
        let _infallible = write!(
            svg,
            "<line x1=\"{MARGIN}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#dddddd\"/>\n\
             <text x=\"{left}\" y=\"{text:.1}\" text-anchor=\"end\">{percent} %</text>\n\
             <text x=\"{x:.1}\" y=\"{bottom}\" text-anchor=\"middle\">{seconds:.2} s</text>\n",
            right = WIDTH - MARGIN,
            y = y(part),
            left = MARGIN - 6.0,
            text = y(part) + 4.0,
            percent = tick * 25,
            x = x(time),
            bottom = HEIGHT - MARGIN + 18.0,
            seconds = time.as_secs_f64(),
        );
    }
    for (at, (name, times)) in series.iter().enumerate() {
        let colour = COLOURS[at % COLOURS.len()];
        let mut sorted = times.0.clone();
        sorted.sort();
        let count = sorted.len().max(1);
        // A thousand points draw as well as a million.
        let step = (count / 1000).max(1);
        let mut points = format!("{:.1},{:.1}", x(Duration::ZERO), y(0.0));
        for (rank, time) in sorted.iter().enumerate().filter(|(rank, _)| rank % step == 0 || rank + 1 == count) {
            let _infallible = write!(points, " {:.1},{:.1}", x(*time), y((rank + 1) as f64 / count as f64));
        }
        let legend = MARGIN + 18.0 * at as f64;
        let _infallible = write!(
            svg,
            "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" points=\"{points}\"/>\n\
             <text x=\"{}\" y=\"{legend:.1}\" text-anchor=\"end\" fill=\"{colour}\">{name}</text>\n",
            WIDTH - MARGIN
        );
    }
    for (at, bar) in bars.iter().enumerate() {
        draw(&mut svg, bar, HEIGHT + LINE * at as f64);
    }
    for (at, note) in notes.iter().enumerate() {
        let y = HEIGHT + LINE * (bars.len() + at) as f64 + 4.0;
        let _infallible = writeln!(svg, "<text x=\"{MARGIN}\" y=\"{y:.1}\" fill=\"#555555\">{note}</text>");
    }
    svg.push_str("</svg>\n");
    svg
}

/// Draws a bar in the line at `y`: the right half is as wide as 1.25 times the bound, which is marked.
fn draw(svg: &mut String, bar: &Bar, y: f64) {
    let (left, width) = (WIDTH / 2.0, WIDTH / 2.0 - MARGIN);
    let x = |value: f64| width * (value / (1.25 * bar.bound)).clamp(0.0, 1.0);
    let (top, mark) = (y - 8.0, left + x(bar.bound));
    let _infallible = write!(
        svg,
        "<text x=\"{MARGIN}\" y=\"{text:.1}\">{name}: {value:.0} (at most {bound:.0})</text>\n\
         <rect x=\"{left}\" y=\"{top:.1}\" width=\"{filled:.1}\" height=\"14\" fill=\"{colour}\"/>\n\
         <line x1=\"{mark:.1}\" x2=\"{mark:.1}\" y1=\"{top:.1}\" y2=\"{bottom:.1}\" stroke=\"#222222\" stroke-width=\"2\"/>\n",
        text = y + 4.0,
        name = bar.name,
        value = bar.value,
        bound = bar.bound,
        filled = x(bar.value),
        colour = COLOURS[2],
        bottom = top + 14.0,
    );
}
