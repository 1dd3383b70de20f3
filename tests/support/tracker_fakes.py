"""Fakes of wandb, mlflow and torch.utils.tensorboard: what they were given, in the shape of theirs.

Every function takes the parameters of the real one that FlexLoRA passes, by the same names;
``test_trackers.py`` compares them with the packages where these are installed.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

NAMES = ("wandb", "mlflow", "tensorboard")


class Offline(Exception):
    """The network is down."""


class Store:
    """What trackers have been given: runs by id, each ``{"config", "rows", "ended", "opened"}``.

    ``down`` is how many calls that deliver a round fail before one succeeds; ``key`` is a login.
    """

    def __init__(self):
        self.runs, self.down, self.key, self.attempts = {}, 0, True, 0

    def open(self, run_id, config=None):
        run_id = run_id or f"run-{len(self.runs)}"
        run = self.runs.setdefault(run_id, {"config": {}, "rows": [], "ended": None, "opened": 0})
        run["config"] |= config or {}
        run["opened"] += 1
        return run_id

    def add(self, run_id, step, numbers):
        self.attempts += 1
        if self.down:
            self.down -= 1
            raise Offline("no route to host")
        self.runs[run_id]["rows"].append((step, dict(numbers)))


def _module(name, **members):
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(members)
    return module


def wandb(store):
    class Run:
        def __init__(self, id):
            self.id = id

        def define_metric(self, name, step_metric=None):
            pass

        def log(self, data):
            store.add(self.id, data["round"], {k: v for k, v in data.items() if k != "round"})

        def finish(self, exit_code=None):
            store.runs[self.id]["ended"] = exit_code

    def init(project=None, name=None, dir=None, id=None, resume=None, config=None, settings=None):
        assert resume == "allow"
        return Run(store.open(id, config))

    def login(prompt=True, verify=True):
        assert not prompt and not verify
        return store.key

    return {"wandb": _module("wandb", init=init, login=login, Settings=SimpleNamespace)}


def mlflow(store):
    class MlflowClient:
        def __init__(self, tracking_uri=None):
            pass

        def get_experiment_by_name(self, name):
            return None

        def create_experiment(self, name):
            return "0"

        def create_run(self, experiment_id, run_name=None):
            return SimpleNamespace(info=SimpleNamespace(run_id=store.open(None)))

        def update_run(self, run_id, status=None):
            store.open(run_id)

        def log_batch(self, run_id, metrics=(), params=()):
            assert len(params) <= 100
            store.runs[run_id]["config"] |= dict(params)
            if metrics:
                store.add(run_id, metrics[0][3], {key: value for key, value, _, _ in metrics})

        def set_terminated(self, run_id, status=None):
            store.runs[run_id]["ended"] = status

    entities = _module(
        "mlflow.entities",
        Param=lambda key, value: (key, value),
        Metric=lambda key, value, timestamp, step: (key, value, timestamp, step),
    )
    module = _module(
        "mlflow",
        MlflowClient=MlflowClient,
        entities=entities,
        get_tracking_uri=lambda: "fake:store",
    )
    return {"mlflow": module, "mlflow.entities": entities}


def tensorboard(store):
    class SummaryWriter:
        def __init__(self, log_dir=None, purge_step=None):
            self.run = store.open(str(log_dir))
            rows = store.runs[self.run]["rows"]
            rows[:] = [row for row in rows if purge_step is None or row[0] < purge_step]
            self.file_writer = SimpleNamespace(add_summary=self._take)
            self._step, self._numbers = None, {}

        def _take(self, config):
            store.runs[self.run]["config"] |= config

        def add_text(self, tag, text_string, global_step=None):
            pass

        def add_scalar(self, tag, scalar_value, global_step=None):
            self._step, self._numbers = global_step, {**self._numbers, tag: scalar_value}

        def flush(self):
            step, numbers, self._step, self._numbers = self._step, self._numbers, None, {}
            if numbers:
                store.add(self.run, step, numbers)

        def close(self):
            store.runs[self.run]["ended"] = True

    summary = _module("torch.utils.tensorboard.summary", hparams=lambda given, metrics: [given])
    name = "torch.utils.tensorboard"
    writer = _module(name, SummaryWriter=SummaryWriter, summary=summary)
    return {
        "tensorboard": _module("tensorboard"),
        name: writer,
        f"{name}.summary": summary,
    }


FAKES = {"wandb": wandb, "mlflow": mlflow, "tensorboard": tensorboard}


def installed(monkeypatch, *names):
    """The fakes of these trackers in ``sys.modules``, over one store."""
    store = Store()
    for name in names:
        for module_name, module in FAKES[name](store).items():
            monkeypatch.setitem(sys.modules, module_name, module)
    return store
