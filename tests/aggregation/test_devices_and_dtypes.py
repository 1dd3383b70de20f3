"""``aggregate`` takes any dtype and device: exact to float32 at least, where the first one is."""

from contextlib import contextmanager

import pytest
import torch

import reference
from builders import random_adapter
from cuda_like import DEVICE, cuda_like, upload
from flexlora import Adapter, LoRAFactors, aggregate
from flexlora.aggregation import METHODS
from flexlora.aggregation.engine.starts import Factoring
from flexlora.aggregation.engine.state import GlobalChange, State
from flexlora.algebra.decompose import MatrixSum, decompose
from flexlora.lora.ranks import RankClass
from law_checks import VARIANTS, variant
from one_round import CLASSES, SHAPES, OneRound, distance

WIDE = {"q": (96, 64), "up": (128, 80)}
HALF = [torch.bfloat16, torch.float16]
MIXED = [torch.bfloat16, torch.float32, torch.float16]
EXACT = ("flexlora", "residual", "flora", "fedex-lora", "aligned", "carried")


def population(dtypes, *, shapes=WIDE, count=6):
    """Clients whose sum falls by 2^-k from one to the next: a tail that bfloat16 does not hold."""
    clients = []
    for k in range(count):
        adapter = random_adapter(shapes, 8, seed=k).map(lambda t, k=k: t * 0.3**k)
        clients.append((adapter.to(dtypes[k % len(dtypes)]), 10 + k))
    return clients


def dense(clients):
    return {name: reference.flexlora_average(clients, name) for name in clients[0][0]}


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("dtypes", [[torch.bfloat16], [torch.float16], MIXED], ids=str)
def test_a_sum_of_half_precision_adapters_is_exact_to_float32_and_has_its_whole_rank(
    dtypes, method
):
    """Against the dense float64 mean of the very numbers that were given."""
    clients = population(dtypes)
    total = aggregate(clients, method=method)
    assert distance(total, dense(clients)) < 1e-6
    assert {svd.rank for svd in total.values()} == {48}
    assert {svd.S.dtype for svd in total.values()} == {torch.float32}


def test_one_adapter_in_bfloat16_costs_the_others_nothing():
    clients = population([torch.float32])
    alone = aggregate(clients)
    rounded = [(clients[0][0].to(torch.bfloat16), clients[0][1]), *clients[1:]]
    together = aggregate(rounded)
    assert [svd.rank for svd in together.values()] == [svd.rank for svd in alone.values()]
    assert distance(together, dense(rounded)) < 1e-6


@pytest.mark.parametrize("dtypes", [HALF, [torch.float32], [torch.float64], MIXED], ids=str)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_keeps_its_result_in_float32_or_in_the_float64_that_came(name, dtypes):
    clients = population(dtypes, shapes=SHAPES, count=4)
    expected = torch.float64 if torch.float64 in dtypes else torch.float32
    total = aggregate(clients, method=name)
    adapter = total.adapter(rank=4, alpha=8.0)
    assert {svd.U.dtype for svd in total.values()} == {expected}
    assert {f.lora_A.dtype for f in adapter.values()} == {expected}
    assert {f.lora_B.dtype for f in adapter.values()} == {expected}
    as_float64 = [(adapter.to(torch.float64), n) for adapter, n in clients]
    assert distance(total, aggregate(as_float64, method=name)) < 2e-6


def test_float64_among_the_adapters_gives_float64_wherever_it_stands():
    for dtypes in ([torch.float64, torch.bfloat16], [torch.bfloat16, torch.float64]):
        clients = population(dtypes)
        total = aggregate(clients)
        assert total["q"].S.dtype == torch.float64
        assert distance(total, dense(clients)) < 1e-12


def test_a_sum_is_never_decomposed_in_half_precision():
    matrix = MatrixSum(shape=(4, 4), terms=((1.0, torch.eye(4), torch.eye(4)),))
    for dtype in HALF:
        with pytest.raises(ValueError, match=r"expected torch\.float32 or torch\.float64"):
            decompose({"w": matrix}, max_rank=2, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_factors_are_floating_point_numbers(dtype):
    with pytest.raises(ValueError, match=r"lora_B is .*, expected a floating-point dtype"):
        LoRAFactors(lora_A=torch.ones(2, 3), lora_B=torch.ones(4, 2).to(dtype), alpha=1.0)


@contextmanager
def device():
    """The device, where ``torch.where`` makes numbers of Python's into tensors of it."""

    def as_tensors(condition, *values):
        made = [v if isinstance(v, torch.Tensor) else torch.tensor(v) for v in values]
        on_device = condition.device == DEVICE
        return where(condition, *(upload(v) if on_device and not v.dim() else v for v in made))

    where = torch.where
    with cuda_like(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "where", as_tensors)
        yield


def placed(clients, devices):
    """Each client's factors on a device of its own; the two of a module even apart."""
    moved = []
    for k, (adapter, n) in enumerate(clients):
        modules = {}
        for i, (name, f) in enumerate(adapter.items()):
            where = [devices[(k + i + j) % len(devices)] for j in range(2)]
            tensors = {"lora_A": f.lora_A.to(where[0]), "lora_B": f.lora_B.to(where[1])}
            modules[name] = LoRAFactors(**tensors, alpha=f.alpha, rslora=f.rslora)
        moved.append((Adapter(modules), n))
    return moved


@pytest.mark.parametrize("devices", [["cuda", "cpu"], ["cpu", "cuda"]], ids=" and ".join)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_aggregate_takes_adapters_from_any_device_and_stays_where_the_first_is(name, devices):
    clients = population(MIXED, shapes=SHAPES, count=4)
    expected = aggregate(clients, method=name)
    with device():
        moved = placed(clients, devices)
        total = aggregate(moved, method=name)
        home = next(iter(moved[0][0].values())).lora_A.device
        assert home.type == devices[0]
        parts = [t for svd in total.values() for t in (svd.U, svd.S, svd.Vh)]
        adapter = total.adapter(rank=6, alpha=8.0)
        parts += [t for f in adapter.values() for t in (f.lora_A, f.lora_B)]
        assert {part.device for part in parts} == {home}
        kept = total.energy_kept(rank=3)
        assert total.energy_in(clients[0][0]) == pytest.approx(
            expected.energy_in(clients[0][0]), abs=1e-5
        )
        result = {module: total.delta_weight(module).cpu() for module in SHAPES}
    assert distance(expected, result) < 1e-6
    assert kept == pytest.approx(expected.energy_kept(rank=3), abs=1e-5)


class RoundOnDevice(OneRound):
    """A round whose state and starts are on the device; clients answer from the host."""

    def __init__(self, method, state):
        self.method, self.state, self.sent = method, state, {}
        for rank_class in CLASSES:
            start = self.method.start(state, rank_class, Factoring(alpha=16.0)).sealed()
            self.sent[rank_class.name] = start


@pytest.mark.parametrize("label", VARIANTS)
def test_two_rounds_on_a_device_are_those_of_the_host(label):
    """State, starts, momentum and stored factors on the device; updates come from the host."""
    method = variant(label)
    hosted = State(round=0, change=GlobalChange.zero(SHAPES, torch.float64))
    replies = []
    for _ in range(2):
        round_ = RoundOnDevice(method, hosted)
        replies.append([round_.update(k, 10 + 7 * k) for k in range(4)])
        hosted = round_.finish(replies[-1], factor_gap=True)
    with device():
        state = State(round=0, change=GlobalChange.zero(SHAPES, torch.float64, "cuda"))
        for updates in replies:
            round_ = RoundOnDevice(method, state)
            state = round_.finish(updates, factor_gap=True)
        tensors = [t for svd in state.change.values() for t in (svd.U, svd.S, svd.Vh)]
        assert {t.device for t in [*tensors, *state.extra.values()]} == {DEVICE}
        result = {module: state.change.delta_weight(module).cpu() for module in SHAPES}
        lowest = RankClass(name="rank_1", rank=1)
        served = method.start(state, lowest, Factoring(alpha=16.0)).for_client("x").served()
        assert {f.lora_A.device for f in served.values()} == {DEVICE}
    assert distance(hosted.change, result) < 1e-9
