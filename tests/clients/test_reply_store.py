"""Replies kept on disk: whole or not at all, bounded, for one trainer and one user."""

from __future__ import annotations

import os
import stat
import time

import pytest

from flexlora.clients.trainer.content_codec import (
    PART_BYTES,
    array_parts,
    encode_header,
)
from flexlora.clients.trainer.reply_store import ReplyStore
from flexlora.clients.trainer.trainer_pb2 import Reply
from flexlora.errors import UserError
from trainers import content_of


def kept_reply(content):
    return Reply(content=encode_header(content)), list(array_parts(content))


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "lock")


def test_a_kept_reply_is_read_back_as_it_was_and_for_this_user_alone(tmp_path):
    header, parts = kept_reply(content_of(PART_BYTES + 9, 3))
    kept = ReplyStore(tmp_path / "kept", max_bytes=10**8, max_seconds=60)
    written = kept.put("a", header, iter(parts))
    found = kept.find("a")
    for reply in (written, found):
        assert reply.header == header and b"".join(reply.parts()) == b"".join(parts)
    assert kept.find("b") is None
    assert stat.S_IMODE((tmp_path / "kept").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "kept" / "a.reply").stat().st_mode) == 0o600
    kept.close()


@pytest.mark.parametrize("at", [0, 9, 300, -40, -1])
def test_a_damaged_file_counts_as_absent(tmp_path, at):
    header, parts = kept_reply(content_of(500))
    kept = ReplyStore(tmp_path, max_bytes=10**8, max_seconds=60)
    kept.put("a", header, parts).close()
    data = bytearray((tmp_path / "a.reply").read_bytes())
    data[at] ^= 1
    (tmp_path / "a.reply").write_bytes(data)
    assert kept.find("a") is None and names(tmp_path) == []
    for cut in (b"", bytes(data[:7]), bytes(data[:-1])):
        (tmp_path / "a.reply").write_bytes(cut)
        assert kept.find("a") is None
    kept.close()


def test_a_write_that_breaks_leaves_nothing_and_what_a_crash_left_is_swept(tmp_path):
    header, parts = kept_reply(content_of(500))
    kept = ReplyStore(tmp_path, max_bytes=10**8, max_seconds=60)

    def broken():
        yield parts[0]
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        kept.put("a", header, broken())
    assert names(tmp_path) == []
    (tmp_path / "b.reply.partial").write_bytes(b"half")
    kept.close()
    ReplyStore(tmp_path, max_bytes=10**8, max_seconds=60).close()
    assert names(tmp_path) == []


def test_the_oldest_replies_go_first_and_the_one_just_made_can_still_be_read(tmp_path):
    header, parts = kept_reply(content_of(1000))
    kept = ReplyStore(tmp_path, max_bytes=10**8, max_seconds=60)
    kept.put("a", header, parts).close()
    size = (tmp_path / "a.reply").stat().st_size
    kept.max_bytes = 2 * size
    for age, name in ((30, "a"), (20, "b")):
        kept.put(name, header, parts).close()
        os.utime(tmp_path / f"{name}.reply", (time.time() - age,) * 2)
    kept.put("c", header, parts).close()
    assert names(tmp_path) == ["b.reply", "c.reply"] and kept.usage() == (2, 2 * size)
    kept.max_bytes = size - 1
    last = kept.put("d", header, parts)
    assert names(tmp_path) == [] and b"".join(last.parts()) == b"".join(parts)
    kept.close()


def test_replies_that_are_too_old_are_not_given(tmp_path):
    header, parts = kept_reply(content_of(10))
    kept = ReplyStore(tmp_path, max_bytes=10**8, max_seconds=60)
    kept.put("a", header, parts).close()
    os.utime(tmp_path / "a.reply", (time.time() - 61,) * 2)
    assert kept.find("a") is None and names(tmp_path) == []
    kept.close()


def test_two_trainers_do_not_share_a_folder(tmp_path):
    kept = ReplyStore(tmp_path, max_bytes=1, max_seconds=1)
    with pytest.raises(UserError, match="another trainer keeps its replies in"):
        ReplyStore(tmp_path, max_bytes=1, max_seconds=1)
    kept.close()
    ReplyStore(tmp_path, max_bytes=1, max_seconds=1).close()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be used: .*; give --state another"):
        ReplyStore(tmp_path / "file", max_bytes=1, max_seconds=1)
