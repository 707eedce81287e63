//! The messages of `SpiffeWorkloadAPI` that weft speaks, field for field as `workload.proto` numbers them, and gRPC's frame
//! around them.

use bytes::{BufMut as _, Bytes, BytesMut};
use prost::Message;

use crate::pki::{Svid, TrustBundle};

/// Largest request, in bytes: the X.509 requests are empty.
pub(super) const REQUEST_BYTES_MAX: usize = 4096;
/// gRPC's frame: a compression flag and a length of four bytes.
const PREFIX_BYTES: usize = 5;

/// `X509SVIDResponse`
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct SvidsResponse {
    #[prost(message, repeated, tag = "1")]
    pub(super) svids: Vec<X509Svid>,
}

/// `X509SVID`
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct X509Svid {
    #[prost(string, tag = "1")]
    pub(super) spiffe_id: String,
    /// DER, one after the other: leaf, node intermediate, issuer.
    #[prost(bytes = "bytes", tag = "2")]
    pub(super) chain: Bytes,
    /// PKCS#8 DER.
    #[prost(bytes = "bytes", tag = "3")]
    pub(super) key: Bytes,
    /// DER of the roots, one after the other.
    #[prost(bytes = "bytes", tag = "4")]
    pub(super) bundle: Bytes,
    #[prost(string, tag = "5")]
    pub(super) hint: String,
}

/// `X509BundlesResponse`
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct BundlesResponse {
    /// By the trust domain's SPIFFE id.
    #[prost(btree_map = "string, bytes", tag = "2")]
    pub(super) bundles: std::collections::BTreeMap<String, Vec<u8>>,
}

/// DER of the roots, one after the other, the newest first.
fn roots(bundle: &TrustBundle) -> Bytes {
    bundle.roots.iter().flat_map(|root| root.iter().copied()).collect()
}

/// Puts certificates together; the hint of each is the name of its service, so that a client can choose.
pub(super) fn svids<'a>(svids: impl Iterator<Item = &'a Svid>, bundle: &TrustBundle) -> SvidsResponse {
    let bundle = roots(bundle);
    let one = |svid: &'a Svid| X509Svid {
        spiffe_id: svid.id.to_string(),
        chain: svid.chain.iter().flat_map(|der| der.iter().copied()).collect(),
        key: Bytes::copy_from_slice(svid.key.secret_der()),
        bundle: bundle.clone(),
        hint: svid.id.service().map(ToString::to_string).unwrap_or_default(),
    };
    SvidsResponse { svids: svids.map(one).collect() }
}

/// The roots of the trust domain.
pub(super) fn bundles(bundle: &TrustBundle) -> BundlesResponse {
    let id = format!("spiffe://{}", bundle.trust_domain);
    BundlesResponse { bundles: [(id, roots(bundle).to_vec())].into() }
}

/// Frames one message, uncompressed.
pub(super) fn frame(message: &impl Message) -> Bytes {
    let length = message.encoded_len();
    let mut bytes = BytesMut::with_capacity(PREFIX_BYTES + length);
    bytes.put_u8(0);
    bytes.put_u32(u32::try_from(length).expect("certificates of one host are far below 4 GiB"));
    message.encode(&mut bytes).expect("the buffer grows");
    bytes.freeze()
}

/// Takes the one message of a unary request out of its frame; none if it is none, or compressed.
pub(super) fn unframe(body: &[u8]) -> Option<&[u8]> {
    let (prefix, message) = body.split_at_checked(PREFIX_BYTES)?;
    let (flag, length) = prefix.split_first()?;
    let length = usize::try_from(u32::from_be_bytes(length.try_into().ok()?)).ok()?;
    (*flag == 0 && length == message.len()).then_some(message)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn messages_have_the_numbers_of_the_standard() {
        let svid = X509Svid {
            spiffe_id: "i".to_owned(),
            chain: Bytes::from_static(b"c"),
            key: Bytes::from_static(b"k"),
            bundle: Bytes::from_static(b"b"),
            hint: "h".to_owned(),
        };
        let framed = frame(&SvidsResponse { svids: vec![svid] });
        assert_eq!(&framed[..], b"\0\0\0\0\x11\x0a\x0f\x0a\x01i\x12\x01c\x1a\x01k\x22\x01b\x2a\x01h");
        let framed = frame(&BundlesResponse { bundles: [("d".to_owned(), vec![b'r'])].into() });
        assert_eq!(&framed[..], b"\0\0\0\0\x08\x12\x06\x0a\x01d\x12\x01r");
    }

    proptest! {
        #[test]
        fn a_frame_holds_one_plain_message_and_all_else_is_refused(message in proptest::collection::vec(any::<u8>(), 0..40), flag in 0_u8..3, cut in 0_usize..50) {
            let mut body = vec![flag];
            body.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
            body.extend(&message);
            let want = (flag == 0).then_some(message.as_slice());
            prop_assert_eq!(unframe(&body), want);
            if cut < body.len() {
                prop_assert_eq!(unframe(&body[..cut]), None);
            }
            body.push(0);
            prop_assert_eq!(unframe(&body), None);
        }
    }
}
