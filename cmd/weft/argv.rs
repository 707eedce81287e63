//! Consul's spelling of flags: one dash and a word is taken as two dashes and the word.

use std::ffi::OsString;

/// Rewrites `-node x` and `-node=x` to `--node …`; `-h`, `-1`, `-`, `--x` and all that follows `--` stay as they are.
pub(crate) fn normalize(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut verbatim = false;
    let rewrite = |arg: OsString| {
        verbatim = verbatim || arg == "--";
        if verbatim || !is_single_dash_word(arg.as_encoded_bytes()) {
            return arg;
        }
        let mut long = OsString::from("-");
        long.push(arg);
        long
    };
    args.into_iter().map(rewrite).collect()
}

/// One dash, then at least two characters, the first one a letter.
fn is_single_dash_word(arg: &[u8]) -> bool {
    match arg {
        [b'-', first, second, ..] => first.is_ascii_alphabetic() && *second != b'=',
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_dash_and_a_word_become_two_dashes() {
        #[track_caller]
        fn check(given: &[&str], want: &[&str]) {
            assert_eq!(normalize(given.iter().map(OsString::from)), want, "{given:?}");
        }
        check(&["-node", "x"], &["--node", "x"]);
        check(&["-node=x"], &["--node=x"]);
        check(&["--node", "x"], &["--node", "x"]);
        check(&["-http-port", "-1"], &["--http-port", "-1"]);
        check(&["-h", "-", "-1x", "--"], &["-h", "-", "-1x", "--"]);
        check(&["-prune", "--", "-node"], &["--prune", "--", "-node"]);
        check(&["-n=x"], &["-n=x"]);
        check(&["weft", "a-b"], &["weft", "a-b"]);
    }
}
