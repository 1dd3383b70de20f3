"""What the server holds of one client in a secure sum, and its secrets put together from shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from flexlora.privacy.secure.graph import threshold
from flexlora.privacy.secure.masks import digest_of, public_of
from flexlora.privacy.secure.shamir import SHARE_BYTES, verified
from flexlora.wire.secure_messages import KeysReply

__all__ = ["SharedSecrets", "SumFailed"]


class SumFailed(Exception):
    """The sum cannot be had; the message is why, and the round is skipped."""


@dataclass(kw_only=True)
class SharedSecrets:
    """One client's public keys, its boxes for its holders, and the returned shares of its secrets.

    ``digests`` are those of its seeds by band. Of its seeds or of its mask key shares come by
    holder, never of both.
    """

    rank_class: str
    keys: KeysReply | None = None
    holders: tuple[int, ...] = ()
    boxes: dict[int, bytes] = field(default_factory=dict)
    digests: dict[int, bytes] = field(default_factory=dict)
    _seeds: dict[int, dict[int, bytes]] = field(default_factory=dict)  # by band, by holder
    _keys: dict[int, bytes] = field(default_factory=dict)  # by holder

    @property
    def public(self) -> KeysReply:
        assert self.keys is not None
        return self.keys

    @property
    def threshold(self) -> int:
        """The shares that open one of its secrets."""
        return threshold(len(self.holders))

    def add_seeds(self, holder: int, text: bytes, bands: Sequence[int]) -> bool:
        """Note a holder's shares of the seeds of these bands; False for another length."""
        if len(text) != SHARE_BYTES * len(bands):
            return False
        for k, band in enumerate(bands):
            share = text[SHARE_BYTES * k : SHARE_BYTES * (k + 1)]
            self._seeds.setdefault(band, {})[holder] = share
        return True

    def add_key(self, holder: int, text: bytes) -> bool:
        """Note a holder's share of the mask key; False for another length."""
        if len(text) == SHARE_BYTES:
            self._keys[holder] = text
        return len(text) == SHARE_BYTES

    def seed(self, band: int) -> bytes:
        """
        Raises:
            SumFailed: too few shares, or too many wrong ones.
        """
        shares = self._seeds.get(band, {})
        found = verified(shares, self.threshold, lambda s: digest_of(s) == self.digests[band])
        if found is None:
            raise self._unopened(len(shares), "answered")
        return found

    def mask_key(self) -> bytes:
        """
        Raises:
            SumFailed: as ``seed``.
        """
        public = self.public.mask
        found = verified(self._keys, self.threshold, lambda key: public_of(key) == public)
        if found is None:
            raise self._unopened(len(self._keys), "dropped out")
        return found

    def _unopened(self, count: int, what: str) -> SumFailed:
        why = "wrong ones among them" if count >= self.threshold else "too few"
        return SumFailed(
            f"{count} of {len(self.holders)} shares of a client that {what}, {why}: "
            f"{self.threshold} are needed to take its masks away"
        )
