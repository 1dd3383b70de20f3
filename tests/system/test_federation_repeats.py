"""A message that Flower brings twice is the same call to the trainer, whatever its process saw.

Each ClientApp process reads the run's configuration out of a protobuf map, whose order is drawn
anew in every process.
"""

from flexlora.clients.trainer.client import call_of
from flexlora.seeds import numpy_generator
from trainers import context_of, run_config, train_message


def header(config, *, node_id=5, **job):
    """The bytes that a trainer names a call by."""
    call = call_of(train_message(run_config(), **job), context_of(config, node_id=node_id))
    return call.SerializeToString(deterministic=True)


def shuffled(config, seed):
    keys = list(config)
    return {keys[k]: config[keys[k]] for k in numpy_generator(seed, "order").permutation(len(keys))}


def test_the_order_of_the_configuration_does_not_matter():
    config = run_config().flat()
    orders = [shuffled(config, seed) for seed in range(5)]
    assert len({tuple(order) for order in orders}) == 5
    assert {header(order) for order in orders} == {header(config)}


def test_another_value_and_another_round_are_other_calls():
    config = run_config().flat()
    assert header({**config, "seed": 7}) != header(config)
    assert header(config, server_round=2) != header(config)
