"""Who took part: every client is in the picture once, three of them or thousands."""

from __future__ import annotations

import re

import pytest

from flexlora.report.charts import WIDTH
from flexlora.report.participants import devices_table, participants, participants_figure
from flexlora.report.records import RunRecords
from pages import Page, client_row

CLASSES = ("rank_2", "rank_4", "rank_8")


def run_of(tmp_path, count, *, failed=()):
    """``count`` clients in three classes, on two devices; client k has 10 + k rows."""
    rows = [
        client_row(
            f"c{k}",
            rank_class=CLASSES[k % 3],
            device=f"card {k % 2}",
            num_examples=10 + k,
            status="failed" if k in failed else "ok",
        )
        for k in range(count)
    ]
    return RunRecords(
        path=tmp_path,
        config={},
        environment={},
        rounds=({"round": 0}, {"round": 1}),
        clients=tuple({key: str(value) for key, value in row.items()} for row in rows),
        evaluations=(),
        classes={"never asked": {"name": "rank_2"}},
    )


def bars_of(page, kind):
    paths = [a["d"] for tag, a in page.elements if tag == "path" and kind in a["class"]]
    return [tuple(map(float, at)) for d in paths for at in re.findall(r"M([\d.]+) ([\d.]+)V", d)]


@pytest.mark.parametrize("count", [1, 3, 24, 1613])
def test_every_client_has_its_bar_inside_the_picture(count, tmp_path):
    run = run_of(tmp_path, count)
    page = Page(participants_figure(run))
    lefts = [x for x, _ in bars_of(page, "bar")]
    assert len(lefts) == 2 * count  # rows and rounds; who was never asked has neither
    assert min(lefts) > 0 and max(lefts) < WIDTH
    assert f"{count + 1:,} clients" in page.said("text")
    labels = [a for tag, a in page.elements if tag == "text"]
    assert all(0 <= float(a["x"]) <= WIDTH for a in labels)


def test_clients_stand_by_class_then_device_then_rows(tmp_path):
    order = participants(run_of(tmp_path, 24))
    keys = [(CLASSES.index(c.rank_class), not c.device, c.device, c.rows) for c in order]
    assert keys == sorted(keys) and len({c.client_id for c in order}) == 25


def test_the_description_and_the_table_have_the_same_numbers(tmp_path):
    run = run_of(tmp_path, 6, failed=(0,))
    (spoken,) = Page(participants_figure(run)).said("desc")
    assert "rank_2: 3 clients, card 0 (1), card 1 (1), not asked yet (1), 23 train rows, 1 tr" in (
        spoken
    )
    page = Page(f"<main><h2>d</h2>{devices_table(run)}</main>")
    assert page.table("d")[1:] == [
        ["card 0", "rank_2 (1), rank_4 (1), rank_8 (1)", "3", "36", "3", "2"],
        ["card 1", "rank_2 (1), rank_4 (1), rank_8 (1)", "3", "39", "3", "3"],
        ["(not asked yet)", "rank_2 (1)", "1", "0", "0", "0"],
    ]


def test_nobody_known_is_no_picture(tmp_path):
    run = RunRecords(
        path=tmp_path,
        config={},
        environment={},
        rounds=(),
        clients=(),
        evaluations=(),
        classes={},
    )
    assert participants_figure(run) == "" and devices_table(run) == ""
