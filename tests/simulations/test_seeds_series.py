"""``simulate --seeds``: real runs, their mean and deviation, and a broken series that goes on."""

from __future__ import annotations

import json
import shutil
import statistics

import pytest

from federation import adapter_bytes, as_sets, rounds, small
from flexlora.commands.cli import main
from flexlora.errors import UserError
from flexlora.report.console import make_console
from flexlora.simulations import simulate as simulate_module
from flexlora.simulations.experiments import seed_series
from flexlora.simulations.experiments.seed_series import SeedSeries, run_series, summary_of
from flexlora.simulations.simulate import simulate
from pages import read_page

CONFIG = small(num_server_rounds=2, seed=4)


def series(out, config=CONFIG, *, number=2, **options):
    return run_series(config, out, seeds=number, console=make_console(), **options)


def kept(out):
    return json.loads((out / "seeds.json").read_text())


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A series of two seeds, whole."""
    out = tmp_path_factory.mktemp("seeds") / "out"
    assert series(out) == 0
    return out


@pytest.fixture
def spied(monkeypatch):
    """The folders that are run, and whether each was gone on with, instead of running them."""
    ran = []
    honest = seed_series.run_in_terminal

    def watch(config, out, *, go_on, **options):
        ran.append((out.name, config.seed, go_on))
        honest(config, out, go_on=go_on, **options)

    monkeypatch.setattr(seed_series, "run_in_terminal", watch)
    return ran


def test_every_seed_is_a_run_of_its_own_seed_and_nothing_else_differs(two):
    texts = [(two / f"seed-{seed}" / "config.toml").read_text() for seed in (4, 5)]
    assert texts[0].replace("seed = 4", "seed = 5", 1) == texts[1] != texts[0]
    first, second = (rounds(two / f"seed-{seed}")[-1]["eval_loss"] for seed in (4, 5))
    assert first != second
    assert all((two / f"seed-{seed}" / "report.html").is_file() for seed in (4, 5))
    assert "Run seed-4" in "".join(read_page(two / "seed-4" / "report.html").said())


def test_a_seed_of_the_series_is_the_run_that_it_would_be_alone(two, tmp_path):
    simulate(CONFIG.with_values({"seed": 5}), tmp_path / "alone")
    assert adapter_bytes(tmp_path / "alone") == adapter_bytes(two / "seed-5")


def test_mean_and_deviation_are_those_of_the_runs(two):
    runs = [rounds(two / f"seed-{seed}") for seed in (4, 5)]
    expected = {}
    for score in ("eval_loss", "eval_bits_per_byte"):
        names = (score, f"{score}/rank_2", f"{score}/rank_4")
        expected |= {f"base/{score}": [run[0][score] for run in runs]}
        expected |= {name: [run[-1][name] for run in runs] for name in names}
    expected |= {
        "bytes_down": [sum(row.get("bytes_down", 0) for row in run) for run in runs],
        "bytes_up": [sum(row.get("bytes_up", 0) for row in run) for run in runs],
        "seconds": [sum(row["seconds"] for row in run) for run in runs],
        "clients_failed": [0, 0],
    }
    summary = kept(two)["summary"]
    assert summary.keys() == expected.keys()
    for key, values in expected.items():
        assert summary[key]["mean"] == pytest.approx(statistics.mean(values))
        assert summary[key]["deviation"] == pytest.approx(statistics.stdev(values))
        assert summary[key]["seeds"] == 2


def test_a_score_that_one_seed_lacks_is_the_mean_of_the_others():
    summary = summary_of([{"a": 1.0, "b": 2.0}, {"a": 3.0}])
    assert summary["a"] == {"mean": 2.0, "deviation": pytest.approx(2**0.5), "seeds": 2}
    assert summary["b"] == {"mean": 2.0, "deviation": None, "seeds": 1}


def test_a_whole_series_is_printed_again_and_run_no_more(two, spied, capsys):
    before = {path: path.read_bytes() for path in two.rglob("*") if path.is_file()}
    arguments = [*as_sets(CONFIG), "--seeds", "2", "--out", str(two)]
    assert main(["simulate", *arguments]) == 0
    out = capsys.readouterr().out
    assert spied == [] and "Seed 4 (1 of 2): done before." in out
    assert before == {path: path.read_bytes() for path in two.rglob("*") if path.is_file()}
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    summary = kept(two)["summary"]["eval_loss/rank_4"]
    own = [rounds(two / f"seed-{seed}")[-1]["eval_loss/rank_4"] for seed in (4, 5)]
    shown = lines["loss, rank_4"].split()[2:]
    assert shown == [f"{value:.3f}" for value in (summary["mean"], summary["deviation"], *own)]
    assert main(["simulate", "--resume", str(two)]) == 0 and spied == []


def test_more_seeds_run_only_those_that_are_new(two, spied, tmp_path):
    out = shutil.copytree(two, tmp_path / "out")
    assert series(out, number=3) == 0
    assert spied == [("seed-6", 6, False)]
    assert [row["seed"] for row in kept(out)["rows"]] == [4, 5, 6]
    assert kept(out)["summary"]["eval_loss"]["seeds"] == 3
    assert series(out, number=2) == 0  # fewer again: of those alone, and nothing is forgotten
    assert kept(out)["summary"]["eval_loss"]["seeds"] == 2 and len(kept(out)["rows"]) == 3
    shutil.rmtree(out / "seed-5")
    assert series(out, number=2) == 0
    assert spied[1:] == [("seed-5", 5, False)]


def test_a_series_broken_within_a_seed_goes_on_there(two, tmp_path, spied, monkeypatch, capsys):
    """Interrupted after round 1 of the second seed; the bytes are those of the whole series."""
    honest = simulate_module.TerminalObserver.round_finished

    def interrupting(self, metrics):
        honest(self, metrics)
        if metrics["round"] == 1 and len(spied) == 2:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(simulate_module.TerminalObserver, "round_finished", interrupting)
        arguments = [*as_sets(CONFIG), "--seeds", "2", "--out", str(out)]
        assert main(["simulate", *arguments]) == 130
    assert f"`flexlora simulate --resume {out}` goes on with the series" in capsys.readouterr().err
    assert [row["seed"] for row in kept(out)["rows"]] == [4]
    assert main(["simulate", "--resume", str(out)]) == 0
    assert spied[2:] == [("seed-5", 5, True)]
    for seed in (4, 5):
        assert adapter_bytes(out / f"seed-{seed}") == adapter_bytes(two / f"seed-{seed}")
    scores = [[row["scores"]["eval_loss"] for row in kept(path)["rows"]] for path in (out, two)]
    assert scores[0] == scores[1]


def test_a_seed_without_a_checkpoint_begins_anew(two, tmp_path, spied):
    out = shutil.copytree(two, tmp_path / "out")
    shutil.rmtree(out / "seed-5" / "checkpoint")
    left = kept(out)
    left["rows"] = left["rows"][:1]
    (out / "seeds.json").write_text(json.dumps(left))
    assert SeedSeries.read(out).run(make_console()) == 0
    assert spied == [("seed-5", 5, False)]
    assert adapter_bytes(out / "seed-5") == adapter_bytes(two / "seed-5")


def test_overwrite_replaces_a_series_and_resumes_none_of_it(two, tmp_path, spied):
    out = shutil.copytree(two, tmp_path / "out")
    other = CONFIG.with_values({"lora.alpha": 8.0, "num-server-rounds": 1})
    with pytest.raises(UserError, match=r"a series with num-server-rounds = 2, this one has 1"):
        series(out, other)
    assert series(out, other, overwrite=True) == 0
    assert spied == [("seed-4", 4, False), ("seed-5", 5, False)]
    assert len(rounds(out / "seed-5")) == 2 and kept(out)["config"]["lora.alpha"] == 8.0


def test_a_configuration_that_failed_at_once_leaves_the_folder_free(tmp_path):
    bad = small(lora__target_modules="no_such_proj")
    with pytest.raises(UserError, match="no_such_proj"):
        series(tmp_path / "out", bad)
    assert series(tmp_path / "out", small()) == 0


def test_what_is_no_series_is_refused(two, tmp_path, capsys):
    for number in (1, 0, -3):
        with pytest.raises(UserError, match=rf"--seeds is {number}, expected at least 2"):
            series(tmp_path / "out", number=number)
    with pytest.raises(UserError, match=r"seed-4' already holds something that is not a series"):
        series(two / "seed-4", overwrite=True)
    with pytest.raises(UserError, match=r"a series with seed = 4, this one has 9"):
        series(two, CONFIG.with_values({"seed": 9}))
    assert main(["simulate", *as_sets(CONFIG), "--out", str(two), "--overwrite"]) == 2
    assert "already holds something that is not a run" in capsys.readouterr().err
    assert main(["simulate", "--resume", str(two), "--seeds", "2"]) == 2
    assert "--overwrite or --seeds" in capsys.readouterr().err
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "seeds.json").write_text("{half")
    assert main(["simulate", "--resume", str(tmp_path / "bad")]) == 2
    assert "seeds.json' is damaged" in capsys.readouterr().err


def test_the_threads_of_a_series_are_those_it_began_with(two):
    """``engine.threads=0`` means all cores of the machine, which may be another one by now."""
    every = SeedSeries.of(CONFIG.with_values({"engine.threads": 0}), two, seeds=2)
    assert every.continuing(SeedSeries.read(two)).config["engine.threads"] == 1
    other = SeedSeries.of(CONFIG.with_values({"engine.threads": 2}), two, seeds=2)
    with pytest.raises(UserError, match=r"a series with engine.threads = 1, this one has 2"):
        other.continuing(SeedSeries.read(two))
