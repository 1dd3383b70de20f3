"""Send the messages of one training round and yield the replies, late ones among them."""

from __future__ import annotations

from collections.abc import Iterator

from flwr.app import Message
from flwr.serverapp import Grid

from flexlora.runs.outcomes import Outcome
from flexlora.seeds import derive_seed
from flexlora.server.members.membership import Membership
from flexlora.server.members.sampling import History
from flexlora.server.rounds.replies import ReplyHandler
from flexlora.server.settings import ServerSettings
from flexlora.server.transport.clocks import clock_of
from flexlora.server.transport.exchange import exchange, retry_policy
from flexlora.server.transport.retry_queue import PendingMessage

__all__ = ["training_replies"]


def training_replies(
    grid: Grid,
    handler: ReplyHandler,
    membership: Membership,
    history: History,
    settings: ServerSettings,
    timeout: float,
) -> Iterator[Message]:
    """Replies as they come, until enough updates are in the sum or the time is up.

    At the end every client without a reply gets its row, unanswered messages become late ones, and
    ``history`` learns whose messages were lost, for back-off.
    """
    plan, needed, clock = handler.plan, handler.selected.needed, clock_of(grid)
    pending_messages, server_round = plan.pending, plan.server_round

    def enough() -> bool:
        return bool(pending_messages) and handler.counted >= needed

    def on_resent(pending: PendingMessage, loss: str) -> None:
        handler.metrics.resent += 1
        handler.observer.resent(pending_messages[pending], pending.sent, loss)

    unanswered: list[PendingMessage] = []
    for pending, reply in exchange(
        grid,
        pending_messages,
        timeout=timeout,
        policy=retry_policy(grid, settings, timeout),
        late=handler.late.pending,
        enough=enough,
        on_resent=on_resent,
        find_node=lambda p: membership.find_node(grid, p, pending_messages[p], server_round),
        order=_order(handler, settings.seed),
    ):
        if reply is not None:
            yield reply
        else:
            unanswered.append(pending)
    satisfied = enough()
    for pending in unanswered:
        if satisfied:
            handler.no_reply(pending, Outcome.NOT_NEEDED, f"{needed} updates came first")
        else:
            handler.no_reply(pending, Outcome.SILENT, f"no reply within {timeout:g} s")
    handler.late.close_round(plan, clock, () if satisfied else None)
    for pending, client_id in pending_messages.items():
        pending.drop_content()
        if clock.simulated:
            continue
        if pending.answered:
            history.hear(client_id)
        elif pending.error is not None or not satisfied:  # silence after enough is no loss
            history.lose(client_id, server_round)


def _order(handler: ReplyHandler, seed: int) -> dict[PendingMessage, int]:
    """Which replies are read first: drawn, where more clients are asked than needed."""
    pending = handler.plan.pending
    if handler.selected.needed >= len(pending):
        return {}
    purpose = (seed, "arrival", handler.plan.server_round)
    return {message: derive_seed(*purpose, client_id) for message, client_id in pending.items()}
