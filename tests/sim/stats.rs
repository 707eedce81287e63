//! Percentiles and tables.

use std::time::Duration;

/// Measured times.
#[derive(Debug, Clone, Default)]
pub(crate) struct Times(pub(crate) Vec<Duration>);

impl Times {
    /// Returns the time below which `percent` of all lie; zero if there are none.
    pub(crate) fn percentile(&self, percent: f64) -> Duration {
        let mut sorted = self.0.clone();
        sorted.sort();
        let last = sorted.len().saturating_sub(1);
        let at = ((percent / 100.0) * sorted.len() as f64).ceil() as usize;
        sorted.get(at.saturating_sub(1).min(last)).copied().unwrap_or_default()
    }

    pub(crate) fn max(&self) -> Duration {
        self.0.iter().max().copied().unwrap_or_default()
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.0.extend(other.0);
    }
}

/// Writes a duration for people.
pub(crate) fn show(time: Duration) -> String {
    if time >= Duration::from_secs(10) {
        format!("{:.1} s", time.as_secs_f64())
    } else if time >= Duration::from_secs(1) {
        format!("{:.2} s", time.as_secs_f64())
    } else {
        format!("{} ms", time.as_millis())
    }
}

/// Lines up cells: the first column to the left, the others to the right.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, width))| {
            if column == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
        });
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}
