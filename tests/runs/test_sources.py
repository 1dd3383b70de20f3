"""A base or rows that changed under a run are reported, and refused unless that is asked for."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from command_line import refusal
from federation import StopAt, Stopped, adapter_bytes, as_sets, small
from flexlora.clients import worker
from flexlora.commands.cli import main
from flexlora.config.paths import EMBEDDED
from flexlora.data.digests import ids_digest, rows_digests
from flexlora.data.rows import Row
from flexlora.errors import UserError
from flexlora.lora.peft_folder import load_adapter
from flexlora.runs.checkpoints import load_checkpoint
from flexlora.runs.folder import RunFolder
from flexlora.runs.sources import Sources, check_same, read_origin
from flexlora.simulations.simulate import resume, simulate
from flexlora.training import models

ROWS = [
    {"instruction": f"Say {word}.", "output": word, "client": client}
    for client in ("anna", "ben")
    for word in ("yes", "no")
]


def write_rows(folder, rows, split="train"):
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_base(folder):
    """Other weights of the same shapes, in an embedding, which every quantization leaves as is."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if "embed" in name)
    tensors[name] = tensors[name] + 0.01 * torch.ones_like(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})
    models._loaded.clear()
    worker._workers.clear()


@pytest.fixture(autouse=True)
def rows_are_read_again():
    """As in another process; the base stays loaded where its folder is another."""
    worker._workers.clear()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Rows and two runs on them: one that broke off in round 2 of 2, and a whole one."""
    place = tmp_path_factory.mktemp("sources")
    for split in ("train", "validation", "test"):
        write_rows(place / "rows", ROWS, split)
    config = small(
        data__path=str(place / "rows"),
        clients__count=0,
        num_server_rounds=2,
        train__max_steps=1,
        eval__max_new_tokens=1,
        lora__target_modules="q_proj",
    )
    with pytest.raises(Stopped):
        simulate(config, place / "stopped", observer=StopAt("round_started", 2))
    simulate(config, place / "run")
    return place


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A copy to change, which is the working directory."""
    shutil.copytree(made, tmp_path / "copy")
    for run in ("run", "stopped"):
        file = tmp_path / "copy" / run / "config.toml"
        file.write_text(file.read_text().replace(str(made), str(tmp_path / "copy")))
    # What is compared is compared before anything is scored.
    monkeypatch.setattr("flexlora.simulations.inspection.cells_of", lambda *_, **__: [])
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def move_base(place):
    """The base, and an adapter, elsewhere than they were: the same bytes under other names."""
    shutil.copytree(EMBEDDED, place / "base")
    shutil.copytree("run/adapters/rank_2", "elsewhere")
    for run in ("run", "stopped"):
        file = place / run / "config.toml"
        file.write_text(file.read_text().replace('"embedded"', f'"{place}/base"'))
    file = place / "elsewhere" / "adapter_config.json"
    config = json.loads(file.read_text()) | {"base_model_name_or_path": str(place / "base")}
    file.write_text(json.dumps(config))


COMMANDS = {
    "resume": ["simulate", "--resume", "stopped"],
    "eval": ["eval", "run"],
    "merge": ["export", "run", "--rank", "2", "--format", "merged", "--out", "merged"],
    "eval an adapter": ["eval", "run/adapters/rank_2"],
    "eval an adapter elsewhere": ["eval", "elsewhere"],
}


def test_another_base_is_refused_everywhere_and_the_flag_goes_on(place, capsys, caplog):
    move_base(place)
    assert main(COMMANDS["eval"]) == 0, "the control: the same base in another place"
    assert main(COMMANDS["eval an adapter elsewhere"]) == 0
    assert capsys.readouterr().err == ""
    change_base(place / "base")
    for arguments in COMMANDS.values():
        worker._workers.clear()
        message = refusal(arguments, capsys)
        assert (
            f"the base '{place}/base' has changed in weights or settings (its fingerprint is "
            in message
        )
        assert message.endswith("put back what was there, or go on with --allow-changed.")
    assert not (place / "merged").exists()
    for name in ("merge", "eval an adapter elsewhere", "resume"):
        assert main([*COMMANDS[name], "--allow-changed"]) == 0
        assert "has changed in weights or settings" in capsys.readouterr().err + caplog.text
    assert main(["eval", "stopped"]) == 0, "from now on the run is this base's"


def reordered(rows):
    return rows[::-1]


def one_word(rows):
    return [{**rows[0], "output": "maybe"}, *rows[1:]]


def one_less(rows):
    return rows[:-1]


def to_another(rows):
    return [{**rows[0], "client": "ben"}, *rows[1:]]


def test_other_train_rows_are_refused_by_a_resume(place, caplog, capsys):
    for change in (reordered, one_word, one_less, to_another):
        worker._workers.clear()
        write_rows(place / "rows", change(ROWS))
        message = refusal(COMMANDS["resume"], capsys)
        count = len(change(ROWS))
        assert f"the train rows have changed ({count} rows, 4 before) since 'stopped'" in message
    assert main(["eval", "run"]) == 0, "an evaluation reads other rows"
    assert main([*COMMANDS["resume"], "--allow-changed"]) == 0
    assert "the train rows have changed" in caplog.text


def test_the_spelling_of_the_rows_file_is_no_change(place, capsys):
    lines = [json.dumps({**row, "task": None}, indent=None) + " \r\n\r\n" for row in ROWS]
    (place / "rows" / "train.jsonl").write_text("\ufeff" + "".join(lines), newline="")
    assert main(COMMANDS["resume"]) == 0
    assert adapter_bytes(place / "stopped").keys() == adapter_bytes(place / "run").keys()


def test_an_evaluation_compares_the_rows_that_it_reads(place, capsys):
    write_rows(place / "rows", one_word(ROWS), "test")
    message = refusal(["eval", "run"], capsys)
    assert "the test rows have changed (4 rows, 4 before) since 'run' was trained" in message
    assert main(["eval", "run", "--set", "eval.split=validation"]) == 0
    assert main(["eval", "run", "--data", "rows"]) == 0, "rows that are named are not the run's"
    assert main(["eval", "run", "--allow-changed"]) == 0


def test_another_chat_template_is_refused_by_a_resume(place, capsys):
    move_base(place)
    file = place / "base" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config["chat_template"] = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    file.write_text(json.dumps(config))
    (place / "base" / "chat_template.jinja").write_text(config["chat_template"])
    message = refusal(COMMANDS["resume"], capsys)
    assert "the same rows have other tokens: another tokenizer or chat template" in message


def test_the_flag_is_for_a_run_that_goes_on(capsys, tmp_path):
    arguments = ["simulate", *as_sets(small()), "--allow-changed", "--out", tmp_path / "r"]
    assert "give --resume DIR too" in refusal(arguments, capsys)
    arguments = ["simulate", "--set", "allow-changed=true", "--out", tmp_path / "r"]
    assert "use --resume DIR --allow-changed" in refusal(arguments, capsys)


def test_an_adapter_from_elsewhere_is_evaluated_without_a_fingerprint(place, capsys):
    shutil.copytree("run/adapters/rank_2", "elsewhere")
    origin = place / "elsewhere" / "flexlora.json"
    origin.write_text(json.dumps({"format": 1, "base_fingerprint": "0" * 32}))
    assert "it was 000000000000" in refusal(["eval", "elsewhere"], capsys)
    origin.unlink()
    assert read_origin(place / "elsewhere") is None
    assert main(["eval", "elsewhere"]) == 0
    origin.write_text("[]")
    assert "flexlora.json' is damaged" in refusal(["eval", "elsewhere"], capsys)


def test_peft_reads_the_folder_as_before(place):
    config = pytest.importorskip("peft").LoraConfig.from_pretrained("run/adapters/rank_2")
    assert config.r == 2 and load_adapter("run/adapters/rank_2")
    names = {path.name for path in (place / "run" / "adapters" / "rank_2").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "flexlora.json"}


# The checkpoint's format.
def index_of(folder):
    return json.loads((folder / "checkpoint" / "current.json").read_text())


def with_index(folder, **changes):
    index = {k: v for k, v in (index_of(folder) | changes).items() if v is not None}
    (folder / "checkpoint" / "current.json").write_text(json.dumps(index))


def test_a_checkpoint_of_before_has_no_format_and_nothing_to_compare(place, capsys):
    assert index_of(place / "stopped")["format"] == 1
    notes = index_of(place / "stopped")["notes"]
    with_index(place / "stopped", format=None, notes={k: notes[k] for k in notes if k != "sources"})
    assert RunFolder("stopped").sources() is None
    assert main(COMMANDS["resume"]) == 0
    assert index_of(place / "stopped")["format"] == 1, "written in today's form from now on"


@pytest.mark.parametrize(
    ("found", "sentence"),
    [(2, "has format 2, and this FlexLoRA reads up to 1"), ("1", "damaged"), (-1, "damaged")],
)
def test_a_checkpoint_of_another_format_is_refused(found, sentence, place, capsys):
    with_index(place / "stopped", format=found)
    with pytest.raises(UserError, match=sentence):
        load_checkpoint(place / "stopped" / "checkpoint")
    assert sentence in refusal(COMMANDS["resume"], capsys)
    with pytest.raises(UserError, match=sentence):
        resume("stopped")


# Digests.
def rows_of(*outputs, **more):
    return {"a": {"train": [Row(output=text, **more) for text in outputs]}}


def test_digests_tell_apart_what_differs():
    others = [
        rows_of("ab", "c"),
        rows_of("a", "bc"),
        rows_of("c", "ab"),
        rows_of("ab"),
        rows_of("ab", "c", task="t"),
        rows_of("ab", "c", instruction="i"),
        rows_of("ab", "c", messages=(("user", "u"), ("assistant", "x"))),
        {"b": rows_of("ab", "c")["a"]},
        {"a": {"train": rows_of("ab")["a"]["train"]}, "b": {"train": rows_of("c")["a"]["train"]}},
    ]
    found = [rows_digests(rows)["train"] for rows in others]
    assert len(set(found)) == len(others)
    assert rows_digests(rows_of("ab", "c"))["train"] == found[0]
    assert found[0].startswith("2 rows, ") and rows_digests({})["test"].startswith("0 rows, ")
    assert ids_digest([]) == ids_digest(())


def test_what_one_side_does_not_know_is_not_compared():
    known = Sources(base="a" * 32, rows={"train": "1 rows, x"}, tokens="t")
    for before in (None, Sources(), Sources(rows={"test": "1 rows, y"})):
        assert not check_same(before, known, run="r", model="m", allowed=False, flag="--f")
    with pytest.raises(UserError, match=r"fingerprint is aaaaaaaaaaaa, it was bbbbbbbbbbbb.*--f"):
        check_same(Sources(base="b" * 32), known, run="r", model="m", allowed=False, flag="--f")
    assert Sources.from_dict(json.loads(json.dumps(known.to_dict()))) == known
