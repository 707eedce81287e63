"""Follows a SPIFFE Workload API with the unmodified PyPI client `spiffe`: one JSON object a line for each thing heard.

Usage: spiffe_client.py SOCKET [UID]

With UID it becomes that user first, its group unchanged.
"""

import hashlib
import json
import os
import sys
import threading

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from spiffe import WorkloadApiClient


def say(**what):
    print(json.dumps(what), flush=True)


def digest(certificate):
    return hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()


def roots_of(bundles):
    return {str(b.trust_domain): sorted(digest(c) for c in b.x509_authorities) for b in bundles}


def leads_to(chain, roots):
    """The root that the chain leads to, link by link, by somebody else's code."""
    for certificate, signer in zip(chain, chain[1:]):
        certificate.verify_directly_issued_by(signer)
    for root in roots:
        try:
            chain[-1].verify_directly_issued_by(root)
            return digest(root)
        except Exception:
            continue
    return None


def heard(context):
    bundles = context.x509_bundle_set.bundles
    authorities = [root for bundle in bundles for root in bundle.x509_authorities]
    svids = []
    for svid in context.x509_svids:
        assert isinstance(svid.private_key, ec.EllipticCurvePrivateKey)
        same = svid.private_key.public_key().public_numbers() == svid.leaf.public_key().public_numbers()
        serial = format(svid.leaf.serial_number, "x")
        root = leads_to(svid.cert_chain, authorities)
        svids.append({"id": str(svid.spiffe_id), "serial": serial, "key_fits": same, "root": root})
    say(event="svids", svids=svids, roots=roots_of(bundles))


def main():
    # After the imports: another user may not be able to read them.
    if len(sys.argv) > 2:
        os.setuid(int(sys.argv[2]))
    client = WorkloadApiClient("unix://" + sys.argv[1])
    over = threading.Event()

    def failed(error):
        say(event="ended", error=str(error))
        over.set()

    try:
        say(event="fetched", id=str(client.fetch_x509_svid(timeout=20).spiffe_id))
    except Exception as error:
        say(event="refused", error=str(error))
        return
    say(event="bundles", roots=roots_of(client.fetch_x509_bundles(timeout=20).bundles))
    try:
        client.fetch_jwt_svid(audience={"x"}, timeout=20)
    except Exception as error:
        say(event="jwt", error=str(error))
    client.stream_x509_contexts(heard, failed, retry_connect=False)
    over.wait()


main()
