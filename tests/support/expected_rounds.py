"""What a method makes of a round's replies, computed without the strategy."""

from __future__ import annotations

import torch

from flexlora.aggregation import State, Update, make_method
from flexlora.aggregation.engine.state import GlobalChange
from flexlora.server.settings import ServerSettings

VICTIM = "client_01"


def expected_state(grid, config, server_round=1, *, without=(VICTIM,), state=None):
    """The state that the method makes of the honest replies, ``without`` some clients."""
    settings = ServerSettings.from_config(config)
    method = make_method(settings.method, **vars(settings.method_options))
    shapes = grid.worker.slots.shapes
    state = state or State(round=0, change=GlobalChange.zero(shapes, torch.float32))
    classes = settings.rank_policy.assign(grid.worker.client_ids)
    sent = {c.name: method.start(state, c, settings.factoring) for c in classes.values()}
    results = [r for (at, name), r in grid.updates.items() if at == server_round]
    counted = [result for result in results if result.client_id not in without]
    asked = {result.client_id: result.rank_class for result in counted}
    opened = method.begin(state, sent, asked)
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
    return opened.finish()
