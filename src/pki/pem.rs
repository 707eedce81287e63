//! PEM (RFC 7468) of what others are to read.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// Characters of base64 in a line (RFC 7468 §2).
const PEM_LINE: usize = 64;

/// Writes `der` as a block of `label`.
pub fn pem(label: &str, der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let mut pem = format!("-----BEGIN {label}-----\n");
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let (line, left) = rest.split_at(rest.len().min(PEM_LINE));
        pem.push_str(line);
        pem.push('\n');
        rest = left;
    }
    pem + "-----END " + label + "-----\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pem_has_lines_of_64_characters_and_both_ends() {
        let text = pem("X", &[0; 49]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4);
        assert_eq!(
            (lines[0], lines[1].len(), lines[2].len(), lines[3]),
            ("-----BEGIN X-----", 64, 4, "-----END X-----")
        );
        let root = rustls::pki_types::CertificateDer::from(vec![1]);
        assert!(pem("CERTIFICATE", &root).contains("AQ=="));
    }
}
