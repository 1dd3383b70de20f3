"""Slots of keys and values: who has which tokens, and how much memory is taken."""

import random

import torch

from flexlora.serving.kv_cache import KVCache, LayerShape

LAYERS = {
    0: LayerShape(heads=2, key_width=3, value_width=5, dtype=torch.float32),
    4: LayerShape(heads=1, key_width=2, value_width=2, dtype=torch.float32),
}
TOKEN_BYTES = 4 * (2 * 8 + 4)


def cache_of(slots_of_64, max_length=300):
    return KVCache(
        LAYERS,
        max_length=max_length,
        max_bytes=64 * slots_of_64 * TOKEN_BYTES,
        device=torch.device("cpu"),
    )


def fill(slot, number):
    """Write ``number`` over all tokens of a slot."""
    first = slot.index * slot.pool.capacity
    for held in (slot.pool.keys, slot.pool.values):
        for matrix in held.values():
            matrix[first : first + slot.length] = number


def holds(slot, number):
    first = slot.index * slot.pool.capacity
    return all(
        bool((matrix[first : first + slot.length] == number).all())
        for held in (slot.pool.keys, slot.pool.values)
        for matrix in held.values()
    )


def test_every_slot_keeps_its_tokens_while_others_come_and_go():
    draw, cache, slots = random.Random(0), cache_of(40), {}
    for number in range(1, 400):
        slot = cache.take(draw.randint(1, 300))
        if slot is not None:
            slot.length = draw.randint(1, slot.pool.capacity)
            fill(slot, number)
            slots[number] = slot
        while slots and (slot is None or draw.random() < 0.5):
            cache.free(slots.pop(draw.choice(list(slots))))
            slot = True
        assert cache.used_bytes <= cache.reserved_bytes <= cache.max_bytes
        for held, other in slots.items():
            assert holds(other, held)
    for pool in cache.pools:
        assert [slot.index for slot in pool.slots] == list(range(len(pool.slots)))
    for slot in slots.values():
        cache.free(slot)
    assert cache.reserved_bytes == cache.used_bytes == 0


def test_a_slot_is_less_than_twice_as_long_as_needed():
    cache = cache_of(100)
    assert [pool.capacity for pool in cache.pools] == [64, 128, 256, 300]
    for tokens in (1, 64, 65, 200, 256, 257, 300):
        capacity = cache.take(tokens).pool.capacity
        assert tokens <= capacity <= max(64, 2 * tokens)


def test_memory_that_another_pool_holds_in_reserve_is_taken_back():
    cache = cache_of(8)
    many = [cache.take(64) for _ in range(5)]
    assert cache.pools[0].reserved == 8, "doubled"
    assert cache.take(128) is not None
    assert cache.take(128) is None, "one slot of 64 is left"
    assert cache.take(64) is not None
    assert cache.take(64) is None
    cache.free(many[0])
    assert cache.take(64) is not None
    assert cache.fits_alone(300)
    assert not cache_of(2).fits_alone(129)


def test_what_is_cleared_is_zero_and_its_neighbours_are_not():
    cache = cache_of(8)
    slots = [cache.take(64) for _ in range(3)]
    for number, slot in enumerate(slots, 1):
        slot.length = 64
        fill(slot, number)
    slots[1].clear()
    assert holds(slots[0], 1)
    assert holds(slots[1], 0)
    assert holds(slots[2], 3)
