//! Aligned tables.

/// Renders rows below `header`, each column as wide as its widest cell, two spaces between.
pub(crate) fn render<const COLUMNS: usize>(header: [&str; COLUMNS], rows: &[[String; COLUMNS]]) -> String {
    let mut widths = header.map(|cell| cell.chars().count());
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &[String; COLUMNS]| {
        let padded: Vec<String> = cells.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        padded.join("  ").trim_end().to_owned() + "\n"
    };
    line(&header.map(str::to_owned)) + &rows.iter().map(line).collect::<String>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [["web-1".to_owned(), "alive".to_owned()], ["a".to_owned(), "left".to_owned()]];
        assert_eq!(render(["Node", "Status"], &rows), "Node   Status\nweb-1  alive\na      left\n");
    }
}
