"""A Flower app of your own: FlexLoRA's strategy in your ServerApp, its training in your ClientApp.

    python examples/own_strategy.py        three rounds of the built-in tasks, in this process

With Flower's processes, name the apps in your pyproject.toml and type ``flwr run .``; keys of
FlexLoRA go into ``[tool.flwr.app.config]``:

    [tool.flwr.app.components]
    serverapp = "own_strategy:server_app"
    clientapp = "own_strategy:client_app"
"""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from flexlora.aggregation.engine.state import State
from flexlora.clients.app import app as flexlora_client
from flexlora.config.resolve import Config, of_flower
from flexlora.lora.peft_folder import save_adapter
from flexlora.server.observing.observer import Observer
from flexlora.server.strategy import FlexLoRAStrategy

CONFIG = {"num-server-rounds": 3, "ranks.tiers": "2,4,8", "ranks.shares": "equal"}

server_app, client_app = ServerApp(), ClientApp()


class Printer(Observer):
    """Override the events that matter; the others do nothing."""

    def replied(self, client_id, outcome, cause, late):
        if outcome.is_failure:
            print(f"{client_id}: {outcome.value}: {cause}")

    def round_finished(self, metrics):
        print(f"round {metrics['round']}: eval_loss {metrics.get('eval_loss', float('nan')):.3f}")


class KeepBest(FlexLoRAStrategy):
    """Every step of a round is a method of Flower's ``Strategy``; this one keeps the best round."""

    best: tuple[float, State] | None = None

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord:
        metrics = super().aggregate_evaluate(server_round, replies)
        loss = float(metrics["eval_loss"])
        if self.best is None or loss < self.best[0]:
            self.best = loss, self.state
        return metrics


@server_app.main()
def run_server(grid: Grid, context: Context) -> None:
    config = Config.of({**CONFIG, **of_flower(context.run_config)})
    strategy = KeepBest(config, observer=Printer())
    strategy.start(grid)
    loss, state = strategy.best
    print(f"best: round {state.round}, eval_loss {loss:.3f}, saved in own_adapter")
    save_adapter(strategy.global_adapter(state), "own_adapter", base=config.model.name)


@client_app.query()
@client_app.train()
@client_app.evaluate()
def answer(message: Message, context: Context) -> Message:
    """Your own checks come here, before and after FlexLoRA decodes, trains and encodes."""
    return flexlora_client(message, context)


if __name__ == "__main__":
    from flexlora.clients.worker import worker_for
    from flexlora.simulations.engine.cohorts import resolved_limits
    from flexlora.simulations.simulate import make_grid

    config = Config.of(CONFIG)
    worker = worker_for(config)
    grid = make_grid(resolved_limits(config, worker), worker)
    run_server(grid, Context(1, 0, {}, RecordDict(), config.flat()))
