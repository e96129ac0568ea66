"""The operator's secret, from which two things follow: marks of tokens that are gone, and the signature of receipts."""

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recbole_unlearn.errors import InputError
from recbole_unlearn.storage import secret
from recbole_unlearn.storage.files import file_checksum, in_one_line


def ed25519() -> Any:
    """The signatures of `cryptography`; InputError where that is not installed."""
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519 as found
    except ImportError:
        raise InputError(
            "receipts are signed by the package cryptography, which is not installed: "
            "pip install 'recbole-unlearn[receipts]'"
        ) from None
    return found


class Secret:
    """32 bytes that the operator alone has."""

    def __init__(self, value: bytes):
        self._value = value

    @classmethod
    def read(cls, path: Path) -> "Secret":
        """The one of a key file; InputError where it is none."""
        return cls(secret.read(path))

    @classmethod
    def made(cls, path: Path) -> "Secret":
        """As `read`; made, for its owner's eyes alone, where there is none."""
        with in_one_line(path.parent, "key file"):
            return cls(secret.made(path))

    def _derived(self, use, content=b""):
        return hmac.digest(self._value, use + b"\0" + content, hashlib.sha256)

    @property
    def check(self) -> str:
        """Tells another secret from this one, and nothing about it."""
        return self._derived(b"check").hex()

    def mark(self, name: str, kind: str, tokens: Sequence[str]) -> str:
        """What stays of a request's tokens: whoever has them and the secret can compare, nobody else can."""
        return self._derived(b"mark", repr((name, kind, *tokens)).encode()).hex()

    def checksum(self, file: Path | str) -> str:
        """Of a checkpoint; a plain one could be tried out by who has old data and the seed."""
        return self._derived(b"checksum", file_checksum(file).encode()).hex()

    def _signer(self):
        return ed25519().Ed25519PrivateKey.from_private_bytes(self._derived(b"receipts"))

    @property
    def public_key(self) -> str:
        """That receipts are verified with, in hexadecimal."""
        return self._signer().public_key().public_bytes_raw().hex()

    def sign(self, content: bytes) -> str:
        """Ed25519 signature, in hexadecimal."""
        return self._signer().sign(content).hex()


def signed(content: bytes, signature: str, public_key: str) -> bool:
    """Whether a signature is that of the key's owner for this content."""
    from_bytes = ed25519().Ed25519PublicKey.from_public_bytes
    try:
        from_bytes(bytes.fromhex(public_key)).verify(bytes.fromhex(signature), content)
    except Exception:  # of an invalid signature cryptography's own, of other lengths and characters a ValueError
        return False
    return True
