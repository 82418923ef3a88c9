"""What do tree attention and the keep of one kernel compute? For triton_cases.py.

B batch  G kv heads  R rows of all query heads of a kv head  T cache slots  D head dim
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton_cases import DTYPES, guarded, ptx_of

from fasteagle import tree_attention
from fasteagle.attention_trial import Inputs, Shape, noise
from fasteagle.cache import KVCache
from fasteagle.model import attend
from fasteagle.tree_attention import Tiles, attend_tree, choose_tiles

GROUPS = (1, 4, 7)  # query heads of a kv head
TOKENS = (1, 6, 26, 60, 64)
DIMS = (64, 80, 96, 128, 256)
SPLITS = (1, 2, 3, 8)  # 3 does not divide the blocks; 8 leaves ranges without any
KEEP_DTYPES = {**DTYPES, "fp32": torch.float32}


class AttentionCase(NamedTuple):
    group: int
    tokens: int
    dtype: str
    dim: int
    batch: int
    slots: int  # T


def attention_cases() -> list[AttentionCase]:
    """Every group with every number of tokens; dtypes, dims, batches and T take turns."""
    cases: list[AttentionCase] = []
    for tokens in TOKENS:
        for group in GROUPS:
            few = tokens * group < 60
            for dtype in DTYPES if few else [list(DTYPES)[len(cases) % 2]]:
                index = len(cases)
                dim, batch = DIMS[index % len(DIMS)], 3 if few and index % 2 else 1
                cases.append(AttentionCase(group, tokens, dtype, dim, batch, 64 + index))
    return cases


class KeepCase(NamedTuple):
    dtype: str
    path: int  # P
    dim: int


KEEP_CASES = [
    *(KeepCase("fp32", n_path, 80) for n_path in (1, 2, 6, 64)),
    *(KeepCase(dtype, n_path, 64) for dtype in DTYPES for n_path in (3, 9)),
    KeepCase("bf16", 33, 256),  # columns of a head in two programs
]
ATTENTION_KERNELS = ("tree 86 32", "tree 90 64", "add 90", "keep 90")


def exact(inputs: Inputs) -> Tensor:
    """Attention in float64, written out."""
    q, k, v, bias = (t.double() for t in inputs[:4])
    return (q @ k.mT / q.shape[-1] ** 0.5 + bias).softmax(-1) @ v


def ragged(shape: Shape) -> tuple[Inputs, Inputs]:
    """Inputs whose sequences end at different slots, and the same with NaN behind each end."""
    inputs = noise(shape, live=shape.slots, seed=shape.rows)
    q, k, v, bias, newest = inputs
    newest -= torch.arange(shape.batch) * 17 + shape.slots // 3
    behind = torch.arange(shape.slots) > newest[:, None]
    bias.masked_fill_(behind[:, None, None], -torch.inf)
    if shape.rows > 1:  # the last row sees one slot: whole ranges are nothing to it
        bias[:, :, -1, 1:] = -torch.inf
    spoilt = [side.masked_fill(behind[:, None, :, None], torch.nan) for side in (k, v)]
    # As a layer's tensors lie: q by tokens, keys and values in a longer cache.
    q = guarded(q.transpose(1, 2).contiguous()).transpose(1, 2)
    rest = [torch.full_like(k[:, :, :5], torch.nan)]
    k, v = (torch.cat([side, *rest], 2)[:, :, : shape.slots] for side in spoilt)
    assert k.stride(1) > k.shape[2] * k.stride(2), "not a view of a longer cache"
    return inputs, Inputs(q, k, v, guarded(bias), newest)


def distance(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found.double() - wanted).norm() / wanted.norm())


def attention_error(case: AttentionCase, tiles: Tiles | None = None) -> float:
    heads = 2 if case.batch == 1 and case.group * case.tokens < 60 else 1
    rows = case.tokens * case.group
    shape = Shape(
        *(case.batch, heads, rows, case.dim, case.slots, DTYPES[case.dtype], torch.device("cpu"))
    )
    inputs, given = ragged(shape)
    tiles = tiles or choose_tiles(case.batch * heads, rows, case.dim, case.slots)
    return distance(attend_tree(*given, tiles=tiles), exact(inputs))


def keep_differs(case: KeepCase) -> int:
    """How many elements differ from the gather and scatter of KVCache.keep, but the last slot."""
    from fasteagle.triton_cache import move_rows

    torch.manual_seed(case.path)
    n_slots = 2 * case.path + 7
    caches = [
        KVCache(
            (2, 3, 2, n_slots, case.dim), dtype=KEEP_DTYPES[case.dtype], device=torch.device("cpu")
        )
        for _ in range(2)
    ]
    for side in ("k", "v"):
        getattr(caches[0], side).normal_()
        getattr(caches[1], side).copy_(getattr(caches[0], side))
    # The second row moves nothing but garbage, the third has come to the end of its cache.
    nodes = 1 + torch.randperm(2 * case.path)[: case.path - 1].sort().values
    path = torch.zeros(3, case.path, dtype=torch.int64)
    path[0, 1:] = path[2, 1:] = nodes
    start = torch.tensor([1, 3, n_slots - 3])
    before = caches[0].k.clone()
    caches[0].keep(start, path, mode="eager")
    move_rows(caches[1].k, caches[1].v, start, path)
    assert case.path == 1 or not torch.equal(caches[0].k, before), "nothing was to be moved"
    sides = zip((caches[0].k, caches[0].v), (caches[1].k, caches[1].v), strict=True)
    return sum(int((one != other)[:, :, :, :-1].sum()) for one, other in sides)


def interpreted_attention() -> Iterator[tuple[str, Any]]:
    tree_attention.ADDED_AT_ONCE, added = 64, tree_attention.ADDED_AT_ONCE  # fewer programs
    for case in attention_cases():
        rows = 16 if case.tokens * case.group <= 16 else 64
        yield " ".join(map(str, case)), attention_error(case, Tiles(rows, 32, 1 + case.slots % 2))
    tree_attention.ADDED_AT_ONCE = added
    yield "by the rule", attention_error(AttentionCase(4, 2, "bf16", 64, 1, 70))
    for splits in SPLITS:
        case = AttentionCase(1, 5, "fp16", 64, 1, 90)
        yield f"splits {splits}", attention_error(case, Tiles(16, 16, splits))
    yield "blind row", blind_row()
    yield "operator", operator()
    yield "seam", seam()
    for keep in KEEP_CASES:
        yield "keep " + " ".join(map(str, keep)), keep_differs(keep)
    yield "tiles", rules()


def blind_row() -> list[float]:
    """Errors of all rows but one that sees nothing, and the largest number in that row."""
    shape = Shape(1, 1, 20, 64, 40, torch.float16, torch.device("cpu"))
    inputs = noise(shape, live=40)
    inputs.bias[:, :, 7] = -torch.inf
    found, wanted = attend_tree(*inputs, tiles=Tiles(16, 16, 3)), exact(inputs)
    others = [row for row in range(20) if row != 7]
    return [distance(found[:, :, others], wanted[:, :, others]), float(found[:, :, 7].abs().max())]


def operator() -> bool:
    """The operator as torch.compile and the fake tensors see it."""
    inputs = noise(Shape(2, 2, 3, 64, 20, torch.float16, torch.device("cpu")), live=20)
    op = torch.ops.fasteagle.tree_attention
    torch.library.opcheck(op, tuple(inputs), test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(lambda *args: op(*args) * 2, fullgraph=True, backend="eager")
    return bool(torch.equal(compiled(*inputs), op(*inputs) * 2))


def seam() -> list[int]:
    """How often model.attend calls ours: eager, measured, compiled; compiled for another shape."""
    tree_attention.DEVICES, devices = ("cpu",), tree_attention.DEVICES
    tree_attention._try, real = lambda shape, force: True, tree_attention._try
    shape = Shape(2, 2, 6, 64, 40, torch.float16, torch.device("cpu"))
    inputs, other = (noise(shape._replace(slots=slots), live=slots) for slots in (40, 30))
    slots = inputs.newest[:, None] - torch.arange(6).flip(0)
    calls: list[int] = []

    def ours_of(graph: torch.fx.GraphModule, _: Any) -> Any:
        calls.append(sum("tree_attention" in str(node.target) for node in graph.graph.nodes))
        return graph

    compiled = torch.compile(attend, fullgraph=True, dynamic=False, backend=ours_of)
    plain = attend(*inputs[:4], slots)
    with tree_attention.measuring():
        ours = attend(*inputs[:4], slots)
    assert torch.equal(compiled(*inputs[:4], slots), ours)
    compiled(*other[:4], slots - 10)
    tree_attention.DEVICES, tree_attention._try = devices, real
    return [int(not torch.equal(plain, ours)), *calls]


def rules() -> list[list[int]]:
    """The rule for LLaMA2-7B and LLaMA3-8B: [heads, rows, T, *tiles]."""
    return [
        [heads, tokens * group, slots, *choose_tiles(heads, tokens * group, 128, slots)]
        for heads, group in ((32, 1), (8, 4))
        for tokens in TOKENS
        for slots in (512, 1024, 2048, 8192)
    ]


def compiled_attention() -> Iterator[tuple[str, Any]]:
    """The order of what a GPU is told: loads, products, barriers and stores."""
    from fasteagle.triton_attention import add_ranges, attend_range
    from fasteagle.triton_cache import move_path

    types = dict.fromkeys(("q", "k", "v", "bias", "out"), "*bf16")
    types |= {"sums": "*fp32", "scales": "*fp32", "scale": "fp32"}
    types |= dict.fromkeys(("newest", "start", "path"), "*i64")
    head = {"DIM": 128, "WIDTH": 128, "BLOCK": 32, "SPLITS": 4}
    kernels = {
        "tree 86 32": (attend_range, head | {"ROWS": 32}),
        "tree 90 64": (attend_range, head | {"ROWS": 64}),
        "add 90": (add_ranges, head | {"ROWS": 4}),
        "keep 90": (move_path, {"ROWS": 8, "COLUMNS": 128}),
    }
    for name, (kernel, constants) in kernels.items():
        target = int(name.split()[1])
        ptx = ptx_of(kernel, 16, constants, Tiles(0, 0, 0), types=types, target=target)
        words = r"mma\.sync|wgmma\.mma|cp\.async\.cg|ld\.global|st\.global|bar\.sync|ld\.local"
        yield name, re.findall(words, ptx)
