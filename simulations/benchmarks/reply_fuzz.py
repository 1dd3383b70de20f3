"""Decode many damaged replies, and find what gets through that must not.

    python -m flexlora.simulations.benchmarks.reply_fuzz [--replies 100000] [--seed 0]

A reply is one that a node sends (a capability, a training in each wire dtype, an evaluation) with
one to four changes at places drawn from all of its records: values, types, lists, keys, whole
records, and fields and bytes of arrays, whatever the packing. Every reply must be a result, a
refusal, or a failure with a cause. An update that passes the server's checks is looked at again by
other means: its modules, shapes, dtype, start and numbers; so is what a capability or a score that
passed says. Anything else is an escape, and is printed with the seed that repeats it.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from flwr.app import Array, ArrayRecord

import flexlora
from flexlora.aggregation import make_method
from flexlora.aggregation.engine.norm_bound import norms_of
from flexlora.aggregation.engine.starts import Factoring, Start
from flexlora.aggregation.engine.state import GlobalChange, State
from flexlora.aggregation.engine.updates import Update, check_update
from flexlora.clients.messages import (
    encode_capability,
    encode_evaluate_result,
    encode_train_result,
)
from flexlora.errors import UpdateRefused
from flexlora.lora.adapters import Adapter
from flexlora.lora.ranks import RankClass
from flexlora.server.transport import messages
from flexlora.simulations.benchmarks import reply_fuzz_secure as secure
from flexlora.simulations.benchmarks.process_memory import settled_bytes
from flexlora.simulations.benchmarks.reply_damage import Content, damaged
from flexlora.wire.encoding import RAW
from flexlora.wire.jobs import Capability, EvalResult, Score, TrainResult
from flexlora.wire.packing import DATA, PACKED

__all__ = ["Case", "Outcomes", "cases", "run"]

SHAPES = {"layers.0.q": (6, 8), "layers.0.v": (3, 8), "layers.1.q": (6, 8)}
WIRES = ("float32", "bfloat16", "int8", "float64")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A valid reply; ``start`` is what a train reply was trained from."""

    kind: str
    content: Content
    start: Start | None = None


@dataclass(kw_only=True)
class Outcomes:
    """How the replies were judged, and those that got through, each with its seed."""

    counts: Counter
    escapes: list[str]
    seconds: float


def cases() -> list[Case]:
    """A reply of every kind."""
    names = tuple(SHAPES)
    capability = Capability(
        client_id="client_1",
        num_examples=40,
        version=flexlora.__version__,
        fingerprint="f" * 32,
        quantization="none",
        device="cpu",
        runs=("matmul",),
        modules=names,
        out_features=tuple(SHAPES[name][0] for name in names),
        in_features=tuple(SHAPES[name][1] for name in names),
    )
    score = Score(loss=30.0, tokens=20, rows=4, exact_match=1.0, rouge_l=2.0, generated=4)
    score += Score(answer_bytes=80, choice_rows=2, correct=1.0, pattern_rows=1, passed=1.0)
    evaluation = EvalResult(client_id="client_1", scores={"rank_4": score, "personal": score})
    return [
        Case(kind="capability", content=Content.of(encode_capability(capability))),
        Case(kind="evaluate", content=Content.of(encode_evaluate_result(evaluation))),
        *(_trained(dtype, inline) for dtype in WIRES for inline in (True, False)),
        *(Case(kind=k, content=Content.of(reply)) for k, reply in secure.secure_replies().items()),
    ]


def _trained(dtype: str, inline: bool) -> Case:
    wide = torch.float64 if dtype == "float64" else torch.float32
    state = State(round=2, change=GlobalChange.zero(SHAPES, wide))
    start = make_method("residual").start(state, RankClass.of(3), Factoring(alpha=16.0)).sealed()
    generator = torch.Generator().manual_seed(0)
    noise = {
        name: factors.map(lambda t: t + 0.1 * torch.randn(t.shape, generator=generator).to(t))
        for name, factors in start.trained.items()
    }
    result = TrainResult(
        client_id="client_1",
        rank_class=start.rank_class.name,
        base_round=2,
        digest=start.digest,
        num_examples=30,
        adapter=Adapter(noise),
        steps=5,
        tokens=100,
        train_loss=1.5,
        train_seconds=2.0,
    )
    content = encode_train_result(result, dtype=dtype, start=start)
    if not inline:
        data = bytes(content.config_records["report"].pop(DATA))  # type: ignore[arg-type]
        content[PACKED] = ArrayRecord({PACKED: Array("uint8", (len(data),), RAW, data)})
    return Case(kind=f"train {dtype}", content=Content.of(content), start=start)


def judged(case: Case, content: Content) -> tuple[str, str]:
    """What the server makes of a reply, and what is wrong with that: empty if nothing."""
    metadata = SimpleNamespace(src_node_id=7)
    reply: Any = SimpleNamespace(has_error=lambda: False, content=content, metadata=metadata)
    if case.kind == "capability":
        report = messages.decode_capability(reply)
        return ("failed", "") if report.cause else ("accepted", _odd_capability(report))
    if case.kind == "evaluate":
        result = messages.decode_eval_result(reply)
        return ("failed", "") if result.cause else ("accepted", _odd_scores(result))
    if case.kind in secure.SECURE_KINDS:
        return secure.judged_secure(case.kind, reply)
    assert case.start is not None
    try:
        trained = messages.decode_train_result(reply, case.start)
        if trained.adapter is None:
            return "failed", ""
        if trained.withheld:  # refused where nodes do not withhold losses (`rounds/replies.py`)
            return "refused", ""
        update = Update(
            client_id="client_1",
            adapter=trained.adapter,
            num_examples=trained.num_examples,
            digest=trained.digest,
        )
        check_update(update, case.start.trained, digest=case.start.digest)
    except UpdateRefused:
        return "refused", ""
    return "accepted", _odd_update(update, trained, case.start)


def _odd_update(update: Update, result: TrainResult, start: Start) -> str:
    if set(update.adapter) != set(start.trained) or update.digest != start.digest:
        return "other modules or another start"
    for name, factors in update.adapter.items():
        for label in ("lora_A", "lora_B"):
            got, sent = getattr(factors, label), getattr(start.trained[name], label)
            if (
                got.shape != sent.shape
                or got.dtype != sent.dtype
                or got.isfinite().sum() < got.numel()
            ):
                return f"{name}.{label} is {got.dtype} {tuple(got.shape)}, or not finite"
        product = factors.lora_B.float() @ factors.lora_A.float()
        if not bool((product * product).isfinite().all()):
            return f"the product of {name} is not finite in float32"
    numbers = (
        result.train_loss,
        result.train_seconds,
        *vars(norms_of(update.adapter, start.trained)).values(),
    )
    if not all(map(math.isfinite, numbers)) or not 0 <= result.train_loss <= 1000:
        return f"numbers {numbers}"
    return _odd_words((result.note, result.cause))


def _odd_capability(report: Capability) -> str:
    features = sum(report.out_features) + sum(report.in_features)
    if not 1 <= report.num_examples <= 2**40 or not 1 <= features <= 2**30:
        return f"{report.num_examples} examples, {features} features"
    if len(set(report.modules)) != len(report.out_features) or len(report.client_id) > 128:
        return "modules or names"
    return _odd_words((report.client_id, report.device, report.coverage, *report.runs))


def _odd_scores(result: EvalResult) -> str:
    for score in result.scores.values():
        right = max(score.correct, score.correct_norm)
        sound = score.exact_match <= score.rows and right <= score.choice_rows <= score.rows
        if not 0 <= score.loss <= 1000 * score.tokens or not sound:
            return f"{score}"
    return _odd_words((result.client_id, result.cause))


def _odd_words(words: tuple[str, ...]) -> str:
    return next((f"{w[:40]!r}" for w in words if not w.isprintable() or len(w) > 4000), "")


def replies(count: int, seed: int) -> Iterator[tuple[int, Case, Content]]:
    """``count`` damaged replies; each has a seed of its own."""
    whole = cases()
    for k in range(count):
        case = whole[k % len(whole)]
        yield seed + k, case, damaged(case.content, random.Random(seed + k))


def run(count: int, seed: int = 0, *, until_escape: bool = False) -> Outcomes:
    """Decode ``count`` replies; ``seconds`` are CPU seconds of decoding and checking alone."""
    outcomes = Outcomes(counts=Counter(), escapes=[], seconds=0.0)
    for number, case, content in replies(count, seed):
        began = time.process_time()
        try:
            outcome, odd = judged(case, content)
        except Exception as error:
            outcome, odd = "raised", f"{type(error).__name__}: {error}"[:200]
        outcomes.seconds += time.process_time() - began
        outcomes.counts[case.kind, outcome] += 1
        if odd:
            outcomes.escapes.append(f"seed {number}, {case.kind}: {odd}")
            if until_escape:
                break
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description="Decode damaged replies and count escapes.")
    parser.add_argument("--replies", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    run(options.replies // 10, options.seed)
    before = settled_bytes()
    outcomes = run(options.replies, options.seed)
    grown = (settled_bytes() - before) / 1e6
    for (kind, outcome), count in sorted(outcomes.counts.items()):
        print(f"{kind:<16} {outcome:<9} {count:>7}")
    for escape in outcomes.escapes[:20]:
        print(f"ESCAPED: {escape}")
    print(
        f"{options.replies} replies, {len(outcomes.escapes)} escapes; "
        f"{1e4 * outcomes.seconds / options.replies:.1f} CPU seconds for 10,000, "
        f"{grown:+.1f} MB of memory after the first tenth"
    )
    if outcomes.escapes:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
