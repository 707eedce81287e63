//! Aligned tables, and the same rows as JSON.

use serde_json::{Map, Value};

use crate::cli::Format;

/// Prints rows below `header`; as JSON a list of objects whose keys are the header's words, joined: `May sign` is `MaySign`.
pub(crate) fn show<const COLUMNS: usize>(format: Format, header: [&str; COLUMNS], rows: &[[String; COLUMNS]]) {
    match format {
        Format::Pretty => print!("{}", render(header, rows)),
        Format::Json => println!("{:#}", objects(header, rows)),
    }
}

fn objects<const COLUMNS: usize>(header: [&str; COLUMNS], rows: &[[String; COLUMNS]]) -> Value {
    let keys = header.map(|title| {
        let word = |word: &str| {
            let mut letters = word.chars();
            letters.next().map(|first| first.to_ascii_uppercase().to_string() + letters.as_str()).unwrap_or_default()
        };
        title.split(' ').map(word).collect::<String>()
    });
    let object = |row: &[String; COLUMNS]| {
        let pairs = keys.iter().cloned().zip(row.iter().cloned().map(Value::from));
        Value::Object(pairs.collect::<Map<String, Value>>())
    };
    rows.iter().map(object).collect()
}

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
    fn the_same_rows_make_objects_with_the_header_s_words_as_keys() {
        let rows = [["alice".to_owned(), "config".to_owned()]];
        assert_eq!(
            objects(["Operator", "May sign"], &rows).to_string(),
            r#"[{"MaySign":"config","Operator":"alice"}]"#
        );
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [["web-1".to_owned(), "alive".to_owned()], ["a".to_owned(), "left".to_owned()]];
        assert_eq!(render(["Node", "Status"], &rows), "Node   Status\nweb-1  alive\na      left\n");
    }
}
