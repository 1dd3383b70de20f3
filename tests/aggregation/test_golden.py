"""Three rounds of every method against its equation in ``equations.py``, and against PEFT.

The reference keeps a memory of its own from round to round and never sees the product's state: only
what clients were sent and sent back. Both sides must agree on G and on what every class is sent.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import peft
import pytest
import torch

import equations
import reference
from builders import random_adapter
from equations import Reply
from flexlora import aggregate
from flexlora.aggregation import METHODS, make_method
from one_round import CLASSES, SHAPES, OneRound, distance, no_change

WIDTHS = {name: min(7, *shape) for name, shape in SHAPES.items()}
SETTINGS = {
    "plain": {"alpha": 16.0},
    "rslora": {"alpha": 5.0, "rslora": True},
    "unequal alphas": {"alphas": [16.0, 5.0, 3.0]},
}


@dataclass
class Memory:
    """What the reference server keeps of one module between rounds."""

    module: str
    G: torch.Tensor
    A: np.ndarray
    B: np.ndarray
    round: int = 0
    dropped: torch.Tensor | float = 0.0

    @property
    def width(self):
        return self.A.shape[0]

    def first(self, rank):
        return torch.from_numpy(self.B[:, :rank] @ self.A[:rank])

    def with_factors(self, A, B):
        return replace(self, A=A, B=B, G=torch.from_numpy(B @ A))


@dataclass
class Case:
    """A method with options; how the reference moves on, and what it sends to a rank."""

    name: str
    advance: object
    sends: object
    options: dict = field(default_factory=dict)

    def eta(self, replies):
        adaptive = self.name in ("residual", "aligned", "basis", "carried")
        own = equations.rate_of_round(replies) if adaptive else 1.0
        return self.options.get("server_learning_rate", own)

    @property
    def label(self):
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])


def whole(memory, case, rank):
    return memory.G


def top(memory, case, rank):
    return reference.truncate(memory.G, rank)


def first_rows(memory, case, rank):
    return memory.first(rank)


def carried_rank(memory, case, rank):
    carried = case.options.get("carried_rank", 32)
    return reference.truncate(memory.G, max(carried, rank if case.name == "carried" else 0))


def sum_then_cap(rule):
    """A method whose next G is ``rule``'s, kept at ``max_rank`` directions, the rest fed back."""

    def advance(memory, case, replies):
        G = rule(memory.G, replies, memory.module, case.eta(replies)) + memory.dropped
        kept = reference.truncate(G, case.options.get("server_max_rank", 99))
        fed_back = G - kept if case.options.get("error_feedback") else 0.0
        return replace(memory, G=kept, dropped=fed_back)

    return advance


def fedex(memory, case, replies):
    A, B = equations.fedit_round(replies, memory.module, memory.width)
    mean = equations.mean_of_models(replies, memory.module)
    G = memory.G + case.eta(replies) * (mean - memory.G)
    return replace(
        memory, A=A, B=B, G=reference.truncate(G, case.options.get("server_max_rank", 99))
    )


def florist(memory, case, replies):
    asked = equations.stacked(replies, memory.module) + memory.dropped
    kept, cut, _ = equations.florist_cut(asked, case.options.get("energy_threshold", 0.95))
    fed_back = cut if case.options.get("error_feedback") else 0.0
    return replace(memory, G=memory.G + case.eta(replies) * kept, dropped=fed_back)


def raflora(memory, case, replies):
    asked = equations.raflora_sum(replies, memory.module)
    if case.options.get("error_feedback"):
        start = equations.raflora_sum(replies, memory.module, of=lambda reply: reply.start)
        return replace(memory, G=memory.G + case.eta(replies) * (asked - start))
    return replace(memory, G=memory.G + case.eta(replies) * (asked - memory.G))


def fedit(memory, case, replies):
    return memory.with_factors(*equations.fedit_round(replies, memory.module, memory.width))


def hetlora(memory, case, replies):
    return memory.with_factors(*equations.hetlora_round(replies, memory.module, memory.width))


def alternating(memory, case, replies):
    even = case.name == "rolora" and memory.round % 2 == 1
    trained = "lora_A" if even else "lora_B"
    held = memory.A, memory.B
    return memory.with_factors(
        *equations.alternating_round(held, replies, memory.module, memory.width, trained)
    )


def contributors(memory, case, replies):
    held = memory.A, memory.B
    return memory.with_factors(
        *equations.contributors_round(held, replies, memory.module, memory.width)
    )


def slora(memory, case, replies):
    sparse_rounds = case.options.get("sparse_rounds", 2)
    if memory.round >= sparse_rounds:
        return fedit(memory, case, replies)
    G = equations.flora_round(memory.G, replies, memory.module)
    if memory.round + 1 < sparse_rounds:
        return replace(memory, G=G)
    U, S, Vh = np.linalg.svd(G.numpy(), full_matrices=False)
    return memory.with_factors(Vh[: memory.width], (U * S)[:, : memory.width])


def slora_sends(memory, case, rank):
    sparse = memory.round < case.options.get("sparse_rounds", 2)
    return memory.G if sparse else memory.first(rank)


BASIS = equations.basis_round
FLORA, RESIDUAL = equations.flora_round, equations.residual_round
FEEDBACK = {"server_max_rank": 4, "error_feedback": True}
CASES = [
    Case("aligned", sum_then_cap(FLORA), carried_rank),
    Case("aligned", sum_then_cap(FLORA), carried_rank, {"carried_rank": 3}),
    Case("aligned", sum_then_cap(FLORA), carried_rank, FEEDBACK),
    Case("basis", sum_then_cap(BASIS), carried_rank),
    Case("basis", sum_then_cap(BASIS), carried_rank, {"carried_rank": 3}),
    Case("basis", sum_then_cap(BASIS), carried_rank, FEEDBACK),
    Case("carried", sum_then_cap(RESIDUAL), carried_rank, {"carried_rank": 5}),
    Case("carried", sum_then_cap(RESIDUAL), carried_rank, FEEDBACK),
    Case("fed-plora", contributors, whole, {"carried_rank": 9}),
    Case("fed-plora", contributors, whole, {"carried_rank": 4}),
    Case("fedex-lora", fedex, whole),
    Case("fedex-lora", fedex, whole, {"server_learning_rate": 0.6, "server_max_rank": 4}),
    Case("fedit", fedit, first_rows),
    Case("ffa-lora", alternating, first_rows),
    Case("flexlora", sum_then_cap(equations.flexlora_round), top),
    Case("flexlora", sum_then_cap(equations.flexlora_round), top, {"server_learning_rate": 0.4}),
    Case("flexlora", sum_then_cap(equations.flexlora_round), top, {"server_max_rank": 4}),
    Case(
        "flexlora",
        sum_then_cap(equations.flexlora_with_feedback),
        top,
        {"error_feedback": True, "server_learning_rate": 0.7},
    ),
    Case("flora", sum_then_cap(FLORA), whole),
    Case("flora", sum_then_cap(FLORA), whole, {"server_learning_rate": 0.5, **FEEDBACK}),
    Case("florist", florist, whole),
    Case("florist", florist, whole, {"energy_threshold": 0.7, "error_feedback": True}),
    Case("hetlora", hetlora, first_rows),
    Case("hetlora", hetlora, first_rows, {"prune_factor": 0.5, "prune_penalty": 0.01}),
    Case("raflora", raflora, top),
    Case("raflora", raflora, top, {"error_feedback": True, "server_learning_rate": 0.7}),
    Case("rbla", contributors, first_rows),
    Case("residual", sum_then_cap(RESIDUAL), top),
    Case("residual", sum_then_cap(RESIDUAL), top, {"server_learning_rate": 1.0, **FEEDBACK}),
    Case("rolora", alternating, first_rows),
    Case("slora", slora, slora_sends),
    Case("slora", slora, slora_sends, {"sparse_rounds": 1}),
    Case("slora", slora, slora_sends, {"sparse_rounds": 0}),
]


def first_memory(round_, module):
    """No change yet; the rows that the widest class was sent are data to the reference."""
    widest = max((s.trained[module] for s in round_.sent.values()), key=lambda f: f.rank)
    out_features, in_features = SHAPES[module]
    return Memory(
        module=module,
        G=torch.zeros(out_features, in_features, dtype=torch.float64),
        A=widest.lora_A.double().numpy(),
        B=np.zeros((out_features, widest.rank)),
    )


def reply(round_, update, k):
    """The update as the reference sees it; which terms were drawn is the start's own draw."""
    start = round_.start(k)
    shared = round_.sent[update.rank_class]
    terms = {m: shared.drawn_terms(update.client_id)[m] for m in SHAPES}
    return Reply(
        adapter=update.adapter,
        num_examples=update.num_examples,
        start=start.trained,
        carried=start.carried,
        terms=terms if shared.local.select else None,
    )


def check_what_is_sent(case, round_, memories):
    for k, rank_class in enumerate(CLASSES):
        start = round_.start(k)
        for module, memory in memories.items():
            trained = start.trained[module]
            assert trained.rank == rank_class.rank_of(module, *SHAPES[module])
            expected = case.sends(memory, case, trained.rank)
            served = start.served().delta_weight(module)
            assert reference.relative_error(served, expected) < 1e-10, (rank_class.name, module)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_three_rounds_equal_the_equation_and_every_class_is_sent_what_the_paper_says(case, setting):
    method, state, memories = make_method(case.name, **case.options), None, None
    for _ in range(3):
        round_ = OneRound(method, state, **SETTINGS[setting])
        memories = memories or {module: first_memory(round_, module) for module in SHAPES}
        check_what_is_sent(case, round_, memories)
        pruned = [0, 1, 2, 0, 1, 2] if case.options.get("prune_factor") else [0] * 6
        updates = [round_.update(k, 10 + 9 * k, pruned=pruned[k]) for k in range(6)]
        state = round_.finish(updates)
        replies = [reply(round_, update, k) for k, update in enumerate(updates)]
        for module, memory in memories.items():
            after = case.advance(memory, case, replies)
            memories[module] = replace(after, round=memory.round + 1)
            assert (memories[module].G - memory.G).norm() > 0.01 * memories[module].G.norm()
            got = state.change.delta_weight(module)
            assert reference.relative_error(got, memories[module].G) < 1e-10, module
        assert state.server_learning_rate == pytest.approx(case.eta(replies))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_in_float32_three_rounds_end_within_its_rounding_of_those_in_float64(case):
    method = make_method(case.name, **case.options)
    exact, single = None, no_change(dtype=torch.float32)
    for _ in range(3):
        rounds = OneRound(method, exact), OneRound(method, single, wire="float32")
        exact, single = (
            round_.finish([round_.update(k, 10 + 9 * k) for k in range(6)]) for round_ in rounds
        )
    assert next(iter(single.change.values())).U.dtype == torch.float32
    assert 1e-9 < distance(single.change, exact.change) < 1e-6


def test_every_method_has_a_golden_case():
    assert {case.name for case in CASES} == set(METHODS)


class TwoLinear(torch.nn.Module):
    """A model with a wide and a tall layer, for PEFT to put adapters on."""

    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(9, 14, bias=False, dtype=torch.float64)
        self.down = torch.nn.Linear(14, 8, bias=False, dtype=torch.float64)


LAYERS = {"up": (14, 9), "down": (8, 14)}


def peft_model(clients):
    """The clients' adapters in one PEFT model, by name."""
    model = None
    for k, (adapter, _) in enumerate(clients):
        factors = adapter["up"]
        config = peft.LoraConfig(
            r=factors.rank,
            lora_alpha=factors.alpha,
            use_rslora=factors.rslora,
            target_modules=["up", "down"],
        )
        if model is None:
            model = peft.get_peft_model(TwoLinear(), config, adapter_name="client_0")
        else:
            model.add_adapter(f"client_{k}", config)
        for name, own in adapter.items():
            layer = model.base_model.model.get_submodule(name)
            layer.lora_A[f"client_{k}"].weight.data = own.lora_A.clone()
            layer.lora_B[f"client_{k}"].weight.data = own.lora_B.clone()
    return model


@pytest.mark.parametrize(
    ("method", "combination", "bound"), [("flexlora", "svd", 1e-6), ("flora", "cat", 1e-12)]
)
def test_the_aggregate_is_what_peft_merges(method, combination, bound):
    """``add_weighted_adapter`` over unequal ranks and alphas: T_4 of the sum, or the whole stack.

    PEFT's SVD runs in float32.
    """
    clients = [
        (random_adapter(LAYERS, rank, alpha=alpha, seed=rank), examples)
        for rank, alpha, examples in ((2, 16.0, 10), (3, 5.0, 50), (4, 9.0, 30))
    ]
    model = peft_model(clients)
    total = sum(examples for _, examples in clients)
    model.add_weighted_adapter(
        [f"client_{k}" for k in range(len(clients))],
        [examples / total for _, examples in clients],
        "merged",
        combination_type=combination,
        **({"svd_rank": 4} if combination == "svd" else {}),
    )
    ours = aggregate(clients, method=method)
    for name in LAYERS:
        layer = model.base_model.model.get_submodule(name)
        theirs = layer.get_delta_weight("merged").detach()
        own = ours.adapter(4, 16.0) if combination == "svd" else ours.full_rank_adapter(16.0)
        assert reference.relative_error(own.delta_weight(name), theirs) < bound
