"""Shamir's secret sharing of 32 bytes over a prime field, with Python's integers.

    f(x) = secret + c_1 x + ... + c_(t-1) x^(t-1)  mod P,   share of x: f(x);   secret = f(0)

Any t shares give the secret (Lagrange), fewer say nothing of it. Flower's ``create_shares`` does
the same by PyCryptodome's GF(2^128) in pure Python: 14.5 ms for every 16 bytes at 27 of 52, where
the multiplication of Python's own integers takes 0.24 ms for all 32 (``docs/log.md``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flexlora.privacy.secure.masks import keystream

__all__ = ["SECRET_BYTES", "SHARE_BYTES", "combine", "split", "verified"]

P = 2**256 + 297  # the smallest prime above 2^256
SECRET_BYTES, SHARE_BYTES = 32, 33
COEFFICIENT_BYTES = 40  # 64 bits more than P, so that the remainder is uniform to 2^-64


def split(secret: bytes, threshold: int, places: list[int], randomness: bytes) -> dict[int, bytes]:
    """One share for each of the ``places`` (distinct, from 1 up); ``threshold`` give the secret.

    ``randomness`` is a key of 32 bytes, which nothing else uses and nobody else knows.
    """
    stream = keystream(randomness, COEFFICIENT_BYTES * (threshold - 1))
    coefficients = [
        int.from_bytes(stream[at : at + COEFFICIENT_BYTES], "little") % P
        for at in range(0, len(stream), COEFFICIENT_BYTES)
    ]
    coefficients.append(int.from_bytes(secret, "little"))
    shares = {}
    for place in places:
        value = 0
        for coefficient in coefficients:  # Horner, the constant term last
            value = (value * place + coefficient) % P
        shares[place] = value.to_bytes(SHARE_BYTES, "little")
    return shares


def combine(shares: Mapping[int, bytes]) -> bytes | None:
    """The secret of exactly as many shares as its threshold, by place.

    None where they are of no secret of 32 bytes: one of them is wrong.
    """
    secret = 0
    for place, share in shares.items():
        numerator = denominator = 1
        for other in shares:
            if other != place:
                numerator = numerator * other % P
                denominator = denominator * (other - place) % P
        value = int.from_bytes(share, "little")
        secret = (secret + value * numerator * pow(denominator, -1, P)) % P
    return secret.to_bytes(SECRET_BYTES, "little") if secret < 2 ** (8 * SECRET_BYTES) else None


def verified(
    shares: Mapping[int, bytes], threshold: int, is_secret: Callable[[bytes], bool]
) -> bytes | None:
    """The secret that ``is_secret`` accepts, from any ``threshold`` neighbouring shares.

    Windows of the sorted places are tried in turn, so that wrong shares next to each other (one of
    them always is) do not matter where enough right ones are left. None where none is accepted.
    """
    places = sorted(shares)
    if len(places) < threshold:
        return None
    for first in range(len(places)):
        window = [places[(first + k) % len(places)] for k in range(threshold)]
        secret = combine({place: shares[place] for place in window})
        if secret is not None and is_secret(secret):
            return secret
        if threshold == len(places):
            break
    return None
