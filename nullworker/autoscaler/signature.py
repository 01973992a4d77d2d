"""Verifies the autoscaler's signature, as vastai 1.9.1 makes and checks it (server/lib/backend.py). Pure.

`cryptography` takes 25 ms and 7 MB to import. This module is imported when the key has been fetched, after the ports
are open.
"""

from __future__ import annotations

import base64
import hmac
import json

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_public_key


class PublicKey:
    """The autoscaler's public key, from PEM.

    Raises:
        ValueError: it is no RSA public key in PEM.
    """

    def __init__(self, pem: bytes) -> None:
        try:
            key = load_pem_public_key(pem)
        except UnsupportedAlgorithm as error:
            raise ValueError("the autoscaler's key is of an unknown kind") from error
        if not isinstance(key, RSAPublicKey):
            raise ValueError("the autoscaler's key is not an RSA key")
        self._key = key
        self._good: tuple[str, bytes] | None = None
        self.verify("", "A" * 342 + "==")  # the first call takes 1 ms longer; do it before a request waits for it

    def verify(self, url: str, signature: str) -> bool:
        """Verify the signature of a grant for the worker at url: PKCS#1 v1.5 with SHA-256 over the url only.

        Such a signature is deterministic, so all grants for one worker have the same one. The last good one is kept
        and compared in constant time, which saves the calculation.
        """
        try:
            given = signature.encode("ascii")
            if self._good is not None and hmac.compare_digest(given, self._good[1]) and url == self._good[0]:
                return True
            self._key.verify(base64.b64decode(given), signed_bytes(url), PKCS1v15(), SHA256())
        except (InvalidSignature, ValueError):
            return False
        self._good = (url, given)
        return True


def signed_bytes(url: str) -> bytes:
    """The signed bytes: `json.dumps({"url": url}, indent=4)` (server/lib/backend.py, __check_signature)."""
    return f'{{\n    "url": {json.dumps(url)}\n}}'.encode()
