"""Signed commands (Ed25519, RFC 8032): who may change knobs and weights holds a key, and receivers hold public keys."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import ValidationError

from moe_core.wire import Knobs, ReadPass, Signed, TuningOrders, Weights

Command = Knobs | Weights | TuningOrders | ReadPass
C = TypeVar("C", Knobs, Weights, TuningOrders, ReadPass)


class SignatureRefused(Exception):
    """The envelope is not from a key that this receiver trusts, or its content was changed."""


class CommandInvalid(Exception):
    """The signature holds, but the document inside is not one that this receiver understands."""


def key_id(public: Ed25519PublicKey) -> str:
    """First 16 hex digits of the SHA-256 of the raw public key."""
    raw = public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return hashlib.sha256(raw).hexdigest()[:16]


class Signer:
    """Signs commands with one private key. Its repr never shows the key."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.key_id = key_id(private.public_key())

    def __repr__(self) -> str:
        return f"Signer(key_id={self.key_id})"

    @classmethod
    def generate(cls) -> Signer:
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> Signer:
        """Read a PEM private key. Raises ValueError without quoting the file's content."""
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except (ValueError, TypeError):
            raise ValueError(f"{path} holds no unencrypted PEM private key") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise ValueError(f"{path} holds a private key that is not Ed25519")
        return cls(key)

    def save(self, path: Path) -> None:
        """Write the private key as PEM, readable by its owner alone."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(self.private_pem())

    def private_pem(self) -> str:
        """The private key as PEM (PKCS 8, not encrypted): for a Secret or a file, never for a log."""
        return self._private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode()

    def public_pem(self) -> str:
        return (
            self._private.public_key()
            .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
            .decode()
        )

    def sign(self, command: Command) -> Signed:
        kind = type(command).__name__
        payload = command.model_dump_json(by_alias=True, exclude_none=True)
        signature = self._private.sign(_message(kind, payload))
        return Signed.model_validate(
            {
                "kind": kind,
                "payload": payload,
                "key_id": self.key_id,
                "signature": base64.b64encode(signature).decode(),
            }
        )


class Verifier:
    """Checks envelopes against a fixed set of public keys. With none, it refuses everything."""

    def __init__(self, public_pems: Iterable[str]) -> None:
        self._keys: Mapping[str, Ed25519PublicKey] = dict(_load_public(pem) for pem in public_pems)

    def open(self, envelope: Signed, kind: type[C]) -> C:
        """The command inside, once its signature holds.

        Raises SignatureRefused for an unknown key, a bad signature or another kind; CommandInvalid for a bad document.
        """
        if envelope.kind != kind.__name__:
            raise SignatureRefused(f"expected a signed {kind.__name__}, got {envelope.kind}")
        key = self._keys.get(envelope.key_id)
        if key is None:
            raise SignatureRefused(f"no trusted key has the id {envelope.key_id!r}")
        try:
            signature = base64.b64decode(envelope.signature, validate=True)
            key.verify(signature, _message(envelope.kind, envelope.payload))
        except (InvalidSignature, ValueError):
            raise SignatureRefused(f"the signature by key {envelope.key_id} does not match the payload") from None
        try:
            return kind.model_validate_json(envelope.payload)
        except ValidationError as error:
            raise CommandInvalid(describe(error)) from None


def describe(error: ValidationError) -> str:
    """A pydantic error as one line of `path: what`, without echoing input values."""
    return "; ".join(
        f"{'.'.join(str(part) for part in item['loc']) or 'document'}: {item['msg']}"
        for item in error.errors(include_url=False, include_input=False, include_context=False)
    )


def _load_public(pem: str) -> tuple[str, Ed25519PublicKey]:
    key = serialization.load_pem_public_key(pem.encode())
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError("a trusted key is not an Ed25519 public key")
    return key_id(key), key


def _message(kind: str, payload: str) -> bytes:
    return f"{kind}\n{payload}".encode()
