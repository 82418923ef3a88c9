"""Are perplexity and agreement what a naive pass over the whole text gives, each token once?

n tokens of a text  V vocabulary
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, full_pass, plain_decode, prompt, tiny_target
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from fasteagle import demo
from fasteagle.checkpoint import load_target
from fasteagle.evaluate import passes
from fasteagle.evaluate.agreement import (
    Agreement,
    divergence,
    merge,
    prompt_agreement,
    text_agreement,
)
from fasteagle.evaluate.passes import Span, encode_text, window_sizes, windows
from fasteagle.evaluate.perplexity import Perplexity, perplexity, token_losses
from fasteagle.model import Transformer
from fasteagle.tokenizer import load_tokenizer

OTHER = GOLDEN / "byte_pair" / "base"
SOURCE = "def add(one, other):\n    return one + other\n" * 6
TOKENS = torch.tensor(prompt(50))


def naive_logits(target: Transformer, tokens: Tensor) -> Tensor:
    """Of one pass over all tokens `[n]`: `[n, V]` float32."""
    return target.logits(full_pass(target, tokens.tolist())[0]).float()


def perturbed(target: Transformer, scale: float = 0.2) -> Transformer:
    """The same model, its lm_head moved a little."""
    other = Transformer(target.config).eval().requires_grad_(False)
    other.load_state_dict(target.state_dict())
    noise = torch.randn(other.lm_head.weight.shape, generator=torch.Generator().manual_seed(5))
    other.lm_head.weight.data.add_(scale * noise)
    return other


# ----------------------------------------------------------------------------------- windows


@given(st.integers(2, 200), st.integers(2, 40), st.data())
def test_every_token_is_scored_once_with_enough_context(
    n_tokens: int, window: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, window))
    spans = windows(n_tokens, window, stride)
    scored = [t for _, end, first in spans for t in range(first, end)]
    assert scored == list(range(1, n_tokens))
    for begin, end, first in spans:
        assert 0 <= begin < first < end
        assert end - 1 - begin <= window, "a pass is fed more than a window"
        assert first - begin >= min(max(window - stride, 1), first), "too little context"


def test_windows_are_those_of_the_worked_example() -> None:
    #   tokens 0 1 2 3 4 5 6      window 4, stride 2: each window scores what the last one did not
    #          - s s s
    #              . . s s
    #                  . . s
    assert windows(7, 4, 2) == [Span(0, 4, 1), Span(2, 6, 4), Span(4, 7, 6)]
    assert windows(7, 4, 4) == [Span(0, 4, 1), Span(3, 7, 4)]


def test_default_sizes_are_the_context_and_its_half() -> None:
    assert window_sizes(256, None, None) == (256, 128)
    assert window_sizes(32768, None, None) == (2048, 1024)
    assert window_sizes(256, 9, None) == (9, 4)
    assert tiny_target().config.attention_span == 192
    assert tiny_target(sliding_window=64).config.attention_span == 64


# -------------------------------------------------------------------------------- perplexity


def test_losses_of_one_window_are_those_of_a_single_pass() -> None:
    target = tiny_target()
    logits = naive_logits(target, TOKENS[:-1])
    wanted = cross_entropy(logits, TOKENS[1:], reduction="none")
    torch.testing.assert_close(token_losses(target, TOKENS), wanted)


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 16), (7, 1), (20, 13)])
def test_losses_of_windows_are_those_of_separate_passes(
    window: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tiny_target()
    wanted = []
    for begin, end, first in windows(len(TOKENS), window, stride):
        losses = -naive_logits(target, TOKENS[begin : end - 1]).log_softmax(-1)
        wanted += [losses[t - 1 - begin, TOKENS[t]] for t in range(first, end)]
    monkeypatch.setattr(passes, "ROWS", 5)  # several chunks a window
    found = token_losses(target, TOKENS, window=window, stride=stride)
    torch.testing.assert_close(found, torch.stack(wanted))


def test_sixteen_bits_are_scored_in_float32() -> None:
    target = load_target(demo.BASE, dtype=torch.bfloat16)
    tokens = encode_text(load_tokenizer(demo.BASE), SOURCE).tokens
    logits = naive_logits(target, tokens[:-1])
    found = token_losses(target, tokens)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, cross_entropy(logits, tokens[1:], reduction="none"))


def test_perplexity_is_that_of_hugging_face() -> None:
    model = AutoModelForCausalLM.from_pretrained(demo.BASE, dtype=torch.float32).eval()
    target = load_target(demo.BASE, dtype=torch.float32)
    tokens = encode_text(load_tokenizer(demo.BASE), SOURCE).tokens
    window, stride, losses, done = 32, 12, [], 0
    # The loop of the transformers documentation, "Perplexity of fixed-length models".
    for begin in range(0, len(tokens), stride):
        end = min(begin + window, len(tokens))
        labels = tokens[begin:end].clone()
        labels[: done - begin] = -100
        ids = tokens[None, begin:end]
        with torch.inference_mode():
            loss = model(ids, labels=labels[None]).loss
        losses.append(loss * (end - done - (done == 0)))
        done = end
        if end == len(tokens):
            break
    wanted = float((torch.stack(losses).sum() / (len(tokens) - 1)).exp())
    found = perplexity(token_losses(target, tokens, window=window, stride=stride), 1).perplexity
    assert found == pytest.approx(wanted, rel=1e-4)


def test_bits_are_nats_over_ln_2() -> None:
    found = perplexity(torch.full((10,), 2 * math.log(2)), 40)
    assert found == Perplexity(pytest.approx(20 * math.log(2)), 10, 40)
    assert found.bits_per_token == pytest.approx(2)
    assert found.bits_per_byte == pytest.approx(0.5)
    assert found.perplexity == pytest.approx(4)
    assert Perplexity(1e9, 10, 40).perplexity == math.inf


@pytest.mark.parametrize("kind", ["demo", "byte_level", "prefixed", "llama_json"])
def test_the_bytes_are_those_of_the_scored_tokens(folders: dict[str, Path], kind: str) -> None:
    tokenizer = load_tokenizer(folders[kind])
    text = "hello naïve café on a mat"
    whole = encode_text(tokenizer, text)
    bos = [tokenizer.bos_id] if tokenizer.adds_bos else []
    assert whole.tokens.tolist() == tokenizer.encode(text)
    assert tokenizer.encode(text, bos=False) == whole.tokens.tolist()[len(bos) :]
    cut = encode_text(tokenizer, text, max_tokens=3)
    assert len(cut.tokens) == 3 + len(bos)
    first = 0 if bos else len(tokenizer.decode(whole.tokens.tolist()[:1]).encode())
    assert whole.n_bytes == len(text.encode()) - first
    assert cut.n_bytes == len(tokenizer.decode(cut.tokens.tolist()).encode()) - first


def test_a_tokenizer_without_bos_leaves_the_first_token_out(folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(folders["demo"])
    whole = encode_text(tokenizer, SOURCE)
    tokenizer.adds_bos = False
    bare = encode_text(tokenizer, SOURCE)
    assert bare.tokens.tolist() == whole.tokens.tolist()[1:]
    assert whole.n_bytes == len(SOURCE)
    assert bare.n_bytes == len(SOURCE) - len(tokenizer.decode(bare.tokens.tolist()[:1]))


def test_logits_that_are_no_numbers_are_refused() -> None:
    target = perturbed(tiny_target())
    target.lm_head.weight.data[3, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        token_losses(target, TOKENS)
    with pytest.raises(ValueError, match="not finite"):
        text_agreement(target, tiny_target(), TOKENS)


def test_tokens_outside_of_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="holds token 20; the vocabulary is 20"):
        token_losses(tiny_target(), torch.tensor([1, 20, 2]))


# --------------------------------------------------------------------------------- agreement


def test_a_model_agrees_with_itself() -> None:
    target = tiny_target()
    found = text_agreement(target, target, TOKENS, window=16, stride=8)
    assert found == Agreement(len(TOKENS) - 1, len(TOKENS) - 1, 0.0)
    found = prompt_agreement(target, target, [prompt(5), prompt(9)], max_new_tokens=12)
    assert found.n_tokens == 24
    assert (found.share, found.kl) == (1.0, 0.0)


def test_agreement_along_a_text_is_the_naive_one() -> None:
    target = tiny_target()
    other = perturbed(target)
    found = text_agreement(other, target, TOKENS)
    q, p = (naive_logits(model, TOKENS)[:-1].double() for model in (other, target))
    kl = (p.softmax(-1) * (p.softmax(-1) / q.softmax(-1)).log()).sum(-1)
    assert found.n_tokens == len(TOKENS) - 1
    assert found.share == float((p.argmax(-1) == q.argmax(-1)).double().mean()) < 1
    assert found.kl == pytest.approx(float(kl.mean()), rel=1e-5)
    assert found.kl > 0.001
    assert text_agreement(target, other, TOKENS).kl != pytest.approx(found.kl, rel=1e-3)


def test_agreement_along_prompts_follows_the_references_text() -> None:
    target = tiny_target()
    other, prompts = perturbed(target), [prompt(5), prompt(9)]
    found = prompt_agreement(other, target, prompts, max_new_tokens=12)
    equal, kls = 0, []
    for tokens in prompts:
        written = plain_decode(target, tokens, 12)
        text = torch.tensor([*tokens, *written])
        q, p = (
            naive_logits(model, text)[len(tokens) - 1 : -1].double() for model in (other, target)
        )
        equal += int((q.argmax(-1) == torch.tensor(written)).sum())
        kls += (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).tolist()
    assert found.n_tokens == 24
    assert found.n_equal == equal < 24
    assert found.kl == pytest.approx(sum(kls) / 24, rel=1e-5)


def test_divergence_of_two_coins() -> None:
    fair, bent = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    wanted = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert float(divergence(fair, bent)) == pytest.approx(wanted, rel=1e-6)
    assert merge([Agreement(4, 3, 1.0), Agreement(6, 6, 0.5)]) == Agreement(10, 9, 1.5)


def test_models_of_two_vocabularies_are_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary of 20 and the reference one of 24"):
        text_agreement(tiny_target(), tiny_target(vocab_size=24), TOKENS)
