"""The RSA key of the fake autoscaler: made, kept in a file, shown as PEM, used to sign.

A signature covers the worker's url alone, as Vast signs it (vastai 1.9.1, server/lib/backend.py).
"""

import base64
import json
import os
from pathlib import Path

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

BITS = 2048  # as Vast's key, so that verification takes as long as in production


def load_or_make(path: Path | None = None) -> rsa.RSAPrivateKey:
    """The key in the PEM file at `path`; a new one when there is no such file (written there, mode 0600) or no path.

    Raises ValueError when the file holds something else, OSError when it cannot be read or written.
    """
    if path is not None and path.exists():
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        if not isinstance(key, rsa.RSAPrivateKey):
            raise ValueError(f"{path} holds no RSA key")
        return key
    key = rsa.generate_private_key(public_exponent=65537, key_size=BITS)
    if path is not None:
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(pem)
    return key


def public_pem(key: rsa.RSAPrivateKey) -> str:
    """The answer of GET /pubkey/: PEM, SubjectPublicKeyInfo."""
    pem = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return pem.decode()


def sign(key: rsa.RSAPrivateKey, url: str) -> str:
    """The `signature` of a grant for the worker at `url`: base64 of PKCS#1 v1.5 over SHA-256."""
    signed = json.dumps({"url": url}, indent=4, sort_keys=True).encode()
    return base64.b64encode(key.sign(signed, padding.PKCS1v15(), hashes.SHA256())).decode()
