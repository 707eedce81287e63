//! The extension of a node intermediate: the node's name and what it may serve.
//!
//! Its value is one DER UTF8String, `<node> <scope>`: a name holds no space, so the first one parts them.
//! It is not critical, so that foreign tools can still read the chain; weft's verifier requires it.
//! An operator's certificate has one of its own: a UTF8String with what the operator may sign (`model::OperatorScope`).

use rcgen::CustomExtension;
use x509_parser::asn1_rs::{FromDer as _, Oid, ToDer as _, Utf8String};
use x509_parser::certificate::X509Certificate;

use super::PkiError;
use crate::model::{NodeName, OperatorScope, ServeScope};

/// The extension's object identifier: an arc below 2.25, which needs no registration (ITU-T X.667).
const OID: [u64; 3] = [2, 25, 7_424_865_331_298_063_105];

/// The operator's extension, below 2.25 as well.
const OPERATOR_OID: [u64; 3] = [2, 25, 7_424_865_331_298_063_106];

/// Longest text of a scope, so that a certificate stays within `verify::CERTIFICATE_BYTES_MAX`.
pub(super) const SCOPE_BYTES_MAX: usize = 2048;

/// Makes the extension.
pub(super) fn encode(node: &NodeName, scope: &ServeScope) -> Result<CustomExtension, PkiError> {
    let scope = scope.to_string();
    if scope.len() > SCOPE_BYTES_MAX {
        return Err(PkiError::ScopeTooLong { bytes: scope.len(), bytes_max: SCOPE_BYTES_MAX });
    }
    let text = format!("{node} {scope}");
    let content = Utf8String::new(&text).to_der_vec().map_err(|source| PkiError::Make {
        what: "the scope extension",
        source: rcgen::Error::X509(source.to_string()),
    })?;
    Ok(CustomExtension::from_oid_content(&OID, content))
}

/// What a certificate says about a node.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NodeExtension {
    /// The certificate has no such extension.
    Absent,
    /// It has one that does not parse, or several.
    Malformed,
    /// The node and what it may serve.
    Present(NodeName, ServeScope),
}

/// Reads the extension of `certificate`.
pub(super) fn read(certificate: &X509Certificate<'_>) -> NodeExtension {
    let Ok(oid) = Oid::from(&OID) else { return NodeExtension::Malformed };
    match certificate.tbs_certificate.get_extension_unique(&oid) {
        Ok(None) => NodeExtension::Absent,
        Ok(Some(extension)) => parse(extension.value).unwrap_or(NodeExtension::Malformed),
        Err(_) => NodeExtension::Malformed,
    }
}

/// Reads the extension's value; none if it is malformed.
pub(super) fn parse(value: &[u8]) -> Option<NodeExtension> {
    let (rest, text) = Utf8String::from_der(value).ok()?;
    let (node, scope) = text.as_ref().split_once(' ')?;
    if !rest.is_empty() || scope.len() > SCOPE_BYTES_MAX {
        return None;
    }
    let (node, scope): (NodeName, ServeScope) = (node.parse().ok()?, scope.parse().ok()?);
    // One extension, one text: the reader of DER also takes lengths that are written longer than they need be.
    (encode(&node, &scope).ok()?.content() == value).then_some(NodeExtension::Present(node, scope))
}

/// Makes an operator's extension.
pub(super) fn encode_operator(may: &OperatorScope) -> Result<CustomExtension, PkiError> {
    let text = may.to_string();
    if text.len() > SCOPE_BYTES_MAX {
        return Err(PkiError::ScopeTooLong { bytes: text.len(), bytes_max: SCOPE_BYTES_MAX });
    }
    let content = Utf8String::new(&text).to_der_vec().map_err(|source| PkiError::Make {
        what: "the operator extension",
        source: rcgen::Error::X509(source.to_string()),
    })?;
    Ok(CustomExtension::from_oid_content(&OPERATOR_OID, content))
}

/// Reads what an operator's certificate allows; none if the extension is missing, malformed or there twice.
pub(super) fn read_operator(certificate: &X509Certificate<'_>) -> Option<OperatorScope> {
    let oid = Oid::from(&OPERATOR_OID).ok()?;
    parse_operator(certificate.tbs_certificate.get_extension_unique(&oid).ok()??.value)
}

/// Reads the operator's extension's value; none if it is malformed.
pub(super) fn parse_operator(value: &[u8]) -> Option<OperatorScope> {
    let (rest, text) = Utf8String::from_der(value).ok()?;
    let text = text.as_ref();
    let may: OperatorScope =
        if rest.is_empty() && text.len() <= SCOPE_BYTES_MAX { text.parse().ok()? } else { return None };
    // One extension, one text, as above.
    (encode_operator(&may).ok()?.content() == value).then_some(may)
}

/// The operator's extension as a line of OpenSSL's configuration.
pub(super) fn operator_line(may: &OperatorScope) -> String {
    let [a, b, c] = OPERATOR_OID;
    format!("{a}.{b}.{c} = ASN1:UTF8String:{may}")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn node_and_scope_survive_the_extension(node in "[a-z][a-z0-9-]{0,62}", scope in "([a-z*-]{1,20}(,[a-z*-]{1,20}){0,40})?") {
            let (node, scope): (NodeName, ServeScope) = (node.parse().unwrap(), scope.parse().unwrap());
            let extension = encode(&node, &scope).unwrap();
            prop_assert_eq!(parse(extension.content()), Some(NodeExtension::Present(node, scope)));
        }

        #[test]
        fn garbage_is_no_extension_and_no_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _unused = parse(&bytes);
        }
    }

    #[test]
    fn an_extension_that_is_written_otherwise_than_weft_writes_it_is_malformed() {
        assert!(parse(b"\x0c\x03a *").is_some() && parse(b"\x0c\x05a *,b").is_some());
        for other in
            [b"\x0c\x81\x03a *".as_slice(), b"\x0c\x06a *, b", b"\x0c\x04a * ", b"\x0c\x06a  *,b", b"\x0c\x04a  "]
        {
            assert_eq!(parse(other), None, "{}", String::from_utf8_lossy(other));
        }
    }

    #[test]
    fn a_scope_too_long_for_a_certificate_is_refused() {
        let pattern = "x".repeat(60);
        let scope: ServeScope = vec![pattern; 40].join(",").parse().unwrap();
        assert!(matches!(encode(&"a".parse().unwrap(), &scope), Err(PkiError::ScopeTooLong { .. })));
    }
}
