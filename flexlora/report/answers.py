"""Answers of base, global and personal model side by side on the same prompts."""

from __future__ import annotations

from flexlora.report.markup import Markup, element, joined, name, text
from flexlora.report.records import RunRecords
from flexlora.runs.samples_file import Sample

__all__ = ["answers"]


def answers(run: RunRecords) -> Markup:
    """A card per prompt; empty for a run without samples."""
    if run.samples is None or not run.samples.samples:
        return Markup("")
    found = run.samples
    about = (
        f"After round {found.round}, to {found.split} rows drawn by the seed; greedy, the longest "
        "cut. A bar marks an answer that equals the reference."
    )
    cards = joined(_card(sample) for sample in found.samples)
    return joined([element("p", text(about), class_="soft"), cards])


def _card(sample: Sample) -> Markup:
    task = joined([text(", "), name(sample.task)]) if sample.task else Markup("")
    title = element("h3", name(sample.client_id), task)
    entries = [_entry("reference", sample.reference)]
    for who, answer in sample.answers.items():
        titled = f"{who} ({sample.rank_class})" if who == "global" else who
        entries.append(_entry(titled, answer, right=_equal(answer, sample.reference)))
    prompt = element("p", name(sample.prompt))
    return element("div", title, prompt, element("dl", joined(entries)), class_="sample")


def _entry(title: str, answer: str, *, right: bool = False) -> Markup:
    mark = {"class_": "right"} if right else {}
    said = text(f"{title}, equal") if right else text(title)
    body = name(answer) if answer.strip() else element("i", text("nothing"))
    return element("div", element("dt", said), element("dd", body, **mark))


def _equal(answer: str, reference: str) -> bool:
    return " ".join(answer.split()) == " ".join(reference.split())
