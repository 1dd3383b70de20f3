"""What a method makes of a round's replies, computed without the strategy."""

from __future__ import annotations

import torch

from flexlora.aggregation import make_method
from flexlora.aggregation.engine.open_round import OpenRound
from flexlora.aggregation.engine.state import GlobalChange, State
from flexlora.aggregation.engine.updates import Update
from flexlora.server.settings import factoring_of, rank_policy_of

VICTIM = "client_01"


def expected_state(grid, config, server_round=1, *, without=(VICTIM,), state=None):
    """The state that the method makes of the honest replies, ``without`` some clients."""
    method = make_method(config.method.name, config.method)
    shapes = grid.worker.slots.shapes
    state = state or State(round=0, change=GlobalChange.zero(shapes, torch.float32))
    classes = rank_policy_of(config).assign(grid.worker.client_ids)
    sent = {c.name: method.start(state, c, factoring_of(config)) for c in classes.values()}
    results = [r for (at, name), r in grid.updates.items() if at == server_round]
    counted = [result for result in results if result.client_id not in without]
    asked = {result.client_id: result.rank_class for result in counted}
    opened = OpenRound(method, state, sent, asked)
    for result in counted:
        opened.add(
            Update(
                client_id=result.client_id,
                adapter=result.adapter,
                num_examples=result.num_examples,
                rank_class=result.rank_class,
                base_round=result.base_round,
                digest=result.digest,
            )
        )
    return opened.close()
