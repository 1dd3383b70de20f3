"""All methods with their variants; the laws of ``engine/method.py`` as checks.

A check is an ``AssertionError`` for a method that breaks its law.
"""

import itertools
from dataclasses import replace

import torch

import reference
from flexlora.aggregation import METHODS, make_method
from flexlora.aggregation.engine.method import Law
from one_round import CLASSES, SHAPES, OneRound, distance, next_state, no_change, same_bits

LAWS = [text for name, text in vars(Law).items() if name.isupper()]


FEEDBACK = {"error_feedback": True}
VARIANTS = {name: (name, {}) for name in sorted(METHODS)} | {
    "carried few": ("carried", {"carried_rank": 4}),
    "fed-plora few terms": ("fed-plora", {"carried_rank": 4}),
    "flexlora feedback": ("flexlora", FEEDBACK),
    "florist feedback": ("florist", FEEDBACK),
    "raflora feedback": ("raflora", FEEDBACK),
    "slora without sparse rounds": ("slora", {"sparse_rounds": 0}),
}


def variant(label):
    name, options = VARIANTS[label]
    return make_method(name, **options)


def check_order(method):
    round_ = OneRound(method, next_state(method))
    updates = [round_.update(k, 10 + 7 * k) for k in range(4)]
    results = [round_.finish(order) for order in itertools.permutations(updates)]
    assert all(same_bits(results[0], other) for other in results[1:])


def check_scale_of_weights(method):
    """By a power of two not even the last bit changes; by a thousand that bit alone may."""
    round_ = OneRound(method, next_state(method))
    updates = [round_.update(k, 3 + 5 * k) for k in range(4)]
    plain = round_.finish(updates).change
    for scale, bound in ((1024, 0.0), (1000, 1e-12)):
        scaled = [replace(update, num_examples=scale * update.num_examples) for update in updates]
        assert distance(round_.finish(scaled).change, plain) <= bound


def check_one_client(method):
    cases = itertools.product(CLASSES, (16.0, 3.5), (False, True), ("float32", "float64"))
    for rank_class, alpha, rslora, wire in cases:
        options = {"wire": wire, "alpha": alpha, "rslora": rslora}
        start = next_state(method, no_change(dtype=getattr(torch, wire)), **options)
        round_ = OneRound(method, start, **options)
        update = round_.update(0, 17, rank_class=rank_class.name)
        result = round_.finish([update]).change
        own = {module: reference.delta_weight(f) for module, f in update.adapter.items()}
        assert distance(result, own) < (1e-6 if wire == "float32" else 1e-12)


def check_zero_training(method):
    """Two rounds of everybody and two of the weakest alone, over lossless wires."""
    for wire, bound in (("float64", 1e-12), ("float32", 1e-6)):
        trained = next_state(method, no_change(dtype=getattr(torch, wire)), wire=wire)
        for clients in (range(5), (0, 3)):
            state = trained
            for _ in range(2):
                round_ = OneRound(method, state, wire=wire)
                state = round_.finish([round_.update(k, 10 + k, trained=False) for k in clients])
            assert distance(state.change, trained.change) < bound


def check_average_of_products(method):
    round_ = OneRound(method, no_change(), alphas=[5.0, 16.0, 3.0])
    updates = [round_.update(k, 10 + 7 * k) for k in range(6)]
    result = round_.finish(updates).change
    clients = [(update.adapter, update.num_examples) for update in updates]
    eta = getattr(method.options, "server_learning_rate", 1.0) or rate_of_first_round(clients)
    dense = {module: eta * reference.flexlora_average(clients, module) for module in SHAPES}
    assert distance(result, dense) < 1e-12


def rate_of_first_round(clients):
    """FedExP's rate where clients start from no change."""
    changes = [{m: reference.delta_weight(f) for m, f in a.items()} for a, _ in clients]
    return reference.fedexp_rate(changes, [num_examples for _, num_examples in clients])


CHECKS = {
    Law.ORDER: check_order,
    Law.SCALE_OF_WEIGHTS: check_scale_of_weights,
    Law.ONE_CLIENT: check_one_client,
    Law.ZERO_TRAINING: check_zero_training,
    Law.AVERAGE_OF_PRODUCTS: check_average_of_products,
}
