"""The socket's folder, the owner's keys and the memory limit."""

from __future__ import annotations

import os
import re
import socket
import stat

import pytest
import torch

from cuda_like import cuda_like
from flexlora.clients.trainer import memory_limit
from flexlora.clients.trainer.owner_config import OwnerConfig, is_owner_key, job_config
from flexlora.clients.trainer.sockets import check_folder, check_free, connection_error
from flexlora.config.resolve import KEYS, Config, all_keys
from flexlora.errors import UserError
from trainers import query_message, resident, run_config, write_rows


def test_a_folder_in_which_others_may_write_is_refused_and_its_parents_are_seen(tmp_path):
    folder = tmp_path / "a"
    check_folder(folder / "made" / "s")
    assert stat.S_IMODE((folder / "made").stat().st_mode) == 0o700
    for mode in (0o770, 0o707, 0o1777):
        (folder / "made").chmod(mode)
        with pytest.raises(UserError, match=rf"others may write in '.*made' \(mode {mode:04o}\)"):
            check_folder(folder / "made" / "s")
    (folder / "made").chmod(0o750)
    folder.chmod(0o777)
    with pytest.raises(UserError, match=r"others may write in '.*a'"):
        check_folder(folder / "made" / "s")
    folder.chmod(0o1777)  # as /tmp is: who does not own a folder in it cannot rename it
    check_folder(folder / "made" / "s")
    folder.chmod(0o700)
    with pytest.raises(UserError, match=r"--socket has \d+ bytes, expected 107 at most"):
        check_folder(tmp_path / ("x" * 100) / "socket")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else_is_refused(tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, -1)
    with pytest.raises(UserError, match=r"belongs to another user .uid 12345., who could replace"):
        check_folder(folder / "s")


def test_only_a_dead_socket_is_removed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a short path
    path = tmp_path.joinpath("f")
    path.write_text("mine")
    with pytest.raises(UserError, match="is there and is not a socket"):
        check_free(path)
    assert path.read_text() == "mine"
    here = type(path)("s")
    check_free(here)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("s")
        listening.listen()
        with pytest.raises(UserError, match="a trainer listens on 's' already"):
            check_free(here)
        assert here.exists() and connection_error(here) == ""
    check_free(here)
    assert not here.exists() and connection_error(here) == "there is no such socket"


def test_a_run_can_change_nothing_that_is_the_nodes(tmp_path):
    node = OwnerConfig.of(model="embedded", data="/rows", sets=("model.dtype=bfloat16",))
    wanted = {
        **Config().flat(),
        "model.name": "owner/other",
        "model.dtype": "float64",
        "data.path": "/etc",
        "engine.device": "cuda",
        "clients.count": 9,
        "out": "/tmp/x",
        "train.max-steps": 3,
        "data.template": "alpaca",
        "lora.target-modules": "q_proj",
    }
    config = job_config(node.config, wanted)
    assert (config.model.name, config.data.path) == ("embedded", "/rows")
    assert (config.model.dtype, config.engine.device) == ("bfloat16", "auto")
    assert (config.clients.count, config.data.partition, config.out) == (1, "iid", "")
    assert (config.train.max_steps, config.data.template) == (3, "alpaca")
    assert config.lora.target_modules == "q_proj"


def test_no_key_that_names_a_place_travels():
    """What a key's help calls a folder, a file, a hub name, a CSV or an address is the node's."""
    names_a_place = r"\b(folder|file|hub|CSV|address)\b"
    helps = {key: option.description for key, option in all_keys().items()}
    places = [key for key, text in helps.items() if re.search(names_a_place, text)]
    assert {"model.name", "data.path", "data.name", "out", "ranks.file"} <= set(places)
    run = {key: "/from/the/run" for key in places if isinstance(KEYS[key].default, str)}
    node = OwnerConfig.of(model="embedded", data="/rows").config
    assert "/from/the/run" not in job_config(node, run).flat().values()


@pytest.mark.parametrize("item", ["train.max-steps=3", "data.path=/x", "clients.count=3", "seed=1"])
def test_the_owner_sets_only_what_is_the_owners(item):
    if item.startswith("data.path"):
        assert OwnerConfig.of(model="m", data="/y", sets=(item,)).config.data.path == "/x"
        return
    with pytest.raises(UserError, match=r"is not the node's to say; expected one of model\.name"):
        OwnerConfig.of(model="m", data="/y", sets=(item,))
    assert is_owner_key("model.dtype") and not is_owner_key("data.template")


def test_a_model_that_does_not_fit_the_memory_limit_is_the_planners_sentence():
    node = OwnerConfig.of(model="embedded", data="/rows")
    with pytest.raises(UserError, match=r"does not fit 1,000,000 bytes: at rank 1 .* more"):
        memory_limit.smallest_plan(node.config, 10**6)
    assert memory_limit.smallest_plan(node.config, 6 * 2**30).plan.rank >= 1
    wide = OwnerConfig.of(model="embedded", data="/rows", sets=("model.dtype=float64",))
    with pytest.raises(UserError, match="--memory-limit plans bases in float32 and bfloat16"):
        memory_limit.smallest_plan(wide.config, 6 * 2**30)


def test_the_limit_is_told_to_servers_and_enforced_where_torch_can(tmp_path):
    with resident(write_rows(tmp_path / "d"), tmp_path / "k", limit_bytes=123_456_789) as made:
        reply = made.ask(query_message(), run_config())
        again = made.ask(query_message(), run_config(seed=3))
    assert reply["capability"]["free-bytes"] == again["capability"]["free-bytes"] == 123_456_789
    config = OwnerConfig.of(model="embedded", data="/rows").config
    assert "nothing enforces it" in memory_limit.enforce(
        config.with_values({"engine.device": "cpu"}), 2**30
    )
    with cuda_like(total_bytes=16 * 2**30) as card:
        assert "47% of the card" in memory_limit.enforce(config, 8 * 2**30)
        assert card.fraction == 7.5 / 16
        assert "0% of the card" in memory_limit.enforce(config, 2**20)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.zeros(1, device="cuda")
        with pytest.raises(UserError, match="bytes, but the card has"):
            memory_limit.enforce(config, 17 * 2**30)
