"""What a node keeps between rounds: rounding of its uploads, factors of its own; never its update.

A place that cannot be read or written costs a client that which lies there, and its reply says so.
"""

import pytest

from flexlora.training.personal_store import PersonalStore
from packed import packed_bytes
from trainers import (
    asked,
    context_of,
    resident,
    run_config,
    train_message,
    values_of,
    write_rows,
)

INT8 = {"wire__dtype": "int8", "method__name": "residual"}
MEASURED = ("train-seconds",)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("node") / "data")


def rounds_of(made, config, count):
    """The replies to rounds 1 to ``count``."""
    method = config.method.name
    return [
        made.ask(train_message(config, server_round=k + 1, method=method), config)
        for k in range(count)
    ]


def arrays_of(content):
    return packed_bytes(content)


def forget(folder):
    """Remove the finished replies: what is asked again has to be trained again."""
    replies = list(folder.glob("*.reply"))
    assert replies
    for path in replies:
        path.unlink()


# --- the rounding of uploads ------------------------------------------------------------------


def test_a_repeated_round_is_the_same_bytes_from_disk_and_when_trained_again(data, tmp_path):
    """Over restarts: what the second round adds is what the first one left, however often."""
    config, kept = run_config(**INT8), tmp_path / "kept"
    with resident(data, kept) as made:
        first, second = rounds_of(made, config, 2)
        assert [reply["report"]["note"] for reply in (first, second)] == ["", ""]
    with resident(data, kept) as made:
        message = train_message(config, server_round=2, method="residual")
        assert arrays_of(made.ask(message, config)) == arrays_of(second)
        assert made.trainer.totals.from_disk == 1
    forget(kept)
    with resident(data, kept) as made:
        again = rounds_of(made, config, 2)
        assert made.trainer.totals.from_disk == 0
    for one, other in zip((first, second), again, strict=True):
        assert values_of(one, without=MEASURED) == values_of(other, without=MEASURED)
    with resident(data, tmp_path / "elsewhere") as made:
        message = train_message(config, server_round=2, method="residual")
        alone = made.ask(message, config)
    assert arrays_of(alone) != arrays_of(second), "nothing of round 1 was in round 2"


def test_another_run_begins_with_nothing_kept(data, tmp_path):
    config = run_config(**INT8)
    message = train_message(config, server_round=2, method="residual")
    with resident(data, tmp_path / "kept") as made:
        rounds_of(made, config, 1)
        other = made.ask(message, config, run_id=8)
        folders = sorted(path.name for path in (tmp_path / "kept" / "personal").iterdir())
    with resident(data, tmp_path / "fresh") as made:
        assert arrays_of(made.ask(message, config)) == arrays_of(other)
    assert folders == ["run-7", "run-8"]


def test_a_run_that_goes_on_with_another_finds_what_was_kept_of_it(data, tmp_path):
    config = run_config(**INT8)

    def second(made, **job):
        return train_message(config, server_round=2, method="residual", **job)

    with resident(data, tmp_path / "kept") as made:
        rounds_of(made, config, 1)
        unbroken = made.ask(second(made), config)
        resumed = made.ask(second(made, origin="7"), config, run_id=8)
        odd = made.ask(second(made, origin="../run-7"), config, run_id=9)
        folders = sorted(path.name for path in (tmp_path / "kept" / "personal").iterdir())
    assert arrays_of(resumed) == arrays_of(unbroken) != arrays_of(odd)
    assert folders == ["run-7", "run-9"], "an origin that is no number is none"


def test_a_process_that_keeps_nothing_rounds_without_feedback_and_says_so(data):
    config = run_config(**INT8)
    context = context_of(config, data_path=str(data), client_id="site")
    reply = asked(train_message(config, method="residual"), context)
    assert reply["report"]["note"] == (
        "int8 without error feedback: nothing is kept between rounds here"
    )
    assert reply["report"]["cause"] == "" and arrays_of(reply)


def test_over_other_wires_nothing_is_kept_and_nothing_said(data, tmp_path):
    config = run_config(method__name="residual", wire__dtype="bfloat16")
    with resident(data, tmp_path / "kept") as made:
        (reply,) = rounds_of(made, config, 1)
    assert reply["report"]["note"] == "" and not (tmp_path / "kept" / "personal").exists()


# --- factors of one's own ---------------------------------------------------------------------


@pytest.mark.parametrize("step", ["attach", "keep"])
def test_factors_of_ones_own_that_cannot_be_had_cost_no_update(data, tmp_path, monkeypatch, step):
    """The same update as without them, and a note of what happened."""
    own = run_config(personal__rank=2, personal__max_steps=2)
    with resident(data, tmp_path / "plain") as made:
        (expected,) = rounds_of(made, run_config(), 1)

    def broken(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, resident(data, tmp_path / "kept") as made:
        patch.setattr(PersonalStore, step, broken)
        (reply,) = rounds_of(made, own, 1)
    assert arrays_of(reply) == arrays_of(expected)
    assert reply["report"]["cause"] == ""
    assert reply["report"]["num-examples"] == expected["report"]["num-examples"] > 0
    where = "not kept: " if step == "keep" else ""
    shown = f"personal factors: {where}OSError: [Errno 28] No space left on device"
    assert reply["report"]["note"] == shown


def test_a_damaged_file_is_left_for_its_owner_to_see(data, tmp_path):
    """Fresh factors in its place would hide that what was learned is lost."""
    own, kept = run_config(personal__rank=2, personal__max_steps=2), tmp_path / "kept"
    with resident(data, kept) as made:
        rounds_of(made, own, 1)
        (path,) = (kept / "personal").rglob("*.safetensors")
        path.write_bytes(path.read_bytes()[:-5])
        reply = made.ask(train_message(own, server_round=2), own)
    assert reply["report"]["cause"] == "" and arrays_of(reply)
    assert "personal factors: client site: the personal factors in" in reply["report"]["note"]
    assert "remove the file" in reply["report"]["note"]
    assert list((kept / "personal").rglob("*.safetensors")) == [path]
