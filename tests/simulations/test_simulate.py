"""The main command's run: a complete folder, the same bytes again, every client at its own rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from federation import (
    ONE_THREAD,
    SMOKE,
    adapter_bytes,
    as_sets,
    client_rows,
    command,
    finished,
    largest_gap,
    relative_gap,
    rounds,
    small,
    state_delta,
    untimed,
)
from flexlora.clients.worker import worker_for
from flexlora.config import resolve
from flexlora.config.paths import EMBEDDED
from flexlora.config.resolve import Config, resolved
from flexlora.lora.adapters import Adapter
from flexlora.lora.peft_folder import load_adapter
from flexlora.server.strategy import FlexLoRAStrategy
from flexlora.simulations.engine.grid import InProcessGrid
from flexlora.simulations.simulate import simulate
from flexlora.training import models
from flexlora.training.models import load_base
from flexlora.wire.encoding import decode_adapter
from packed import trained, update_of

ROUND_KEYS = {
    "round",
    "train_loss",
    "eval_loss",
    "clients_ok",
    "clients_failed",
    "bytes_down",
    "bytes_up",
    "seconds",
    "bytes_carried",
    "modules",
    "effective_rank",
    "server_seconds",
}
CSV_COLUMNS = [
    "round",
    "client_id",
    "rank_class",
    "rank",
    "quantization",
    "device",
    "num_examples",
    "loss_before",
    "loss_after",
    "bytes_down",
    "bytes_up",
    "seconds",
    "simulated_seconds",
    "joules",
    "status",
    "cause",
]
CLASSES = ("rank_2", "rank_4", "rank_8")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The smoke scenario, run once in this process: its folder and its strategy."""
    folder = tmp_path_factory.mktemp("smoke") / "run"
    config = Config.resolve(file=SMOKE, sets=("engine.threads=1",))
    return folder, simulate(config, folder)


def test_the_run_folder_is_complete(smoke):
    folder, _ = smoke
    names = {"config.toml", "metrics.jsonl", "clients.csv", "environment.json", "checkpoint"}
    assert names | {"adapters"} <= {path.name for path in folder.iterdir()}
    assert sorted(path.name for path in (folder / "adapters").iterdir()) == ["global", *CLASSES]
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["seed"] == 0 and environment["threads"] == 1
    assert environment["versions"].keys() >= {"flexlora", "torch", "transformers", "flwr"}
    assert {"commit", "python", "platform"} <= environment.keys()
    assert not list(folder.rglob("*.partial")) and not list(folder.rglob("*.bin"))


def test_metrics_have_the_promised_keys_each_round_and_per_rank_class(smoke):
    rows = rounds(smoke[0])
    assert [row["round"] for row in rows] == [0, 1, 2]
    for row in rows[1:]:
        per_class = {f"{key}/{name}" for key in ("eval_loss", "energy_kept") for name in CLASSES}
        assert ROUND_KEYS | per_class <= row.keys()
        assert row["clients_ok"] == 3 and row["clients_failed"] == 0
        assert all(0.0 < row[f"energy_kept/{name}"] <= 1.0 for name in CLASSES)
        assert set(row["modules"]) == set(smoke[1].state.change)
        for report in row["modules"].values():
            assert {"route", "error", "rank", "tail_energy"} <= report.keys()
        assert "factor_gap" not in row  # its sums are computed where eval.factor-gap asks for them
    for row in (rows[0], rows[-1]):  # answers are generated at both ends, also per class
        generated = {"eval_rouge_l", "eval_exact_match"}
        assert generated | {f"{key}/{name}" for key in generated for name in CLASSES} <= row.keys()


def test_clients_csv_has_the_promised_columns_and_a_row_per_client_and_round(smoke):
    folder, _ = smoke
    header = (folder / "clients.csv").read_text().splitlines()[0]
    assert header.split(",") == CSV_COLUMNS
    rows = client_rows(folder)
    assert [(row["round"], row["status"]) for row in rows] == [("1", "ok")] * 3 + [("2", "ok")] * 3
    for row in rows:
        assert row["rank_class"] == f"rank_{row['rank']}" and row["quantization"] == "none"
        assert float(row["loss_after"]) < float(row["loss_before"])
        assert int(row["num_examples"]) > 0 and float(row["seconds"]) > 0
    for at in (1, 2):
        bytes_up = sum(int(row["bytes_up"]) for row in client_rows(folder, at))
        assert bytes_up == rounds(folder)[at]["bytes_up"] > 0


def test_round_0_is_the_bare_base(smoke):
    """Its loss is that of the base alone on the rows that the clients hold out."""
    folder, _ = smoke
    base = rounds(folder)[0]
    assert "train_loss" not in base and "clients_ok" not in base
    assert base["eval_bytes_down"] == 0
    worker = worker_for(resolved(Config.resolve(file=SMOKE, sets=("engine.threads=1",))))
    rows = [row for name in worker.client_ids for row in worker.held_out(name)]
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    loss, tokens = 0.0, 0
    for row in rows:
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        picked = scores.gather(1, ids[0, 1:, None])[row.prompt_length - 1 :]
        loss, tokens = loss - float(picked.double().sum()), tokens + len(picked)
    assert base["eval_loss"] == pytest.approx(loss / tokens, rel=1e-5)
    assert all(base[f"eval_loss/{name}"] == pytest.approx(loss / tokens) for name in CLASSES)


def test_held_out_loss_falls_at_every_rank_class(smoke):
    base, *_, last = rounds(smoke[0])
    for name in CLASSES:
        assert last[f"eval_loss/{name}"] < base[f"eval_loss/{name}"]


@pytest.mark.parametrize("name", [*CLASSES, "global"])
def test_every_adapter_folder_loads_in_peft_and_scores_as_ours(name, smoke):
    folder, strategy = smoke
    path = folder / "adapters" / name
    named = json.loads((path / "adapter_config.json").read_text())["base_model_name_or_path"]
    bare = AutoModelForCausalLM.from_pretrained(named, dtype=torch.float64)
    carried = strategy.config.method.carried_rank  # every class is served T_c(G)
    rank = max(int(name.removeprefix("rank_")), carried) if name != "global" else 10**6
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        peft = PeftModel.from_pretrained(bare, path).double().eval()(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(named, dtype=torch.float64)
        before = merged(input_ids=ids).logits
        for module, svd in strategy.state.change.items():
            merged.get_submodule(module).weight += svd.truncate(rank).to_dense()
        ours = merged(input_ids=ids).logits
    assert (ours - before).abs().max() > 1e-2
    assert (peft - ours).abs().max() < 1e-4


def test_the_resolved_configuration_repeats_the_run_bit_for_bit(smoke, tmp_path):
    folder, _ = smoke
    values = tomllib.loads((folder / "config.toml").read_text())
    assert values["engine"]["threads"] == 1 and values["clients"]["count"] == 6
    simulate(Config.resolve(file=folder / "config.toml"), tmp_path / "again")
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(folder)
    assert (tmp_path / "again" / "config.toml").read_text() == (folder / "config.toml").read_text()


@pytest.mark.slow
def test_the_same_configuration_in_two_processes_gives_identical_bytes(tmp_path):
    """This process and one of its own."""
    config = small(num_server_rounds=2, lora__dropout=0.1)
    folders = [tmp_path / name for name in ("a", "b")]
    run = command("simulate", *as_sets(config), "--out", folders[0])
    simulate(config, folders[1])  # meanwhile
    simulate(config.with_values({"seed": 1}), tmp_path / "other")
    status, _, errors = finished(run)
    assert (status, errors) == (0, "")
    first = adapter_bytes(folders[0])
    assert first and first == adapter_bytes(folders[1])
    assert first != adapter_bytes(tmp_path / "other")  # the comparison can tell runs apart


@pytest.mark.parametrize(
    ("optim", "dtype", "num_rounds", "dropout", "bound"),
    [
        ("adamw_torch", "float64", 1, 0.1, 1e-9),
        ("adamw_torch", "float64", 1, 0.0, 1e-9),
        ("adamw_torch", "float32", 1, 0.1, 1e-4),
        ("adamw_torch", "float32", 3, 0.0, 1e-3),
        ("sgd", "float32", 1, 0.0, 1e-5),
        ("sgd", "float32", 3, 0.1, 1e-3),
    ],
)
def test_cohorts_of_1_4_and_16_agree(optim, dtype, num_rounds, dropout, bound, tmp_path):
    """In float64 to 1e-9, and in float32 where the optimizer is linear in the gradient to 1e-5.

    Without dropout a cohort's small modules go through one product each, which one client's do not.

    AdamW turns a gradient near float32 rounding into a step of either sign: with its usual epsilon
    of 1e-8 the first bound below was missed fourfold, with ours it holds.
    """
    deltas = {}
    for size in (1, 4, 16):
        config = small(
            clients__count=16,
            engine__cohort_size=size,
            model__dtype=dtype,
            wire__dtype=dtype,
            num_server_rounds=num_rounds,
            lora__dropout=dropout,
            train__max_steps=3,
            train__optim=optim,
            train__learning_rate=0.5 if optim == "sgd" else 2e-3,
        )
        state = simulate(config, tmp_path / str(size)).state
        deltas[size] = state_delta(state)
    gap = largest_gap if dtype == "float32" else relative_gap
    for size in (4, 16):
        assert gap(deltas[size], deltas[1]) < bound


# Two workers whatever the machine's cores; the first that says that it trains is killed.
TWO_WORKERS_ONE_KILLED = """
import os, signal, sys, threading, time
import flexlora.simulations.simulate as module
from flexlora.commands.cli import main
from flexlora.simulations.engine.ray_pool import RayPool

def kill_one(pool):
    while True:
        for number, doing in map(tuple, pool.processes.copy().values()):
            if doing == "train":
                os.kill(number, signal.SIGKILL)
                print("killed", number, file=sys.stderr)
                return
        time.sleep(0.005)

def make_pool(*arguments, **options):
    pool = RayPool(*arguments, **options | {"workers": 2})
    threading.Thread(target=kill_one, args=(pool,), daemon=True).start()
    return pool

module.make_pool = make_pool
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.nightly
def test_one_process_and_two_of_which_one_is_killed_give_the_same_bytes(tmp_path):
    """The killed worker's cohort is trained again: every client is there in the end.

    ``test_engine_keeping.py`` has two of which none is killed.
    """
    many = {"clients__count": 16, "engine__cohort_size": 2, "train__max_steps": 10}
    config = small(num_server_rounds=2, personal__rank=2, **many)
    simulate(config, tmp_path / "alone")
    two = config.with_values({"engine.workers": 2})
    arguments = ["simulate", *as_sets(two), "--out", str(tmp_path / "killed")]
    script = [sys.executable, "-c", TWO_WORKERS_ONE_KILLED, *arguments]
    environment = os.environ | ONE_THREAD
    ended = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0 and ended.stderr.count("killed ") == 1, ended.stderr
    assert adapter_bytes(tmp_path / "alone") == adapter_bytes(tmp_path / "killed")
    for read in (client_rows, rounds):
        assert untimed(read(tmp_path / "alone")) == untimed(read(tmp_path / "killed"))


def test_the_machines_threads_and_the_cohort_plan_stand_in_the_resolved_configuration(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(resolve, "free_cores", lambda: 1)  # a machine of one core
    simulate(small(engine__threads=0, engine__cohort_size=3), tmp_path / "run")
    values = tomllib.loads((tmp_path / "run" / "config.toml").read_text())["engine"]
    assert values["threads"] == 1 and values["cohort-size"] == 3


def jsonl(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(text)
    (folder / "validation.jsonl").write_text(text)
    return str(folder)


def repeat_rows(client, answer, count=4):
    return [
        {"instruction": f"Say {answer}.", "input": f"{n}", "output": answer, "client": client}
        for n in range(count)
    ]


DATA = {"anna": "yes", "berta": "no", "carla": "red"}


def three_clients(folder, **changes):
    answers = {**DATA, **changes}
    rows = [row for client, answer in answers.items() for row in repeat_rows(client, answer)]
    return jsonl(folder, rows)


def test_a_client_whose_rows_do_not_fit_is_left_out_counted_and_in_no_denominator(tmp_path):
    """Trap T6: the round is the round of the other clients, not theirs diluted."""
    too_long = repeat_rows("dora", "word " * 400)
    rows = [row for client, answer in DATA.items() for row in repeat_rows(client, answer)]
    fixed = {"clients__count": 0, "ranks__policy": "fixed", "ranks__fixed": 2}
    with_dora = simulate(
        small(data__path=jsonl(tmp_path / "four", rows + too_long), **fixed), tmp_path / "a"
    )
    without = simulate(small(data__path=three_clients(tmp_path / "three"), **fixed), tmp_path / "b")
    assert relative_gap(state_delta(with_dora.state), state_delta(without.state)) < 1e-6
    (row,) = client_rows(tmp_path / "a", 0)
    assert (row["client_id"], row["status"]) == ("dora", "left out")
    assert "too long" in row["cause"] and "4" in row["cause"]
    metrics = rounds(tmp_path / "a")[1]
    assert (metrics["clients_ok"], metrics["clients_failed"]) == (3, 0)


@pytest.mark.parametrize("client", DATA)
def test_every_single_clients_data_counts(client, tmp_path):
    """Trap T3: a sum in which only client 0 counts does not move with the others' rows."""
    fixed = {"clients__count": 0, "data__path": three_clients(tmp_path / "data")}
    first = simulate(small(**fixed), tmp_path / "a").state
    fixed["data__path"] = three_clients(tmp_path / "changed", **{client: "blue and green"})
    second = simulate(small(**fixed), tmp_path / "b").state
    assert relative_gap(state_delta(second), state_delta(first)) > 1e-3


def test_every_client_trains_and_returns_the_rank_of_its_class_from_round_one(
    tmp_path, monkeypatch
):
    """Trap T4: ranks that are configured but never applied."""
    seen = {}

    class Spy(InProcessGrid):
        def pull_messages(self, message_ids):
            replies = list(super().pull_messages(message_ids))
            for reply in replies:
                if trained(reply.content):
                    adapter = decode_adapter(*update_of(reply.content))
                    seen[reply.content["report"]["client-id"]] = adapter
            return replies

    monkeypatch.setattr("flexlora.simulations.simulate.InProcessGrid", Spy)
    config = small(
        clients__count=6,
        ranks__tiers="1,3,200",
        lora__target_modules="all-linear",
        lora__alpha=12.0,
        train__max_steps=1,
    )
    strategy = simulate(config, tmp_path / "run")
    assert isinstance(strategy, FlexLoRAStrategy) and len(seen) == 6
    shapes = strategy.state.change.shapes
    for row in client_rows(tmp_path / "run", 1):
        adapter: Adapter = seen[row["client_id"]]
        rank = int(row["rank"])
        assert {name: f.rank for name, f in adapter.items()} == {
            name: min(rank, *shape) for name, shape in shapes.items()
        }
        numbers = sum(min(rank, *shape) * sum(shape) for shape in shapes.values())
        assert int(row["bytes_up"]) == int(row["bytes_down"]) == 4 * numbers
        assert adapter.num_bytes == 4 * numbers
        assert all(f.scaling == 12.0 / f.rank for f in adapter.values())
    assert sorted({int(row["rank"]) for row in client_rows(tmp_path / "run")}) == [1, 3, 200]
    for name, rank in (("rank_1", 1), ("rank_3", 3)):
        saved = load_adapter(tmp_path / "run" / "adapters" / name)
        assert {factors.rank for factors in saved.values()} == {rank}


def test_the_base_is_loaded_once_for_all_clients_and_rounds(tmp_path, monkeypatch):
    """Trap T19: a base that is reloaded for every message."""
    loads = []
    honest = models._load
    monkeypatch.setattr(models, "_loaded", {})
    monkeypatch.setattr(models, "_load", lambda *a: loads.append(a) or honest(*a))
    simulate(small(num_server_rounds=2, seed=3), tmp_path / "run")
    assert len(loads) == 1
    load_base("embedded")
    assert len(loads) == 1
