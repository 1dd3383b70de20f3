"""TensorBoard, Weights & Biases and MLflow behind one small interface.

Each is loaded when a run opens it, and each finds the run's earlier part by the ids that it noted
in ``RUN/trackers.json``. What is sent is the configuration and the numbers of ``metrics.jsonl``: no
client's name, no row, no cause.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from flexlora.config.sections import tracker_names
from flexlora.errors import UserError, one_line
from flexlora.runs.folder import TENSORBOARD
from flexlora.runs.live_state import FINISHED, INTERRUPTED

__all__ = ["TRACKERS", "Tracker", "check_trackers"]

EXPERIMENT = "flexlora"  # wandb's project, MLflow's experiment
MLFLOW_BATCH, MLFLOW_LONGEST = 100, 6000  # parameters in one request, characters of a value
OFFLINE = ("offline", "disabled", "dryrun")  # of WANDB_MODE


class Tracker(Protocol):
    """One open run of a tracker; ``notes`` is what finds it again after a resume."""

    notes: dict[str, str]

    def log(self, server_round: int, metrics: Mapping[str, float]) -> None:
        """The numbers of one round."""

    def close(self, state: str) -> None:
        """End the run as ``live_state`` names it."""


class TensorBoard:
    """Event files in ``RUN/tensorboard``; a resume hides what an undone round had written."""

    def __init__(
        self, run: Path, config: Mapping[str, Any], notes: Mapping[str, str], first_round: int
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.notes: dict[str, str] = {}
        purge = first_round if first_round else None
        self._writer = SummaryWriter(str(run / TENSORBOARD), purge_step=purge)
        if not first_round:
            events: Any = self._writer.file_writer
            for summary in hparams(dict(config), {}):
                events.add_summary(summary)
            rows = "\n".join(f"| {key} | {value} |" for key, value in config.items())
            self._writer.add_text("config", f"| key | value |\n|---|---|\n{rows}", 0)

    def log(self, server_round: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, server_round)
        self._writer.flush()

    def close(self, state: str) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of the project ``flexlora``, with its files in the run folder.

    Console output stays here. The rounds are the axis, so that a round which a resume repeats
    replaces nothing and is no step backwards.
    """

    def __init__(
        self, run: Path, config: Mapping[str, Any], notes: Mapping[str, str], first_round: int
    ) -> None:
        import wandb

        self._run = wandb.init(
            project=EXPERIMENT,
            name=run.resolve().name,
            dir=str(run),
            id=notes.get("id"),
            resume="allow",
            config=dict(config),
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("round")
        self._run.define_metric("*", step_metric="round")
        self.notes = {"id": str(self._run.id)}

    def log(self, server_round: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"round": server_round, **metrics})

    def close(self, state: str) -> None:
        self._run.finish(exit_code=0 if state == FINISHED else 1)


class MLflow:
    """A run of the experiment ``flexlora`` where ``MLFLOW_TRACKING_URI`` says, or MLflow itself."""

    def __init__(
        self, run: Path, config: Mapping[str, Any], notes: Mapping[str, str], first_round: int
    ) -> None:
        import mlflow

        self._entities, self._client = mlflow.entities, mlflow.MlflowClient()
        where = str(mlflow.get_tracking_uri())
        if notes.get("at") == where:  # another store has not heard of this run
            self._id = notes["id"]
            self._client.update_run(self._id, status="RUNNING")
        else:
            found = self._client.get_experiment_by_name(EXPERIMENT)
            home = found.experiment_id if found else self._client.create_experiment(EXPERIMENT)
            self._id = self._client.create_run(home, run_name=run.resolve().name).info.run_id
            self._log_config(config)
        self.notes = {"id": self._id, "at": where}

    def _log_config(self, config: Mapping[str, Any]) -> None:
        params = [self._entities.Param(k, str(v)[:MLFLOW_LONGEST]) for k, v in config.items()]
        for start in range(0, len(params), MLFLOW_BATCH):
            self._client.log_batch(self._id, params=params[start : start + MLFLOW_BATCH])

    def log(self, server_round: int, metrics: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        rows = [self._entities.Metric(k, v, now, server_round) for k, v in metrics.items()]
        self._client.log_batch(self._id, metrics=rows)

    def close(self, state: str) -> None:
        named = {FINISHED: "FINISHED", INTERRUPTED: "KILLED"}
        self._client.set_terminated(self._id, named.get(state, "FAILED"))


TRACKERS: dict[str, type[TensorBoard] | type[WeightsAndBiases] | type[MLflow]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}
PACKAGES = {"mlflow": "mlflow-skinny"}  # a package that is called otherwise than its tracker


def check_trackers(report_to: str) -> None:
    """Refuse a tracker that could not take the first round, before anything is loaded.

    Raises:
        UserError: a package that is not installed, wandb without a key, a store that MLflow cannot
            open.
    """
    for name in tracker_names(report_to):
        if find_spec(name) is None:
            raise UserError(
                f"report-to names {name}, which is not installed here; `pip install "
                f"{PACKAGES.get(name, name)}` beside FlexLoRA, or leave it out: metrics.jsonl has "
                "the same numbers."
            )
        if name == "wandb":
            _check_wandb()
        elif name == "mlflow":
            _check_mlflow()


def _check_wandb() -> None:
    """wandb would ask for a key in the terminal that shows the run."""
    import wandb

    if os.environ.get("WANDB_MODE", "").lower() in OFFLINE:
        return
    if not wandb.login(prompt=False, verify=False):
        raise UserError(
            "report-to names wandb, which has no key on this machine; run `wandb login` once, or "
            "set WANDB_MODE=offline and send the run later with `wandb sync`."
        )


def _check_mlflow() -> None:
    import mlflow

    try:
        mlflow.MlflowClient()  # connects to no server
    except Exception as error:  # MlflowException, or what its store's library raises
        raise UserError(
            f"report-to names mlflow, which cannot use {mlflow.get_tracking_uri()}: "
            f"{one_line(error)} Set MLFLOW_TRACKING_URI, such as sqlite:///mlflow.db."
        ) from None
