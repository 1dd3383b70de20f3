"""Keys between two clients, and the pseudo-random numbers that hide what a client sends.

    s_uv = X25519(private_u, public_v) = X25519(private_v, public_u)
    y_u  = q_u + PRG(b_u) + sum over v > u of PRG(s_uv) - sum over v < u of PRG(s_uv)   mod 2^bits

Bonawitz et al. 2017 (section 4). A seed for one use is ``HMAC-SHA256(key, purpose)``, and PRG is
AES-128 in counter mode, so that 10 million numbers take some 20 ms. Flower's ``pseudo_rand_gen`` is
numpy's Mersenne twister from 32 bits of the seed: two vectors of it give away the seed, it hides
nothing. Its P-384 keys and Fernet tokens would be sound, but a key agreement takes nine times as
long and a public key 215 bytes where X25519's has 32, which adds up with a hundred clients a round.

Numbers are added modulo 2^32, whose low bits are those modulo ``2^bits``.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import (
    Cipher,
    CipherContext,
    algorithms,
    modes,
)
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

__all__ = [
    "KEY_BYTES",
    "TAG_BYTES",
    "add_mask",
    "derived",
    "digest_of",
    "keystream",
    "opened",
    "public_of",
    "sealed",
    "shared_keys",
]

KEY_BYTES = 32  # of every key and secret here
TAG_BYTES = 16  # by which what is sealed is longer
DIGEST_BYTES = 16
AES_BYTES = 16
WORDS_AT_ONCE = 2**18  # of a mask; 1 MiB stays in the cache


def derived(key: bytes, *purpose: str | int) -> bytes:
    """32 bytes for one purpose; those of other purposes say nothing of them."""
    words = "\x1f".join(f"{type(part).__name__}:{part}" for part in purpose)
    return hmac.new(key, words.encode(), hashlib.sha256).digest()


def digest_of(secret: bytes) -> bytes:
    """By which a secret is recognised that was put together from shares; it says nothing of it."""
    return hashlib.sha256(b"flexlora secret" + secret).digest()[:DIGEST_BYTES]


def public_of(private: bytes) -> bytes:
    """The public X25519 key of a private one; any 32 bytes are a private key."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def shared_keys(private: bytes, publics: Iterable[bytes]) -> list[bytes]:
    """The key that both sides have from their own private and the other's public key, by other.

    Raises:
        ValueError: no public key, or one that makes the same key with everybody.
    """
    own = X25519PrivateKey.from_private_bytes(private)
    agreed = (own.exchange(X25519PublicKey.from_public_bytes(public)) for public in publics)
    return [hmac.new(key, b"flexlora secure sum", hashlib.sha256).digest() for key in agreed]


def sealed(key: bytes, number: int, text: bytes, about: bytes) -> bytes:
    """``text`` encrypted and authenticated (AES-GCM), bound to ``about``.

    A key must not seal two texts under one ``number``.
    """
    return AESGCM(key).encrypt(number.to_bytes(12, "little"), text, about)


def opened(key: bytes, number: int, box: bytes, about: bytes) -> bytes | None:
    """The text of ``sealed``; None where key, number, ``about`` or a byte is another."""
    try:
        return AESGCM(key).decrypt(number.to_bytes(12, "little"), box, about)
    except InvalidTag:
        return None


def keystream(key: bytes, length: int) -> bytes:
    """The first bytes of AES-128-CTR under the first half of ``key``."""
    return _cipher(key).update(bytes(length))


def add_mask(numbers: np.ndarray, key: bytes, sign: int = 1) -> None:
    """Add (or subtract) the mask of ``key`` to uint32 ``numbers`` in place, modulo 2^32."""
    cipher, most = _cipher(key), 4 * min(WORDS_AT_ONCE, len(numbers))
    zeros, buffer = memoryview(bytes(most)), bytearray(most + AES_BYTES)
    for at in range(0, len(numbers), WORDS_AT_ONCE):
        part = numbers[at : at + WORDS_AT_ONCE]
        cipher.update_into(zeros[: 4 * len(part)], buffer)
        mask = np.frombuffer(buffer, "<u4", len(part))
        if sign > 0:
            np.add(part, mask, out=part)
        else:
            np.subtract(part, mask, out=part)


def _cipher(key: bytes) -> CipherContext:
    """A stream of AES in counter mode, from its start; a key has one use."""
    nonce = bytes(AES_BYTES)
    return Cipher(algorithms.AES(key[:AES_BYTES]), modes.CTR(nonce)).encryptor()
