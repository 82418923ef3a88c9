"""A tokenizer folder of every kind, trained on a few words."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

DEMO = Path(__file__).parents[1] / "fasteagle" / "demo" / "base"
KINDS = ["demo", "byte_level", "prefixed", "llama_json"]
WORDS = ["the cat", "sat on", "a mat", "hello", "world, good", "naïve café", "x = f(y)\n"]


def corpus() -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choice(WORDS) for _ in range(8)) for _ in range(300)]


def write_sentencepiece(folder: Path) -> sentencepiece.SentencePieceProcessor:
    """A tokenizer.model like LLaMA's: BPE, byte fallback, a space put before the text."""
    folder.mkdir()
    (folder / "corpus.txt").write_text("\n".join(corpus()), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=310,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def write_json(folder: Path, tokenizer: tokenizers.Tokenizer, **config: Any) -> None:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def llama_json(model: sentencepiece.SentencePieceProcessor) -> tokenizers.Tokenizer:
    """The tokenizer.json that the Llama converter makes of a tokenizer.model."""
    pieces = [model.id_to_piece(n) for n in range(model.vocab_size())]
    ids = {piece: n for n, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(pieces[259:], key=lambda piece: -model.get_score(ids[piece]))
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    fast = tokenizers.Tokenizer(
        models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    fast.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fast.add_special_tokens(["<unk>", "<s>", "</s>"])
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return fast


def byte_level_json() -> tokenizers.Tokenizer:
    """A tokenizer.json like Llama 3's: byte-level BPE, BOS from the post-processor."""
    fast = tokenizers.Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|bos|>", "<|eot|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(corpus(), trainer)
    fast.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
    )
    fast.add_tokens(["<tool>"])
    return fast


def write_tokenizers(root: Path) -> dict[str, Path]:
    """The folder of each of KINDS; all but the demo's are written below `root`."""
    model = write_sentencepiece(root / "prefixed")
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    write_json(root / "llama_json", llama_json(model), **names)
    eos = {"__type": "AddedToken", "content": "<|eot|>", "special": True}
    write_json(root / "byte_level", byte_level_json(), bos_token="<|bos|>", eos_token=eos)
    return {"demo": DEMO, **{kind: root / kind for kind in KINDS[1:]}}
