"""Plans that fit and that nothing better fits beside; the command; and every refusal."""

from __future__ import annotations

import itertools
import json
import resource
import subprocess
import sys
from dataclasses import replace

import pytest

from families import CONFIGS, published
from flexlora.aggregation.engine.options import choices
from flexlora.commands.cli import main
from flexlora.config.resolve import KEYS, Config
from flexlora.config.sections import QUANTIZATIONS
from flexlora.errors import UserError
from flexlora.planning.devices import DEVICES
from flexlora.planning.memory import training_memory
from flexlora.planning.model_config import read_shape
from flexlora.planning.planner import Request, make_plan, needed_bytes, settings, useful_rank
from flexlora.planning.shapes import TrainingPlan

GB = 10**9
MODELS = ("llama-2-7b", "llama-3-8b", "mistral-7b", "qwen2.5-0.5b", "qwen2.5-7b")
CARDS = (6, 8, 12, 16, 24, 80)


def request(gigabytes=8.0, **values):
    return Request(
        **{"memory_bytes": round(gigabytes * GB), "max_length": 512, "batch": 4, **values}
    )


def tried(shape, wanted):
    try:
        return make_plan(shape, wanted)
    except UserError:
        return None


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("card", CARDS)
def test_a_plan_fits_with_its_margin_and_counts_all_its_terms(model, card):
    shape, wanted = published(model), request(card, num_examples=2000)
    choice = tried(shape, wanted)
    if choice is None:
        assert card == 6 and model in ("llama-3-8b", "qwen2.5-7b")
        return
    assert choice.terms == training_memory(shape, choice.plan)
    assert choice.terms.total * 1.1 == pytest.approx(needed_bytes(choice.terms, wanted))
    assert needed_bytes(choice.terms, wanted) <= card * GB
    assert choice.plan.batch * choice.accumulation == wanted.batch
    assert choice.plan.rank <= choice.useful_rank == 128
    assert set(choice.binding) <= {name for name, _ in choice.terms.items()}


@pytest.mark.parametrize("card", [8, 16, 24])
def test_nothing_better_would_have_fitted(card):
    """Against every combination there is, in the order of the module's own words."""
    shape, wanted = published("qwen2.5-7b"), request(card, num_examples=700)
    best = make_plan(shape, wanted).plan
    order = [*QUANTIZATIONS]

    def merit(plan):
        held = plan.carried_rank, plan.carried_dtype == "float32"
        speed = not plan.gradient_checkpointing, plan.batch
        moments = plan.optim == "adamw_torch"
        return plan.rank, -order.index(plan.quantization), *held, moments, *speed

    grid = itertools.product(
        (1, 2, 4, 8, 16, 32, 64),
        order,
        (1, 2, 4, 8, 16, 32, 64),
        ("float32", "bfloat16"),
        ("adamw_torch", "adamw_8bit"),
        (False, True),
        (1, 2, 4),
    )
    for rank, quantization, carried, carried_dtype, optim, checkpoint, batch in grid:
        plan = replace(
            best,
            rank=rank,
            quantization=quantization,
            carried_rank=carried,
            carried_dtype=carried_dtype,
            optim=optim,
            gradient_checkpointing=checkpoint,
            batch=batch,
        )
        if rank <= carried <= max(32, rank) and merit(plan) > merit(best):
            needed = needed_bytes(training_memory(shape, plan), wanted)
            assert needed > wanted.memory_bytes, plan


@pytest.mark.parametrize("model", MODELS)
def test_more_memory_is_never_a_smaller_rank_nor_more_quantization_at_one_rank(model):
    shape, order = published(model), [*QUANTIZATIONS]
    choices = [tried(shape, request(card, num_examples=5000)) for card in range(4, 90, 2)]
    found = [choice.plan for choice in choices if choice]
    assert [choice is None for choice in choices] == sorted(
        (choice is None for choice in choices), reverse=True
    )
    for small, large in itertools.pairwise(found):
        assert large.rank >= small.rank
        if large.rank == small.rank:
            assert order.index(large.quantization) <= order.index(small.quantization)


def test_a_large_card_holds_the_checkpoint_as_it_is_and_a_small_one_nf4():
    shape = published("llama-2-7b")
    large, small = make_plan(shape, request(80)).plan, make_plan(shape, request(6)).plan
    assert (large.quantization, large.dtype) == ("none", "bfloat16")
    assert not large.gradient_checkpointing and large.batch == 4
    assert (small.quantization, small.gradient_checkpointing) == ("nf4", True)
    old = make_plan(shape, request(80, bfloat16=False)).plan
    assert (old.quantization, old.dtype) == ("none", "float32")
    assert make_plan(read_shape("embedded"), request(8, max_length=256)).plan.dtype == "float32"


@pytest.mark.parametrize(
    ("examples", "rank"),
    [(1, 1), (19, 1), (20, 2), (80, 8), (99, 8), (640, 64), (2559, 128), (2560, 256), (10**9, 256)],
)
def test_a_rank_is_useful_while_each_direction_has_ten_examples(examples, rank):
    assert useful_rank(examples) == rank
    assert rank == 1 or 10 * rank <= examples
    choice = make_plan(published("qwen2.5-0.5b"), request(80, num_examples=examples))
    assert choice.plan.rank == rank


def test_without_a_number_of_examples_the_usual_largest_rank_is_proposed():
    choice = make_plan(published("qwen2.5-0.5b"), request(80))
    assert choice.plan.rank == useful_rank(None) == 64 and "--examples" in choice.reason
    tiny = replace(read_shape("embedded"), hidden_size=4)
    small = tuple(replace(x, out_features=12, in_features=9) for x in tiny.linears)
    capped = make_plan(replace(tiny, linears=small), request(8, max_length=64))
    assert capped.plan.rank == 8 and "whole rank" in capped.reason


def test_moments_are_the_first_that_are_rounded_where_a_card_is_small():
    """8 GB and a 7B model: 8-bit moments buy the rank; a larger card leaves them in 32 bits."""
    shape, wanted = published("llama-2-7b"), request(8, num_examples=640)
    small = make_plan(shape, wanted)
    assert (small.plan.quantization, small.plan.optim) == ("nf4", "adamw_8bit")
    exact = make_plan(shape, replace(wanted, optim="adamw_torch")).plan
    assert (exact.rank, exact.carried_rank) < (small.plan.rank, small.plan.carried_rank)
    assert make_plan(shape, replace(wanted, memory_bytes=24 * GB)).plan.optim == "adamw_torch"
    assert make_plan(shape, replace(wanted, memory_bytes=24 * GB, quantizes=False)).plan


def test_a_device_without_bitsandbytes_is_never_given_8_bit_moments():
    shape = published("qwen2.5-0.5b")
    for megabytes in range(1500, 12000, 250):
        wanted = request(megabytes / 1000, num_examples=2000, quantizes=False)
        choice = tried(shape, wanted)
        assert choice is None or choice.plan.optim == "adamw_torch"
    eight = tried(shape, request(3.5, num_examples=2000))
    assert eight is not None and eight.plan.optim == "adamw_8bit"


def test_paged_moments_count_in_full_and_are_taken_only_where_asked_for():
    shape = published("llama-2-7b")
    plans = {
        name: make_plan(shape, request(12, rank=64, optim=name))
        for name in ("adamw_8bit", "paged_adamw_8bit")
    }
    paged = plans["paged_adamw_8bit"]
    assert paged.plan.optim == "paged_adamw_8bit" and paged.terms == plans["adamw_8bit"].terms
    free = (tried(shape, request(card, num_examples=5000)) for card in range(6, 30))
    assert {choice.plan.optim for choice in free if choice} == {"adamw_torch", "adamw_8bit"}


def test_eager_attention_costs_what_its_scores_take():
    shape, wanted = published("llama-2-7b"), request(80, max_length=2048, batch=1)
    fused, eager = (make_plan(shape, replace(wanted, attention=a)) for a in ("auto", "eager"))
    assert settings(eager)["model.attn-implementation"] == "eager"
    assert "model.attn-implementation" not in settings(fused)
    same = replace(fused.plan, attention="eager")
    scores = 6 * 32 * 2048**2 * 32  # bytes of one, heads, rows by columns, layers
    assert training_memory(shape, same).total > fused.terms.total + 0.9 * scores
    assert not fused.plan.gradient_checkpointing
    flash = make_plan(published("qwen2.5-0.5b"), request(24, attention="flash_attention_2"))
    assert flash.plan.dtype == "bfloat16" and flash.plan.attention == "flash_attention_2"


def test_what_is_asked_for_is_kept():
    shape = published("llama-2-7b")
    asked = ({"rank": 3}, {"quantization": "nf4"}, {"carried_rank": 0}, {"optim": "sgd"})
    for options in asked:
        plan = make_plan(shape, request(80, **options)).plan
        assert all(getattr(plan, name) == value for name, value in options.items())
    assert not make_plan(shape, request(80, carried_rank=0)).plan.aligned


@pytest.mark.parametrize("card", [8, 16, 80])
@pytest.mark.parametrize("carried", [0, 32])
def test_a_plan_is_a_configuration_that_the_product_takes(card, carried):
    choice = make_plan(published("llama-2-7b"), request(card, carried_rank=carried))
    config = Config.resolve(sets=tuple(f"{k}={v}" for k, v in settings(choice).items()))
    assert config.ranks.fixed == choice.plan.rank
    assert config.eval.batch_size == choice.plan.batch
    assert config.model.quantization == choice.plan.quantization
    assert config.train.gradient_checkpointing == choice.plan.gradient_checkpointing
    assert config.train.optim == choice.plan.optim
    if carried:
        assert config.method.carried_rank == choice.plan.carried_rank


@pytest.mark.parametrize("model", ["llama-3-8b", "qwen2.5-7b"])
def test_a_card_too_small_is_told_the_bytes_that_are_missing(model):
    shape = published(model)
    with pytest.raises(UserError, match=r"rank 1 in NF4, one row of 512 .* would fit") as error:
        make_plan(shape, request(5))
    missing = int(str(error.value).split(" more.")[0].split()[-1].replace(",", ""))
    enough = make_plan(shape, Request(memory_bytes=5 * GB + missing, max_length=512, batch=4))
    assert enough.plan.rank == 1 and enough.plan.quantization == "nf4"
    with pytest.raises(UserError, match="1 more"):
        make_plan(shape, Request(memory_bytes=5 * GB + missing - 1, max_length=512, batch=4))


def test_shorter_rows_are_proposed_where_they_would_fit():
    shape = published("llama-2-7b")
    with pytest.raises(UserError, match=r"It fits with --max-length (\d+)\.") as error:
        make_plan(shape, request(6, max_length=4096, batch=1))
    length = int(str(error.value).rstrip(".").split()[-1])
    assert make_plan(shape, request(6, max_length=length, batch=1)).plan.max_length == length


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "nf5"}, r"'nf5', expected one of none, .*Did you mean 'nf4'"),
        ({"quantization": "nf4", "quantizes": False}, "bitsandbytes is not known to run"),
        ({"optim": "adamw_8bits"}, r"--optim is 'adamw_8bits', .*Did you mean 'adamw_8bit'"),
        ({"optim": "adamw_8bit", "quantizes": False}, "leave --optim out"),
        ({"optim": "paged_adamw_8bit", "cuda": False}, "managed memory, .* take adamw_8bit"),
        ({"attention": "flash"}, "--attn-implementation is 'flash', expected one of auto, eager"),
        ({"attention": "flash_attention_2", "cuda": False}, "needs CUDA and bfloat16"),
        ({"attention": "flash_attention_2", "bfloat16": False}, "needs CUDA and bfloat16"),
        ({"max_length": 10**6}, "built for at most 4096 positions"),
        ({"max_length": 0}, "--max-length is 0, expected at least 1"),
        ({"batch": 0}, "--batch is 0, expected at least 1"),
        ({"num_examples": 0}, "--examples is 0, expected at least 1"),
        ({"memory_bytes": 0}, "0 bytes of memory"),
        ({"rank": -2}, "--rank is -2, expected at least 1"),
        ({"carried_rank": -1}, "--carried-rank is -1, expected at least 0"),
        ({"target_modules": "q_pro"}, "Did you mean 'q_proj'"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        make_plan(published("llama-2-7b"), request(**options))


def plan(capsys, *arguments):
    status = main(["plan", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command_prints_the_choice_and_its_terms(capsys):
    model = str(CONFIGS / "llama-2-7b.json")
    status, out, err = plan(capsys, "--model", model, "--memory", "8GB", "--max-length", "512")
    assert (status, err) == (0, "")
    choice = make_plan(published("llama-2-7b"), request(8, batch=8))
    for word in ("6,738,415,616", f"Train rank {choice.plan.rank}", "quantized weights", "total"):
        assert word in out
    for key, value in settings(choice).items():
        assert f"--set {key}={value}" in out


def test_the_command_as_json_adds_up(capsys):
    status, out, _ = plan(capsys, "--model", "embedded", "--memory", "64MiB", "--format", "json")
    printed = json.loads(out)
    assert status == 0 and sum(printed["terms"].values()) == printed["total_bytes"]
    assert printed["needed_bytes"] <= printed["memory_bytes"] == 64 * 2**20
    rebuilt = TrainingPlan(**printed["plan"])
    assert training_memory(read_shape("embedded"), rebuilt).total == printed["total_bytes"]


def test_the_table_has_a_row_for_every_device(capsys):
    model = str(CONFIGS / "llama-3-8b.json")
    status, out, _ = plan(capsys, "--model", model, "--table")
    assert status == 0 and all(name in out for name in DEVICES)
    assert "does not fit" in out and "nf4 in bfloat16" in out
    _, text, _ = plan(capsys, "--model", model, "--table", "--format", "json")
    rows = json.loads(text)
    assert [row["device"]["name"] for row in rows] == list(DEVICES)
    phone = next(row for row in rows if row["device"]["name"] == "Pixel 8 Pro")
    assert phone["plan"] is None and "does not fit" in phone["cause"]


def test_the_command_takes_an_optimizer_and_an_attention_kernel(capsys):
    model = str(CONFIGS / "llama-2-7b.json")
    chosen = ("--optim", "paged_adamw_8bit", "--attn-implementation", "eager")
    status, out, _ = plan(capsys, "--model", model, "--memory", "16GB", *chosen)
    assert status == 0 and "paged_adamw_8bit, eager attention" in out
    assert "--set train.optim=paged_adamw_8bit" in out
    assert "--set model.attn-implementation=eager" in out


def test_the_help_names_what_can_be_asked_for(capsys):
    assert main(["plan", "--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for key in ("model.quantization", "model.attn-implementation"):
        assert all(choice in printed for choice in choices(KEYS[key].annotation)), key


def test_this_machine_is_asked_where_nothing_else_is(capsys):
    status, out, _ = plan(capsys, "--model", "embedded")
    assert status == 0 and "runtime" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "embedded", "--memory", "8"), "like 8GiB"),
        (("--model", "embedded", "--device", "RTX 4091"), "Did you mean"),
        (("--model", "embedded", "--memory", "8GB", "--table"), "give one"),
        (("--model", "embedded", "--format", "jsn"), "Did you mean 'json'"),
        (("--model", "./nowhere"), "not a folder"),
        (("--model", "embedded", "--memory", "1MB"), "does not fit 1,000,000 bytes"),
        (("--model", "embedded", "--device", "Pixel 8 Pro", "--quantization", "nf4"), "bitsandbyt"),
        (("--model", "embedded", "--optim", "adamw"), "--optim is 'adamw', expected one of adamw_"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(capsys, arguments, message):
    status, out, err = plan(capsys, *arguments)
    assert status == 2 and out == "" and message in err
    assert err.startswith("flexlora: ") and err.count("\n") == 1


def test_a_folder_without_a_readable_config_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        read_shape(str(tmp_path))
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_shape(str(tmp_path))
    (tmp_path / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match="holds list, expected an object"):
        read_shape(str(tmp_path))


def test_a_hub_name_without_a_connection_is_one_sentence(monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import logging

    asked, usual = [], logging.get_verbosity()

    def refuse(*arguments):
        asked.append(arguments)
        assert logging.get_verbosity() == logging.ERROR, "or every retry is a line"
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(UserError, match=r"'owner/model' cannot be fetched: no route to host"):
        read_shape("owner/model")
    assert asked == [("owner/model", "config.json")]
    assert logging.get_verbosity() == usual


def test_the_answer_takes_under_a_second_of_work():
    """Of processor time, which a busy machine does not stretch; this is the longest search."""
    model = str(CONFIGS / "llama-3-8b.json")
    command = [
        sys.executable,
        "-m",
        "flexlora.commands.cli",
        "plan",
        "--model",
        model,
        "--memory",
        "6GB",
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2 and "does not fit" in done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
