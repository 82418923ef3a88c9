"""What text is a model calibrated on? Windows of tokens cut from a file.

n windows  S tokens of a window
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fasteagle.prompt_files import read_prompts, text_file
from fasteagle.tokenizer import Tokenizer

N_WINDOWS, LENGTH = 128, 512
LEAST_TOKENS = 256  # fewer say too little about a layer's inputs
FEWEST = 4  # windows of a text that is shorter than one
CHARACTERS = 32  # read for each token wanted: text seldom has more than 8


def calibration_windows(
    tokenizer: Tokenizer, file: str | Path, *, n: int = N_WINDOWS, length: int = LENGTH, seed: int
) -> Tensor:
    """Windows `[n, S]` int64 of a file's text, S = `length`, each after BOS if the model has one.

    The file is UTF-8 text or a .jsonl file of questions, joined by blank lines. Its text is cut
    into windows that do not overlap; the seed picks n of them. A text with fewer windows gives all
    it has; one that is shorter than a window gives four short ones. The defaults are six tokens
    for each input of an MLP of 11008; with less than one, GPTQ is worse than rounding.

    ValueError for a text with less than 256 tokens (and less than was asked for) or that is not
    UTF-8, FileNotFoundError for none.
    """
    tokens = tokenizer.encode(_read(Path(file), CHARACTERS * n * length), bos=False)
    bos = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    width = length - len(bos)
    if length < len(bos) + 2:
        raise ValueError(
            f"calibration windows of {length} tokens are too short; at least {len(bos) + 2} are "
            f"needed, {LENGTH} are best"
        )
    if len(tokens) < min(LEAST_TOKENS, n * width):
        raise ValueError(
            f"the calibration text {file} has {len(tokens)} tokens; at least {LEAST_TOKENS} are "
            f"needed, {n} windows of {length} are best: give a longer text"
        )
    width = width if len(tokens) >= width else len(tokens) // FEWEST
    whole = torch.tensor(tokens[: len(tokens) // width * width]).view(-1, width)
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randperm(len(whole), generator=generator)[:n]
    return torch.cat(
        (torch.tensor(bos * len(picked)).long().view(len(picked), -1), whole[picked]), 1
    )


def _read(path: Path, n_characters: int) -> str:
    if path.suffix == ".jsonl":
        return "\n\n".join(read_prompts(path, flag="calibration text"))[:n_characters]
    with text_file(path, flag="calibration text") as file:
        return file.read(n_characters)
