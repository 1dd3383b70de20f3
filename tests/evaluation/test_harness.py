"""Tasks of lm-evaluation-harness: the harness' ``hf`` model with ``peft=`` is the oracle."""

import importlib.util
import json
import math
from dataclasses import replace

import pytest
import torch

from builders import random_adapter
from command_line import refusal
from flexlora.commands.cli import main
from flexlora.config.paths import EMBEDDED
from flexlora.data.collation import encode_rows
from flexlora.data.rows import parse_row
from flexlora.evaluation.evaluate import evaluate
from flexlora.evaluation.metrics import means
from flexlora.lora.peft_folder import save_adapter
from flexlora.training.models import load_base
from flexlora.training.slots import slot_model
from flexlora.wire.jobs import EvalJob

installed = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed"
)
# lm_eval and datasets warn about their internals.
pytestmark = pytest.mark.filterwarnings("default")

DOCUMENTS = {
    "choice": [
        {"q": "Reverse: lomat", "options": ["tamol", "lo", "tomal it is"], "gold": 0},
        {"q": "Plural of sare", "options": ["sares", "a long wrong answer", "s"], "gold": 0},
        {"q": "Class of 4180", "options": ["low", "mid", "high"], "gold": 1},
        {"q": "One of two ", "options": ["yes", "no"], "gold": 1},
        {"q": "Sort ma,ri,se", "options": ["ri,se,ma", "se"], "gold": 0},
    ],
    "text": [
        {"text": "the lomat is a sare"},
        {"text": "naïve über 12:45, then station 7"},
        {"text": "ma>ri, ri>se " * 40},  # longer than a window of 64 positions
    ],
    "answer": [
        {"q": "Reverse: lomat", "a": "tamol"},
        {"q": "Plural of sare, of the word", "a": "sares"},
        {"q": "Class of 4180", "a": "mid"},
    ],
}
KINDS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{q}}\\nAnswer:"
doc_to_choice: "{{options}}"
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
""",
    "answer": """
output_type: generate_until
doc_to_text: "{{q}}\\nAnswer:"
doc_to_target: "{{a}}"
generation_kwargs: {until: ["\\n", "a"], max_gen_toks: 12, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Three tasks and two adapters of unequal rank over the embedded base."""
    folder = tmp_path_factory.mktemp("harness")
    for name, documents in DOCUMENTS.items():
        lines = "".join(json.dumps(document) + "\n" for document in documents)
        (folder / f"{name}.jsonl").write_text(lines)
        (folder / f"{name}.yaml").write_text(
            f"task: own_{name}\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}}}\n"
            f"test_split: test{KINDS[name]}metadata: {{version: 1}}\n"
        )
    base = load_base("embedded")
    shapes = slot_model(base.model, "all-linear").shapes
    for rank in (2, 5):
        adapter = random_adapter(shapes, rank, seed=rank, dtype=torch.float32)
        save_adapter(adapter, folder / f"rank_{rank}", base=str(EMBEDDED))
    return folder


def tasks_of(place):
    return [str(place / f"{name}.yaml") for name in DOCUMENTS]


def theirs(place, monkeypatch, **options):
    """The harness' results with its ``hf`` model."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(EMBEDDED), "dtype": "float32", **options},
        tasks=tasks_of(place),
        task_manager=TaskManager(include_defaults=False),
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
    )
    return found


@installed
def test_every_slot_has_the_numbers_of_the_harness_own_model(place, monkeypatch):
    from flexlora.config.resolve import Config
    from flexlora.lora.peft_folder import load_adapter
    from flexlora.simulations.task_scores import task_scores

    adapters = {f"rank_{rank}": load_adapter(place / f"rank_{rank}") for rank in (2, 5)}
    config = Config.of({"lora.target-modules": ",".join(adapters["rank_2"])})
    ours = task_scores(load_base("embedded"), adapters, tasks_of(place), config)
    values = set()
    for name in ("base", *adapters):
        options = {} if name == "base" else {"peft": str(place / name)}
        expected = theirs(place, monkeypatch, **options)["results"]
        for task, metrics in expected.items():
            for key, value in metrics.items():
                if isinstance(value, float) and "stderr" not in key:
                    got = ours["adapters"][name][task][key]
                    assert got == pytest.approx(value, rel=1e-5), (name, task, key)
                    values.add((task, key, round(value, 6)))
    assert len({v for v in values if v[1] == "bits_per_byte,none"}) == 3, "three different models"
    assert len({v for v in values if v[0] == "own_choice"}) > 2, "acc is not acc_norm everywhere"


@installed
def test_rows_with_choices_have_the_figures_of_the_same_task_in_the_harness(place):
    """``acc`` and ``acc_norm`` of ``flexlora eval`` under ``data.template=plain``."""
    from flexlora.config.resolve import Config
    from flexlora.lora.peft_folder import load_adapter
    from flexlora.simulations.task_scores import task_scores

    adapters = {f"rank_{rank}": load_adapter(place / f"rank_{rank}") for rank in (2, 5)}
    targets, base = ",".join(adapters["rank_2"]), load_base("embedded")
    config = Config.of({"lora.target-modules": targets})
    expected = task_scores(base, adapters, [str(place / "choice.yaml")], config)["adapters"]
    rows = [
        parse_row({"question": d["q"], "choices": d["options"], "answer": d["gold"]}, "here")
        for d in DOCUMENTS["choice"]
    ]
    examples, _ = encode_rows(rows, tokenizer=base.tokenizer, template="plain", max_length=128)
    slots, job = (
        slot_model(base.model, targets),
        EvalJob(client_id="c", server_round=0, adapters={}),
    )
    for name, adapter in {"base": None, **adapters}.items():
        asked = job if adapter is None else replace(job, adapters={name: adapter})
        (result,) = evaluate(slots, base, [asked], [examples], batch_size=8, max_new_tokens=1)
        found = means(result.scores[name])
        for key in ("acc", "acc_norm"):
            assert found[key] == pytest.approx(expected[name]["own_choice"][f"{key},none"]), name


@installed
def test_one_pass_over_the_data_answers_for_all_slots(place, monkeypatch):
    """Three slots read three times the tokens of one, and the next slot's turn reads none."""
    from flexlora.config.resolve import Config
    from flexlora.evaluation.harness import SlotLM, base_slot
    from flexlora.lora.peft_folder import load_adapter
    from flexlora.simulations.task_scores import _evaluate, _load

    adapters = [load_adapter(place / f"rank_{rank}") for rank in (2, 5)]
    base, config = load_base("embedded"), Config.of({})
    slots = slot_model(base.model, ",".join(adapters[0]))
    tasks, read = _load([str(place / "choice.yaml")]), []
    for loaded in ([adapters[0]], [base_slot(adapters[0]), *adapters]):
        slots.load(loaded)
        lm = SlotLM(slots, base, batch_size=1)
        for lm.slot in range(len(loaded)):
            _evaluate(lm, tasks, config)
            read.append(lm.tokens_in_passes)
    assert read[1:] == [3 * read[0]] * 3
    slots.clear()


@installed
def test_the_command_prints_a_table_and_writes_intervals(place, tmp_path, capsys):
    out = tmp_path / "scores.json"
    tasks = f"lm_eval:{place}/choice.yaml,{place}/text.yaml"
    assert main(["eval", str(place / "rank_5"), "--tasks", tasks, "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "own_choice" in shown and "rank_5 - base" in shown
    report = json.loads(out.read_text())
    found = {(r["task"], r["metric"]): r for r in report["differences"]}
    bits = found["own_text", "bits_per_byte,none"]
    tuned, base = (report["adapters"][n]["own_text"] for n in ("rank_5", "base"))
    gap = tuned["bits_per_byte,none"] - base["bits_per_byte,none"]
    assert bits["value"] == pytest.approx(gap) and bits["documents"] == 3
    assert bits["low"] <= bits["value"] <= bits["high"]
    acc = found["own_choice", "acc,none"]
    assert acc["value"] == pytest.approx(
        report["adapters"]["rank_5"]["own_choice"]["acc,none"]
        - report["adapters"]["base"]["own_choice"]["acc,none"]
    )
    assert not math.isnan(acc["low"])


@installed
def test_the_registered_model_is_the_adapter_over_its_base(place):
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    import flexlora.evaluation.harness  # noqa: F401  (registers the model)

    lm = get_model("flexlora").create_from_arg_string(f"adapter={place}/rank_5")
    args = ("Reverse: lomat\nAnswer:", " tamol")
    request = Instance(request_type="loglikelihood", doc={}, arguments=args, idx=0)
    ((value, greedy),) = lm.loglikelihood([request])
    assert value < 0 and isinstance(greedy, bool)
    lm.slots.clear()


@installed
def test_tasks_that_cannot_be_scored_are_refused(place, tmp_path, capsys):
    sampled = (place / "answer.yaml").read_text().replace("do_sample: false", "do_sample: true")
    (tmp_path / "sampled.yaml").write_text(sampled.replace("own_answer", "own_sampled"))
    (tmp_path / "broken.yaml").write_text("task: own_broken\ndataset_path: json\n")
    run = ["eval", str(place / "rank_2"), "--tasks"]
    for name, match in (("sampled", "decoded greedily here"), ("broken", "lm_eval cannot load")):
        assert main([*run, f"lm_eval:{tmp_path}/{name}.yaml"]) == 2
        assert match in capsys.readouterr().err.splitlines()[-1]  # after the harness' own lines


@pytest.mark.nightly  # lm_eval reads 14,000 files to know its tasks
@installed
def test_an_unknown_task_is_refused_with_the_nearest(place, capsys):
    message = refusal(["eval", str(place / "rank_2"), "--tasks", "lm_eval:arc_eazy"], capsys)
    assert "has no task 'arc_eazy'" in message and "Did you mean 'arc_easy'" in message


@pytest.mark.parametrize(
    ("tasks", "match"),
    [
        ("arc_easy", "expected 'lm_eval:' and names"),
        ("lm_evall:arc_easy", "Did you mean 'lm_eval'"),
        ("lm_eval:", "names no task"),
        ("lm_eval:nowhere/task.yaml", "'nowhere/task.yaml' does not exist"),
    ],
)
def test_what_names_no_task_is_refused(place, tasks, match, capsys):
    assert match in refusal(["eval", str(place / "rank_2"), "--tasks", tasks], capsys)


def test_without_the_package_one_sentence_says_what_to_install(place, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else find(name, *a)
    )
    run = ["eval", str(place / "rank_2"), "--tasks", "lm_eval:arc_easy"]
    assert "pip install flexlora[lm-eval]" in refusal(run, capsys)
