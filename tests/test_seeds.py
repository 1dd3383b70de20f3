"""Named draws: the same name gives the same numbers, any other name gives others."""

import subprocess
import sys

import torch

from flexlora.seeds import derive_seed, generator, numpy_generator


def test_a_draw_is_a_function_of_its_name_alone():
    names = [(0, "a"), (1, "a"), (0, "b"), (0, "a", 1), (0, "a", "1"), (0, "a1"), (0,), (0, 1, "a")]
    seeds = [derive_seed(*name) for name in names]
    assert len(set(seeds)) == len(names)
    assert seeds == [derive_seed(*name) for name in names]
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_draw_is_the_same_in_another_process():
    """Python's own ``hash`` is salted per process; this must not be."""
    code = "from flexlora.seeds import derive_seed; print(derive_seed(5, 'batches', 3, 'client'))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == derive_seed(5, "batches", 3, "client")


def test_no_global_generator_moves():
    import numpy as np

    torch.manual_seed(1)
    np.random.seed(1)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(1)
    np.random.seed(1)
    first = torch.rand(4, generator=generator(0, "x"))
    assert torch.equal(first, torch.rand(4, generator=generator(0, "x")))
    assert numpy_generator(0, "x").random() == numpy_generator(0, "x").random()
    assert torch.equal(torch.rand(3), expected[0])
    assert (np.random.rand(3) == expected[1]).all()
