"""Do keys and values land where they are told, and does keep bring the accepted path together?"""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasteagle.cache import KVCache
from fasteagle.compile import Mode

SHAPE = (2, 3, 2, 20, 4)  # L, B, G, T, D
LAYERS, BATCH, HEADS, SLOTS, DIM = SHAPE


def filled(seed: int = 0) -> KVCache:
    cache = KVCache(SHAPE, dtype=torch.float32, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    cache.k.copy_(torch.randn(SHAPE, generator=generator))
    cache.v.copy_(torch.randn(SHAPE, generator=generator))
    return cache


def test_write_touches_its_slots_only() -> None:
    cache = filled()
    before_k, before_v = cache.k.clone(), cache.v.clone()
    slots = torch.tensor([[3, 1], [0, 7], [19, 18]])
    k, v = torch.randn(2, BATCH, 2, HEADS, DIM)
    cache.layers[1].write(slots, k, v)
    for row in range(BATCH):
        for index, slot in enumerate(slots[row].tolist()):
            before_k[1, row, :, slot] = k[row, index]
            before_v[1, row, :, slot] = v[row, index]
    assert torch.equal(cache.k, before_k)
    assert torch.equal(cache.v, before_v)


def test_read_is_a_view_of_the_first_slots() -> None:
    cache = filled()
    k, v = cache.layers[0].read(5)
    assert k.data_ptr() == cache.k.data_ptr()
    assert torch.equal(v, cache.v[0, :, :, :5])


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6), n_path=st.integers(1, 6), mode=st.sampled_from(["eager", "traced"])
)
def test_keep_moves_the_path_and_nothing_before_it(seed: int, n_path: int, mode: Mode) -> None:
    # Paths ascend and end in zeros, as accept makes them: [0, 2, 5, 0] keeps three nodes.
    rng = random.Random(seed)
    n_nodes = n_path + 3
    start = [rng.randrange(SLOTS - n_nodes) for _ in range(BATCH)]
    counts = [rng.randint(1, n_path) for _ in range(BATCH)]
    paths = [[0, *sorted(rng.sample(range(1, n_nodes), n - 1))] for n in counts]
    padded = [path + [0] * (n_path - len(path)) for path in paths]
    cache, before = filled(seed), filled(seed)
    cache.keep(torch.tensor(start), torch.tensor(padded), mode=mode)
    for side, old in ((cache.k, before.k), (cache.v, before.v)):
        for row in range(BATCH):
            begin, end = start[row], start[row] + counts[row]
            assert torch.equal(side[:, row, :, :begin], old[:, row, :, :begin])
            moved = old[:, row, :, [begin + node for node in paths[row]]]
            assert torch.equal(side[:, row, :, begin:end], moved)
            # All n_path slots may hold garbage, none after them may change.
            assert torch.equal(side[:, row, :, begin + n_path :], old[:, row, :, begin + n_path :])


def test_padded_rows_land_in_the_last_slot() -> None:
    cache = filled()
    assert cache.slots(torch.tensor([0, 17, 19]), 4).tolist() == [
        [0, 1, 2, 3],
        [17, 18, 19, 19],
        [19, 19, 19, 19],
    ]


@pytest.mark.parametrize("mode", ["eager", "traced"])
def test_keep_near_the_end_leaves_what_is_committed(mode: Mode) -> None:
    # A row that ended at the last slots still takes part in its batch's rounds.
    cache, before = filled(), filled()
    start, path = torch.tensor([0, 5, SLOTS - 2]), torch.zeros(BATCH, 6, dtype=torch.int64)
    cache.keep(start, path, mode=mode)
    assert torch.equal(cache.k[:, 2, :, : SLOTS - 2], before.k[:, 2, :, : SLOTS - 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_size_in_bytes_is_both_tensors(dtype: torch.dtype) -> None:
    cache = KVCache(SHAPE, dtype=dtype, device=torch.device("cpu"))
    assert cache.n_bytes == 2 * LAYERS * BATCH * HEADS * SLOTS * DIM * dtype.itemsize
    assert cache.n_slots == SLOTS
