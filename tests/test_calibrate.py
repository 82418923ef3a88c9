"""Are Hessians those of the layers' true inputs, and are calibration windows cut as promised?"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hf_folders import HEAD, TARGET, C, L, V, head_tensors, target_tensors, write
from torch import Tensor, nn

from fasteagle import demo
from fasteagle.calibrate import (
    Quantize,
    calibrate_block,
    calibrate_head,
    calibrate_target,
    read_block,
)
from fasteagle.checkpoint import load_head, load_target
from fasteagle.model import Linear, Transformer, run_block
from fasteagle.source import open_checkpoint
from fasteagle.tokenizer import Tokenizer, load_tokenizer
from fasteagle.tree import causal_mask
from fasteagle.windows import calibration_windows

LAYER = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
WINDOWS = torch.randint(V, (6, 20), generator=torch.Generator().manual_seed(5))  # 1.5 batches
Held = dict[str, Tensor]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target of three layers, in shards that split each of them."""
    config = TARGET | {"tie_word_embeddings": request.param}
    tensors = target_tensors(tied=request.param)
    return write(tmp_path_factory.mktemp("target"), config, tensors, "shards.safetensors")


def collect(run: Callable[[Quantize], None], changed: Callable[[Tensor], Tensor]) -> list[Held]:
    """What a calibration passes on, by name in its order: weights, Hessians, weights put back."""
    weights, hessians, used = {}, {}, {}

    def quantize(name: str, weight: Tensor, hessian: Tensor) -> Tensor:
        assert weight.dtype == hessian.dtype == torch.float32
        weights[name], hessians[name] = weight.clone(), hessian.clone()
        used[name] = changed(weight)
        return used[name]

    run(quantize)
    return [weights, hessians, used]


def same(weight: Tensor) -> Tensor:
    return weight


def coarse(weight: Tensor) -> Tensor:
    return weight.round()


def hooked(model: nn.Module, run: Callable[[], object]) -> Held:
    """The slow twin: every Linear's `x.T @ x` in one run of a whole model."""
    found: Held = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
            rows = inputs[0].flatten(0, 1)
            found[f"{name}.weight"] = rows.T @ rows

        return hook

    linears = [(name, part) for name, part in model.named_modules() if isinstance(part, Linear)]
    hooks = [part.register_forward_pre_hook(note(name)) for name, part in linears]
    run()
    for hook in hooks:
        hook.remove()
    return found


def forward(target: Transformer) -> Tensor:
    """The target's normed hidden states `[n, S, C]` on WINDOWS; its lm_head is run too."""
    slots = torch.arange(WINDOWS.shape[1]).expand(len(WINDOWS), -1)
    cache = target.new_cache(*WINDOWS.shape)
    hidden, _ = target(WINDOWS, slots, slots, causal_mask(slots, WINDOWS.shape[1]), cache)
    target.logits(hidden)
    return hidden


def with_weights(model: nn.Module, weights: Held) -> None:
    """Put weights into a model; a tied lm_head has no parameter of its own."""
    for name, weight in weights.items():
        if name in dict(model.named_parameters()):
            model.get_parameter(name).data = weight


def assert_close(found: Held, wanted: Held) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        scale = float(tensor.abs().max())
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("changed", [same, coarse])
def test_hessians_are_of_the_inputs_behind_what_is_already_quantized(
    folder: Path, changed: Callable[[Tensor], Tensor]
) -> None:
    def run(quantize: Quantize) -> None:
        calibrate_target(open_checkpoint(folder), WINDOWS, quantize)

    weights, hessians, used = collect(run, changed)
    layers = [f"layers.{index}.{name}.weight" for index in range(L) for name in LAYER]
    assert list(weights) == [*layers, "lm_head.weight"]
    target = load_target(folder, dtype=torch.float32)
    table = target.embed_tokens if target.tied else target.lm_head
    loaded = dict(target.named_parameters()) | {"lm_head.weight": table.weight}
    assert all(torch.equal(weights[name], loaded[name]) for name in weights)
    # An input depends on the matrices before it only, so one run with all in place has them all.
    with_weights(target, used | {"lm_head.weight": table.weight.data})
    wanted = hooked(target, lambda: forward(target))
    hidden = forward(target).flatten(0, 1)
    assert_close(hessians, wanted | {"lm_head.weight": hidden.T @ hidden})


@pytest.mark.parametrize("own_embedding", [False, True])
@pytest.mark.parametrize("changed", [same, coarse])
def test_a_heads_hessians_are_of_features_beside_the_next_embedding(
    folder: Path, tmp_path: Path, changed: Callable[[Tensor], Tensor], own_embedding: bool
) -> None:
    target = load_target(folder, dtype=torch.float32)
    own = {"embed_tokens.weight": torch.randn(V, C)} if own_embedding else {}
    place = write(tmp_path / "head", HEAD, head_tensors() | own)

    def run(quantize: Quantize) -> None:
        calibrate_head(open_checkpoint(place), target, WINDOWS, quantize)

    weights, hessians, used = collect(run, changed)
    assert list(weights) == ["fc.weight", *(f"layers.0.{name}.weight" for name in LAYER)]
    head = load_head(place, target)
    assert all(torch.equal(weights[name], head.get_parameter(name)) for name in weights)
    with_weights(head, used)
    slots = torch.arange(WINDOWS.shape[1] - 1).expand(len(WINDOWS), -1)
    mask, cache = causal_mask(slots, slots.shape[1]), head.new_cache(*slots.shape)
    embed = (head if own_embedding else target).embed_tokens
    inputs = embed(WINDOWS[:, 1:]), forward(target)[:, :-1]
    wanted = hooked(head, lambda: head(*inputs, slots, slots, mask, cache, run=run_block))
    assert_close(hessians, wanted)


@pytest.mark.parametrize("changed", [same, coarse])
def test_a_block_leaves_its_outputs_in_place_of_its_inputs(
    folder: Path, changed: Callable[[Tensor], Tensor]
) -> None:
    checkpoint = open_checkpoint(folder)
    block = read_block(checkpoint, 1, input_norm=True, device="cpu")
    inputs = torch.randn(6, 20, C, generator=torch.Generator().manual_seed(0))
    hidden = list(inputs.clone().split(4))
    with torch.inference_mode():
        calibrate_block(
            block,
            hidden,
            lambda name, weight, hessian: changed(weight),
            config=checkpoint.config,
            prefix="layers.1.",
        )
    target = load_target(folder, dtype=torch.float32)
    target.layers = target.layers[1:2]
    for name in LAYER:
        weight = target.layers[0].get_submodule(name).weight
        weight.data = changed(weight.data)
    target.embed_tokens = target.norm = nn.Identity()
    slots = torch.arange(20).expand(6, -1)
    cache = load_target(folder, dtype=torch.float32).new_cache(6, 20)
    wanted, _ = target(inputs, slots, slots, causal_mask(slots, 20), cache)
    torch.testing.assert_close(torch.cat(hidden), wanted, rtol=1e-5, atol=1e-5)


def test_one_block_of_weights_is_held_at_a_time(folder: Path) -> None:
    read: list[str] = []
    quantized: list[str] = []
    checkpoint = open_checkpoint(folder)
    plain = checkpoint.weights.read

    def note(name: str) -> Tensor:
        read.append(name)
        return plain(name)

    checkpoint.weights.read = note

    def quantize(name: str, weight: Tensor, hessian: Tensor) -> Tensor:
        quantized.append(name)
        layer = name.split(".")[1]
        later = [key for key in read if ".layers." in key and key.split(".")[2] > layer]
        assert not (name.startswith("layers.") and later)
        return weight

    calibrate_target(checkpoint, WINDOWS, quantize)
    assert len(quantized) == 4 * L + 1
    layers = [key for key in read if ".layers." in key]
    assert len(layers) == len(set(layers))


def never(name: str, weight: Tensor, hessian: Tensor) -> Tensor:
    raise AssertionError("nothing is quantized before the windows are checked")


def test_windows_that_do_not_fit_the_model_are_refused(folder: Path) -> None:
    opened = open_checkpoint(folder)
    with pytest.raises(ValueError, match="65 tokens; this model takes at most 64"):
        calibrate_target(opened, torch.zeros(2, 65, dtype=torch.int64), never)
    with pytest.raises(ValueError, match=f"token {V}, the model a vocabulary of {V}"):
        calibrate_target(opened, torch.full((2, 8), V), never)


def test_what_a_quantizer_refuses_is_named(folder: Path) -> None:
    def refuse(name: str, weight: Tensor, hessian: Tensor) -> Tensor:
        raise ValueError("the Hessian is odd")

    with pytest.raises(
        ValueError, match=r"^layers\.0\.self_attn\.qkv_proj\.weight: the Hessian is odd"
    ):
        calibrate_target(open_checkpoint(folder), WINDOWS, refuse)


# ----------------------------------------------------------------------------------- windows


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(Path(demo.BASE))


def lines(n: int) -> str:
    return "".join(f"def function_{n}(value):\n    return value + {n}\n\n" for n in range(n))


def test_windows_are_pieces_of_the_text_after_bos(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(lines(200))
    tokens = tokenizer.encode(lines(200), bos=False)
    found = calibration_windows(tokenizer, path, n=5, length=50, seed=3)
    assert (found.shape, found.dtype) == ((5, 50), torch.int64)
    assert (found[:, 0] == tokenizer.bos_id).all()
    pieces = [tokens[start : start + 49] for start in range(0, len(tokens) - 48, 49)]
    places = [pieces.index(window) for window in found[:, 1:].tolist()]
    assert len(set(places)) == 5
    assert torch.equal(found, calibration_windows(tokenizer, path, n=5, length=50, seed=3))
    assert not torch.equal(found, calibration_windows(tokenizer, path, n=5, length=50, seed=4))


def test_short_text_gives_what_it_has(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(lines(60))
    n_tokens = len(tokenizer.encode(lines(60), bos=False))
    assert 600 < n_tokens < 3000
    fewer = calibration_windows(tokenizer, path, n=128, length=101, seed=0)
    assert fewer.shape == (n_tokens // 100, 101)
    shorter = calibration_windows(tokenizer, path, n=128, length=8192, seed=0)
    assert shorter.shape == (4, n_tokens // 4 + 1)


def test_questions_are_read_as_one_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = [lines(n) for n in (20, 30, 40)]
    rows = [{"prompt": texts[0]}, {"turns": [texts[1], "more"]}, {"prompt": texts[2]}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "q.txt").write_text("\n\n".join(texts))
    found = [
        calibration_windows(tokenizer, tmp_path / name, n=4, length=64, seed=0)
        for name in ("q.jsonl", "q.txt")
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("name", "content", "error", "words"),
    [
        ("t.txt", b"", ValueError, "has 0 tokens; at least 256 are needed"),
        ("t.txt", b"too short", ValueError, r"has \d tokens; at least 256 are needed, 128 windows"),
        ("t.txt", b"\xff\xfe\xff" * 999, ValueError, "is not UTF-8"),
        ("t.txt", None, FileNotFoundError, "does not exist"),
        ("t.jsonl", b"", ValueError, "is empty"),
        ("t.jsonl", b"{}\n", ValueError, "line 1: expected"),
        ("t.jsonl", None, FileNotFoundError, "calibration text .* does not exist"),
    ],
)
def test_text_that_cannot_calibrate_is_refused(
    tokenizer: Tokenizer,
    tmp_path: Path,
    name: str,
    content: bytes | None,
    error: type[Exception],
    words: str,
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=words):
        calibration_windows(tokenizer, tmp_path / name, seed=0)
