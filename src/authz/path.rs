//! The normal form of a request's path, by which it is authorized.
//!
//! An app may take `/a/../b`, `/a//b` or `/%61` for another path than the permission's author did. So a path that is not
//! in its normal form must be allowed both as it stands and normalized. Two steps of the normal form can be taken one
//! without the other, and where one of them is `..` that leads elsewhere (`/a//../b` is `/b` or `/a/b`): that is refused,
//! like all that stays ambiguous. Upper and lower case differ, as does a slash at the end.

use std::borrow::Cow;

/// A path as permissions see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Seen<'p> {
    /// It is in its normal form.
    Plain(&'p str),
    /// It is not: both forms count.
    Both(&'p str, String),
    /// Nobody can tell what an app makes of it.
    Ambiguous,
}

/// Cuts the query off and looks at the rest.
pub(super) fn look(target: &str) -> Seen<'_> {
    let path = target.split(['?', '#']).next().unwrap_or_default();
    if !path.starts_with('/') {
        // `OPTIONS *` is about the server; nothing else begins otherwise.
        return if path == "*" { Seen::Plain(path) } else { Seen::Ambiguous };
    }
    let is_plain = !path.contains(['%', '\\', ';']) && !path.contains("//") && !path.contains("/.");
    if is_plain {
        return Seen::Plain(path);
    }
    let Some(decoded) = decode(path) else { return Seen::Ambiguous };
    let goes_up = decoded.split('/').any(|segment| segment.split(';').next() == Some(".."));
    if goes_up && (path.contains(['%', ';']) || path.contains("//")) {
        return Seen::Ambiguous;
    }
    let normal = resolve(&decoded);
    if normal == path { Seen::Plain(path) } else { Seen::Both(path, normal) }
}

/// Most readings that a path has.
pub const READINGS_MAX: usize = 3;

/// Returns what apps may take a path for, as it stands first; its query is cut off.
///
/// A path in its normal form has that reading alone, another one its normal form beside it. Where nobody can tell what an app
/// makes of it (`/a/%2e%2e/b`, `/a%2Fb`), all is decoded, twice, and dots are resolved once after slashes are joined and once
/// before.
pub fn readings(target: &str) -> [Option<Cow<'_, str>>; READINGS_MAX] {
    match look(target) {
        Seen::Plain(path) => [Some(path.into()), None, None],
        Seen::Both(path, normal) => [Some(path.into()), Some(normal.into()), None],
        Seen::Ambiguous => {
            let path = target.split(['?', '#']).next().unwrap_or_default();
            let decoded = decode_all(&decode_all(path));
            [Some(path.into()), Some(resolve(&decoded).into()), Some(resolve(&without_dots(&decoded)).into())]
        }
    }
}

/// Decodes every percent sign that can be, separators included.
fn decode_all(path: &str) -> String {
    let mut out = Vec::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let Some((byte, after)) = rest.split_first() {
        let digit = |at: usize| after.get(at).and_then(|byte| char::from(*byte).to_digit(16));
        let decoded = digit(0).zip(digit(1)).and_then(|(high, low)| u8::try_from(high * 16 + low).ok());
        let (byte, after) = match decoded.filter(|_| *byte == b'%') {
            Some(decoded) => (decoded, after.get(2..).unwrap_or_default()),
            None => (*byte, after),
        };
        out.push(if byte == b'\\' { b'/' } else { byte });
        rest = after;
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Resolves `.` and `..` where two slashes have an empty segment between them (RFC 3986 §5.2.4).
fn without_dots(path: &str) -> String {
    let mut segments: Vec<&str> = Vec::new();
    let mut ends_in_dots = false;
    for segment in path.split('/').skip(1) {
        let segment = segment.split(';').next().unwrap_or_default();
        ends_in_dots = matches!(segment, "." | "..");
        match segment {
            "." => {}
            ".." => drop(segments.pop()),
            other => segments.push(other),
        }
    }
    format!("/{}{}", segments.join("/"), if ends_in_dots && !segments.is_empty() { "/" } else { "" })
}

/// Decodes percent signs once; none if what comes out could be read as another path still.
fn decode(path: &str) -> Option<Cow<'_, str>> {
    if path.contains('\\') {
        return None;
    }
    if !path.contains('%') {
        return Some(Cow::Borrowed(path));
    }
    let mut out = Vec::with_capacity(path.len());
    let mut bytes = path.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
        let value = digit(bytes.next())? * 16 + digit(bytes.next())?;
        match u8::try_from(value).ok()? {
            // A separator, an end of text, or the beginning of a second round.
            b'/' | b'\\' | b'%' | 0 => return None,
            other => out.push(other),
        }
    }
    String::from_utf8(out).ok().map(Cow::Owned)
}

/// Resolves `.` and `..` (RFC 3986 §5.2.4), joins slashes, drops parameters after `;`.
fn resolve(path: &str) -> String {
    let mut segments: Vec<&str> = Vec::new();
    let mut is_directory = true;
    for segment in path.split('/').skip(1) {
        let segment = segment.split(';').next().unwrap_or_default();
        is_directory = matches!(segment, "" | "." | "..");
        match segment {
            "" | "." => {}
            ".." => drop(segments.pop()),
            other => segments.push(other),
        }
    }
    let end = if is_directory && !segments.is_empty() { "/" } else { "" };
    format!("/{}{end}", segments.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_seen_in_its_normal_form_without_its_query() {
        #[track_caller]
        fn check(target: &str, want: &Seen<'_>) {
            assert_eq!(look(target), *want, "{target}");
        }
        let both = |raw: &'static str, normal: &str| Seen::Both(raw, normal.to_owned());
        check("/a/b?x=//..", &Seen::Plain("/a/b"));
        check("/", &Seen::Plain("/"));
        check("*", &Seen::Plain("*"));
        check("/a/../b", &both("/a/../b", "/b"));
        check("/../../b", &both("/../../b", "/b"));
        check("/a//b/", &both("/a//b/", "/a/b/"));
        check("/a/./b/.", &both("/a/./b/.", "/a/b/"));
        check("/%61dmin", &both("/%61dmin", "/admin"));
        check("/%2e/b", &both("/%2e/b", "/b"));
        check("/a;x=1/b", &both("/a;x=1/b", "/a/b"));
        check("/.well-known/x", &Seen::Plain("/.well-known/x"));
        let ambiguous = ["/a%2fb", "/a%5Cb", "/a\\b", "/%2561", "/%00", "/%", "/%g1", "/%ff", "", "a", "a;/b"];
        let up = ["/%2e%2e/b", "/a//../b", "/a/..;/b", "/a;/../b", "/a/;x/../b", "/%61/../b"];
        for ambiguous in ambiguous.into_iter().chain(up) {
            check(ambiguous, &Seen::Ambiguous);
        }
    }

    #[test]
    fn a_path_has_the_readings_of_all_apps() {
        #[track_caller]
        fn check(target: &str, want: &[&str]) {
            let found: Vec<_> = readings(target).into_iter().flatten().collect();
            assert_eq!(found, want, "{target}");
        }
        check("/search?q=1", &["/search"]);
        check("/%73earch", &["/%73earch", "/search"]);
        check("//search", &["//search", "/search"]);
        check("/x/../search", &["/x/../search", "/search"]);
        check("/x/%2e%2e/search", &["/x/%2e%2e/search", "/search", "/search"]);
        check("/%2573earch", &["/%2573earch", "/search", "/search"]);
        check("/x%5c..%2Fsearch", &["/x%5c..%2Fsearch", "/search", "/search"]);
        // Two slashes are one or have a segment between them.
        check("/%73earch//../x", &["/%73earch//../x", "/x", "/search/x"]);
        check("/%", &["/%", "/%", "/%"]);
        check("/a%2Fb", &["/a%2Fb", "/a/b", "/a/b"]);
        check("a", &["a", "/", "/"]);
        check("*", &["*"]);
    }

    proptest::proptest! {
        #[test]
        fn any_target_is_seen_without_a_panic_and_a_normal_form_is_its_own(target in "[/.%;\\\\a-c0-9?]{0,24}") {
            for reading in readings(&target).into_iter().flatten().skip(1) {
                proptest::prop_assert!(!reading.contains("//") && !reading.split('/').any(|part| part == ".."));
            }
            if let Seen::Both(_, normal) = look(&target) {
                proptest::prop_assert!(!normal.contains("//") && !normal.split('/').any(|part| part == ".."));
            }
        }
    }
}
