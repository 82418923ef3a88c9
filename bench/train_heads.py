"""How are the small draft heads in bench/heads trained? The base stays frozen; minutes on a CPU.

python bench/train_heads.py --kind eagle3 --minutes 10 --out bench/heads/eagle3
python bench/train_heads.py --kind medusa --minutes 5 --out bench/heads/medusa

For bench/drafters.py, so that every kind of drafter has weights for the embedded base. Text: half
Python's own standard library (as the base saw it, without the files that benches prompt with), half
samples of the base. Targets are the base's own distributions.

B batch  S tokens of a window  C model dim  F feature dim  V vocabulary  J steps ahead
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.demo_pair import MODULES
from bench.environment import refuse, say
from bench.head_losses import LOSSES, Batch, start
from fasteagle.assemble import load
from fasteagle.checkpoint import load_head, load_target
from fasteagle.commands.numbers import positive
from fasteagle.engine import Engine
from fasteagle.model import Transformer
from fasteagle.sample import SamplingParams
from fasteagle.tree import causal_mask

WINDOW = 256  # the base's context
SAMPLED_WINDOWS = 320


class Text(NamedTuple):
    files: list[list[int]]  # ids of each file, without BOS
    samples: list[list[int]]  # windows that the base wrote, with BOS


def read_files(engine: Engine) -> list[list[int]]:
    """The standard library's modules, without tests and what benches prompt with."""
    assert engine.tokenizer is not None, "the embedded pair has a tokenizer"
    root = Path(sysconfig.get_paths()["stdlib"])
    held_out = {module.replace(".", "/") + ".py" for module in MODULES}
    paths = [path.relative_to(root) for path in sorted(root.rglob("*.py"))]
    skipped = {"test", "tests", "idlelib", "site-packages", "__pycache__", "lib2to3", "encodings"}
    wanted = [p for p in paths if not skipped & set(p.parts) and p.as_posix() not in held_out]
    texts = ((root / path).read_text(encoding="utf-8", errors="ignore") for path in wanted)
    return [ids for text in texts if len(ids := engine.tokenizer.encode(text)[1:]) > WINDOW]


def samples(args: argparse.Namespace, engine: Engine, files: list[list[int]]) -> list[list[int]]:
    """What the base wrote: read from --samples where an earlier run left it there, or written."""
    file = Path(args.samples) if args.samples else None
    if file and file.is_file():
        held: list[list[int]] = json.loads(file.read_text())
        return held
    written = write_samples(engine, files, args.seed)
    if file:
        file.write_text(json.dumps(written))
    return written


def write_samples(engine: Engine, files: list[list[int]], seed: int) -> list[list[int]]:
    """Windows that begin with 32 tokens of a file and go on at temperature 0, 0.7 or 1."""
    rng, windows = random.Random(seed), []
    sampler = Engine(engine.target, batch=16)
    for round_ in range(SAMPLED_WINDOWS // 16):
        prompts = [[1, *cut(rng, files, 31)] for _ in range(16)]
        params = SamplingParams(temperature=(0.0, 0.7, 1.0)[round_ % 3], seed=seed + round_)
        limits = {"max_new_tokens": WINDOW - 32, "stop_ids": []}
        results = sampler.generate(prompts, sampling=params, **limits)
        windows += [p + result.tokens for p, result in zip(prompts, results, strict=True)]
    return windows


def cut(rng: random.Random, files: list[list[int]], length: int) -> list[int]:
    """`length` tokens of a random file; long files are as likely as their length."""
    file = rng.choices(files, weights=[len(ids) for ids in files])[0]
    begin = rng.randrange(len(file) - length)
    return file[begin : begin + length]


@torch.no_grad()
def observe(target: Transformer, tokens: Tensor, layers: tuple[int, ...]) -> Batch:
    """What the base makes of windows `[B, S]`: features and logits of every position."""
    slots = torch.arange(tokens.shape[1])[None].expand(len(tokens), -1)
    cache = target.new_cache(*tokens.shape)
    mask = causal_mask(slots, tokens.shape[1])
    hidden, features = target(tokens, slots, slots, mask, cache, feature_layers=layers)
    return Batch(tokens, features, target.logits(hidden))


def batches(
    target: Transformer, text: Text, layers: tuple[int, ...], size: int, seed: int
) -> Iterator[Batch]:
    """Half files, half samples, without end."""
    rng = random.Random(seed)
    while True:
        windows = [[1, *cut(rng, text.files, WINDOW - 1)] for _ in range(size // 2)]
        windows += rng.sample(text.samples, size - size // 2)
        yield observe(target, torch.tensor(windows), layers)


def train(args: argparse.Namespace) -> None:
    """Train one head and write its folder."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    engine = load(None, "none", dtype="float32", device="cpu")
    files = read_files(engine)
    counts = torch.bincount(torch.tensor([t for ids in files for t in ids]), minlength=2048)
    head = start(args.kind, engine.target, counts)
    if args.init:  # before the base writes for a minute: a wrong one ends here
        take_over(head.module, args, engine.target)
    begin = time.perf_counter()
    text = Text(files, samples(args, engine, files))
    say(f"{len(files)} files; base wrote {len(text.samples)} windows in {since(begin):.0f} s")
    weights = [p for p in head.module.parameters() if p.requires_grad]
    say(f"{args.kind}: {sum(p.numel() for p in weights) / 1e6:.2f} M parameters to train")
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    fit(
        args,
        head.module,
        weights,
        optimizer,
        batches(engine.target, text, head.layers, args.batch, args.seed),
    )
    head.save(Path(args.out))
    say(f"wrote {args.out}")


def take_over(module: nn.Module, args: argparse.Namespace, target: Transformer) -> None:
    """Put the weights of a folder that an earlier run wrote in place of new ones."""
    own = module.state_dict()
    try:
        found: dict[str, Tensor]
        if args.kind == "standalone":
            found = load_target(args.init, dtype=torch.float32).state_dict()
        else:
            found = load_head(args.init, target, dtype=torch.float32).state_dict()
        borrowed = {name: own[name] for name in own if name == "embed_tokens.weight"}
        module.load_state_dict(borrowed | found)
    except (OSError, ValueError, RuntimeError) as error:
        refuse(f"{args.init} holds no weights of this shape to go on from: {error}")


def fit(
    args: argparse.Namespace,
    module: nn.Module,
    weights: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    source: Iterator[Batch],
) -> None:
    """Minutes of steps: linear warm-up, then a cosine to 5 % over the time that there is."""
    begin, step, shown = time.perf_counter(), 0, 0.0
    while (share := since(begin) / (60 * args.minutes)) < 1:
        cosine = 0.05 + 0.95 * 0.5 * (1 + torch.cos(torch.tensor(share * torch.pi)).item())
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 30) * cosine
        losses = LOSSES[args.kind](module, next(source))
        optimizer.zero_grad()
        sum(0.8**ahead * loss for ahead, (loss, _) in enumerate(losses)).backward()
        nn.utils.clip_grad_norm_(weights, 0.5)
        optimizer.step()
        step += 1
        if since(begin) - shown > 20:
            shown = since(begin)
            right = " ".join(f"{share:.2f}" for _, share in losses)
            say(f"{shown:4.0f} s, step {step}: loss {losses[0][0]:.3f}, right guesses {right}")
    say(f"{step} steps")


def since(begin: float) -> float:
    return time.perf_counter() - begin


def minutes(text: str) -> float:
    """The type of --minutes: above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time above 0")
    return value


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=LOSSES, required=True)
    parser.add_argument("--minutes", type=minutes, default=10.0)
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--samples", help="JSON file that keeps the base's text for the next run")
    parser.add_argument("--init", help="folder or weight file of an earlier run to go on from")
    parser.add_argument("--out", required=True, help="folder to write")
    return parser.parse_args()


if __name__ == "__main__":
    train(parse())
