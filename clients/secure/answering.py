"""Answer the messages of a secure sum: the phases as queries, the masked update as a train reply.

A simulation, a resident trainer and a ClientApp call the same two functions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from flexlora.aggregation.engine.linear_update import scaled_columns
from flexlora.aggregation.engine.starts import Start
from flexlora.clients.messages import encode_train_result
from flexlora.clients.secure.request_checks import Agreed
from flexlora.clients.secure.session_store import SessionStore
from flexlora.config.resolve import Config
from flexlora.errors import UserError
from flexlora.lora.ranks import RankClass
from flexlora.privacy.secure.bands import bands_of
from flexlora.privacy.secure.packing import pack_bits
from flexlora.privacy.secure.sum_plan import SumPlan
from flexlora.seeds import derive_seed
from flexlora.wire.encoding import RAW
from flexlora.wire.jobs import TrainResult
from flexlora.wire.secure_messages import (
    MASKED,
    SECURE,
    KeysRequest,
    MaskedNote,
    MaskRequest,
    SharesRequest,
    UnmaskRequest,
    from_values,
    to_values,
)

__all__ = ["answer_phase", "mask_request_of", "masked_reply"]

NAN = math.nan


def answer_phase(record: Mapping, config: Config, store: SessionStore) -> RecordDict:
    """The reply to the ``secure`` record of a query.

    Raises:
        UserError: a request that this client refuses; ValueError: one that cannot be read.
    """
    _check_mode(config)
    phase = record.get("phase")
    if phase == "keys":
        begun = from_values(KeysRequest, record)
        return _content(store.begin(begun).keys(begun))
    if phase == "shares":
        graph = from_values(SharesRequest, record)
        agreed = Agreed(
            seed=derive_seed(config.seed, SECURE, graph.server_round),
            clip=None if config.privacy.clip_quantile else config.privacy.clip,
            min_group=config.privacy.min_group,
        )
        return _content(store.current(graph.session).shares(graph, agreed))
    if phase == "unmask":
        unmask = from_values(UnmaskRequest, record)
        return _content(store.current(unmask.session).unmask(unmask))
    raise UserError(f"the phase is '{phase!s:.20}', expected keys, shares or unmask.")


def mask_request_of(content: Mapping, config: Config) -> MaskRequest | None:
    """The request beside a train job; None where sums are plain.

    Raises:
        UserError: the job and this client's configuration differ in whether they are.
    """
    if SECURE not in content:
        if config.privacy.secure:
            raise UserError(
                f"the configuration says privacy.mode={config.privacy.mode}, and the server asks "
                "for an update that is not masked."
            )
        return None
    _check_mode(config)
    return from_values(MaskRequest, content[SECURE])


def masked_reply(
    result: TrainResult, start: Start, request: MaskRequest, config: Config, store: SessionStore
) -> RecordDict:
    """The reply to a train message: masked numbers, and a report that says nothing of the rows.

    What is summed is the change from ``start``. A training that failed is reported with its cause
    alone.

    Raises:
        UserError, ValueError: a request that is refused, or an update that cannot be summed.
    """
    report = replace(
        result, adapter=None, train_loss=NAN, loss_before=NAN, loss_after=NAN, steps=0, tokens=0
    )
    content = encode_train_result(report, dtype=config.wire.dtype)
    if result.adapter is None or result.cause:
        return content
    session = store.current(request.session)
    seed = None
    if config.privacy.reproducible:
        seed = derive_seed(config.seed, "rounding", session.server_round, result.client_id)
    bits: dict[int, int] = {}

    def numbers(graph: SharesRequest, mask: MaskRequest, draws: np.random.Generator) -> Mapping:
        plan = _plan(result, graph, mask)
        bits.update({band: plan.grids[band].bits for band in plan.bands})
        assert result.adapter is not None
        return plan.numbers(
            {
                name: (scaled_columns(factors) - scaled_columns(start.trained[name])).cpu()
                for name, factors in result.adapter.to("cpu").items()
            },
            weight=result.num_examples if config.privacy.by_examples else 1,
            loss=result.train_loss,
            generator=draws,
        )

    masked = session.masked(request, numbers, seed)
    store.note_sent(session.server_round)
    data = b"".join(pack_bits(masked[band], bits[band]) for band in request.bands)
    note = MaskedNote(server_round=session.server_round, session=session.session)
    content[SECURE] = ConfigRecord(to_values(note))
    content[MASKED] = ArrayRecord({MASKED: Array("uint8", (len(data),), RAW, data)})
    return content


def _plan(result: TrainResult, graph: SharesRequest, mask: MaskRequest) -> SumPlan:
    """The sum as this client sees it: the bands that it sends."""
    assert result.adapter is not None
    shapes = {n: (f.out_features, f.in_features) for n, f in result.adapter.items()}
    try:
        classes = [RankClass.from_dict(values) for values in json.loads(mask.classes)]
        ranks = {c.name: c.ranks(shapes) for c in classes}
        found = dict(enumerate(bands_of(ranks, pooled=graph.pooled)))
        bands = {band: found[band] for band in mask.bands}
    except (KeyError, TypeError, ValueError, StopIteration):
        raise UserError("the rank classes of the round cannot be read.") from None
    return SumPlan(
        rows={name: out for name, (out, _) in shapes.items()},
        bands=bands,
        sizes=dict(zip(graph.bands, graph.sizes, strict=True)),
        seed=graph.seed,
        clip=graph.clip,
        largest=graph.largest,
    )


def _check_mode(config: Config) -> None:
    if not config.privacy.secure:
        raise UserError(
            "the server asks for a secure sum, this client's configuration says privacy.mode="
            f"{config.privacy.mode}."
        )


def _content(reply: object) -> RecordDict:
    return RecordDict({SECURE: ConfigRecord(to_values(reply))})
