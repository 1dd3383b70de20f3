"""A client's side of one secure sum: four phases, each answered once (Bonawitz et al. 2017).

    keys     two new key pairs: one for the channel to each neighbour, one for masks
    shares   a share of the mask key and of each band's seed, sealed for every holder
    mask     the numbers of the update plus all masks, if the holders' boxes open
    unmask   of every neighbour one kind of share: of its seeds if it answered, else of its key

Every secret and every random number is derived from ``root``, so that a request that comes again
gets the same bytes, and a session is its root and the requests that it has answered. Another
request of a phase that was answered is refused: with two answers a server could take masks away.

``request_checks.py`` refuses requests by their values.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flexlora.clients.secure.request_checks import (
    MOST_BANDS,
    Agreed,
    check_mask,
    check_shares,
    check_unmask,
    holding,
)
from flexlora.errors import UserError
from flexlora.privacy.secure.masks import (
    KEY_BYTES,
    add_mask,
    derived,
    digest_of,
    opened,
    public_of,
    sealed,
    shared_keys,
)
from flexlora.privacy.secure.shamir import SHARE_BYTES, split
from flexlora.wire.secure_messages import (
    KeysReply,
    KeysRequest,
    MaskRequest,
    SharesReply,
    SharesRequest,
    UnmaskReply,
    UnmaskRequest,
    canonical,
    of_canonical,
    phase_of,
)

__all__ = ["ClientSession"]

FLAG_BYTES = 8  # of a box: which bands its seeds are of


@dataclass(kw_only=True)
class ClientSession:
    """One client in one round.

    ``asked`` are the requests that were answered, by phase; ``sent`` is the digest of the numbers
    that left masked.
    """

    server_round: int
    session: bytes
    root: bytes = field(default_factory=lambda: os.urandom(KEY_BYTES), repr=False)
    asked: dict[str, bytes] = field(default_factory=dict)
    sent: bytes = b""
    _agreed: dict[int, bytes] = field(default_factory=dict, repr=False)

    @classmethod
    def begun(cls, request: KeysRequest) -> ClientSession:
        """A session with new secrets."""
        return cls(server_round=request.server_round, session=request.session)

    @classmethod
    def of_values(cls, values: Mapping[str, Any]) -> ClientSession:
        """The inverse of ``to_values``."""
        asked = dict(zip(values["phases"], values["requests"], strict=True))
        names = ("server_round", "session", "root", "sent")
        return cls(**{name: values[name.replace("_", "-")] for name in names}, asked=asked)

    def to_values(self) -> dict[str, Any]:
        """As scalars and lists: the secrets are in it."""
        return {
            "server-round": self.server_round,
            "session": self.session,
            "root": self.root,
            "sent": self.sent,
            "phases": list(self.asked),
            "requests": list(self.asked.values()),
        }

    def keys(self, request: KeysRequest) -> KeysReply:
        """The public keys.

        Raises:
            UserError: a request that this session refuses, as in all phases.
        """
        self._accept(request)
        return KeysReply(
            server_round=self.server_round,
            session=self.session,
            channel=public_of(self._secret("channel")),
            mask=public_of(self._secret("mask")),
        )

    def shares(self, request: SharesRequest, agreed: Agreed) -> SharesReply:
        """A box for each holder: ``bands | share of the mask key | share of each band's seed``."""
        check_shares(request, agreed)
        self._accept(request, after="keys")
        places, threshold = list(request.holders), request.threshold
        flags = sum(1 << band for band in request.bands).to_bytes(FLAG_BYTES, "little")
        secrets = [self._secret("mask"), *(self._seed(band) for band in request.bands)]
        shares = [
            split(secret, threshold, places, self._secret("shares", number))
            for number, secret in enumerate(secrets)
        ]
        boxes = []
        for place, key in self._channels(request).items():
            text = flags + b"".join(share[place] for share in shares)
            boxes.append(sealed(key, request.place, text, self._about(request.place, place)))
        digests = tuple(digest_of(self._seed(band)) for band in request.bands)
        return SharesReply(
            server_round=self.server_round,
            session=self.session,
            boxes=tuple(boxes),
            digests=digests,
        )

    def masked(
        self,
        request: MaskRequest,
        numbers_of: Callable[[SharesRequest, MaskRequest, np.random.Generator], Mapping],
        rounding: int | None = None,
    ) -> dict[int, np.ndarray]:
        """The update's numbers by band, each uint32, with all masks added modulo 2^32.

        ``numbers_of`` makes them before masks. ``rounding`` is the seed of its random rounding;
        None takes one of the session.
        """
        graph = self._of(SharesRequest, "shares")
        check_mask(request, graph)
        self._check_boxes(request, graph)
        self._accept(request, after="shares")
        seed = int.from_bytes(self._secret("rounding"), "little") if rounding is None else rounding
        numbers = numbers_of(graph, request, np.random.default_rng(seed))
        self._send_once(numbers)
        keys = self._mask_keys(graph)
        for band, values in numbers.items():
            add_mask(values, derived(self._seed(band), "own"))
            for place in set(graph.neighbours[band]) & set(request.alive):
                key = derived(keys[place], "pair", self.server_round, band)
                add_mask(values, key, 1 if place > graph.place else -1)
        return dict(numbers)

    def unmask(self, request: UnmaskRequest) -> UnmaskReply:
        """Of each neighbour whose shares are here, those of its seeds or that of its key."""
        graph, mask = self._of(SharesRequest, "shares"), self._of(MaskRequest, "mask")
        check_unmask(request, graph, mask)
        if not self.sent:
            raise UserError("this client has sent nothing that could be unmasked.")
        self._accept(request, after="mask")
        texts = dict(zip(holding(graph, mask), self._open_boxes(graph, mask), strict=True))
        return UnmaskReply(
            server_round=self.server_round,
            session=self.session,
            seeds=tuple(
                _seeds_in(texts[place], request.bands) for place in request.alive if place in texts
            ),
            keys=tuple(_key_in(texts[place]) for place in request.dropped if place in texts),
        )

    # --- the secrets ---------------------------------------------------------------------------

    def _secret(self, *purpose: str | int) -> bytes:
        return derived(self.root, *purpose)

    def _seed(self, band: int) -> bytes:
        return self._secret("seed", band)

    def _channels(self, request: SharesRequest) -> dict[int, bytes]:
        """The key of the channel to each holder; agreed once while this object lives."""
        if not self._agreed:
            self._agreed = _agreed(self._secret("channel"), request.holders, request.channels)
        return self._agreed

    def _mask_keys(self, request: SharesRequest) -> dict[int, bytes]:
        return _agreed(self._secret("mask"), request.peers, request.masks)

    def _about(self, source: int, target: int) -> bytes:
        return self.session + source.to_bytes(8, "little") + target.to_bytes(8, "little")

    # --- what was asked ------------------------------------------------------------------------

    def _of(self, kind: type, phase: str) -> Any:
        if phase not in self.asked:
            raise UserError(f"phase '{phase}' of round {self.server_round} has not been answered.")
        return of_canonical(kind, self.asked[phase])

    def _accept(self, request: Any, after: str = "") -> None:
        """Note a request of this session; one that comes again must be the same."""
        phase, content = phase_of(request), canonical(request)
        if (request.server_round, request.session) != (self.server_round, self.session):
            raise UserError(
                f"the secure sum of round {request.server_round} is asked for in a session of "
                f"round {self.server_round}, or in another one of it."
            )
        if after and after not in self.asked:
            raise UserError(f"phase '{phase}' is asked for before '{after}' was answered.")
        if self.asked.setdefault(phase, content) != content:
            raise UserError(
                f"the server asks for phase '{phase}' of round {self.server_round} a second time "
                "and otherwise; with two answers it could take masks away."
            )

    def _send_once(self, numbers: Mapping[int, np.ndarray]) -> None:
        """Refuse to mask other numbers with the same masks: their difference would show."""
        digest = hashlib.sha256()
        for band in sorted(numbers):
            digest.update(numbers[band].tobytes())
        if self.sent and self.sent != digest.digest():
            raise UserError(
                "the update was sent masked, and training it again gave other numbers; with the "
                "same masks the difference would be visible."
            )
        self.sent = digest.digest()

    def _check_boxes(self, request: MaskRequest, graph: SharesRequest) -> None:
        boxes = self._open_boxes(graph, request)
        if sum(text is not None for text in boxes) < graph.threshold:
            raise UserError(
                f"{boxes.count(None)} of {len(boxes)} boxes with shares do not open; are they of "
                "this round, and for this client?"
            )

    def _open_boxes(self, graph: SharesRequest, request: MaskRequest) -> list[bytes | None]:
        """The text of each box, None where it does not open or is of another length."""
        holders, channels = holding(graph, request), self._channels(graph)
        texts = []
        for place, box in zip(holders, request.boxes, strict=True):
            text = opened(channels[place], place, box, self._about(place, graph.place))
            texts.append(text if text is not None and _is_whole(text) else None)
        return texts


def _agreed(private: bytes, places: Sequence[int], keys: bytes) -> dict[int, bytes]:
    publics = [keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)]
    try:
        return dict(zip(places, shared_keys(private, publics), strict=True))
    except ValueError:
        raise UserError("a neighbour's public key is none.") from None


def _is_whole(text: bytes) -> bool:
    if len(text) < FLAG_BYTES:
        return False
    count = int.from_bytes(text[:FLAG_BYTES], "little").bit_count()
    return len(text) == FLAG_BYTES + SHARE_BYTES * (1 + count)


def _key_in(text: bytes | None) -> bytes:
    return b"" if text is None else text[FLAG_BYTES : FLAG_BYTES + SHARE_BYTES]


def _seeds_in(text: bytes | None, bands: Sequence[int]) -> bytes:
    """The shares of a client's seeds in these bands, as far as it is in them."""
    if text is None:
        return b""
    flags = int.from_bytes(text[:FLAG_BYTES], "little")
    own = [band for band in range(MOST_BANDS) if flags >> band & 1]
    at = FLAG_BYTES + SHARE_BYTES
    shares = {band: text[at + SHARE_BYTES * k :][:SHARE_BYTES] for k, band in enumerate(own)}
    return b"".join(shares[band] for band in sorted(bands) if band in shares)
