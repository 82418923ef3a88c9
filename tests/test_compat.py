"""Do EAGLE's own calls work, and do they say what ours say?"""

from __future__ import annotations

import pytest
import torch
from conftest import GOLDEN

from fasteagle import demo
from fasteagle.compat import EagleModel
from fasteagle.tree import MC_SIM_7B_63, DynamicTree


@pytest.fixture(scope="module")
def model() -> EagleModel:
    return EagleModel.from_pretrained(
        base_model_path=demo.BASE,
        ea_model_path=demo.HEAD,
        torch_dtype=torch.float32,
        low_cpu_mem_usage=True,
        device_map="cpu",
    )


@pytest.fixture
def ids(model: EagleModel) -> torch.Tensor:
    return model.tokenizer(["def read(self):\n"], return_tensors="pt").input_ids


def test_eagle_and_naive_generate_agree(model: EagleModel, ids: torch.Tensor) -> None:
    plain = model.eval().naivegenerate(ids, max_new_tokens=40)
    assert torch.equal(model.eagenerate(ids, max_new_tokens=40), plain)
    assert torch.equal(plain[:, : ids.shape[1]], ids)
    assert plain.shape[1] <= ids.shape[1] + 40


def test_tree_choices_change_rounds_but_not_output(model: EagleModel, ids: torch.Tensor) -> None:
    wide, n_wide, wide_index = model.eagenerate(
        ids, max_new_tokens=40, tree_choices=MC_SIM_7B_63, log=True
    )
    thin, n_thin, thin_index = model.eagenerate(
        ids, max_new_tokens=40, tree_choices=[[0]], log=True
    )
    assert torch.equal(wide, thin)
    assert n_wide == n_thin == wide.shape[1] - ids.shape[1]
    assert wide_index < thin_index


def test_log_counts_rounds_from_zero(model: EagleModel, ids: torch.Tensor) -> None:
    _, new_tokens, index = model.naivegenerate(ids, max_new_tokens=9, log=True)
    # The first token comes with the prompt, each of the others from a round of its own.
    assert index + 1 == new_tokens - 1


def test_stream_grows_to_the_whole(model: EagleModel, ids: torch.Tensor) -> None:
    *earlier, last = list(model.ea_generate(ids, max_new_tokens=30))
    assert torch.equal(last, model.eagenerate(ids, max_new_tokens=30))
    for part in earlier:
        assert torch.equal(part, last[:, : part.shape[1]])
    assert len(earlier) > 1


def test_left_padded_rows_equal_their_own_runs(model: EagleModel) -> None:
    texts = ["import os\n\n\ndef walk(top):\n", "x = ", "class A:\n    def f(self):\n"]
    batch = model.tokenizer(texts, return_tensors="pt")
    output = model.eagenerate(batch.input_ids, batch.attention_mask, max_new_tokens=20)
    width = batch.input_ids.shape[1]
    for row, text in zip(output, texts, strict=True):
        single = model.tokenizer([text], return_tensors="pt").input_ids
        alone = model.eagenerate(single, max_new_tokens=20)[0, single.shape[1] :]
        assert row[width : width + len(alone)].tolist() == alone.tolist()


def test_sampling_arguments_are_used(model: EagleModel, ids: torch.Tensor) -> None:
    def run(**kwargs: float) -> list[int]:
        return model.eagenerate(ids, max_new_tokens=30, seed=7, **kwargs)[0].tolist()

    greedy = run()
    assert run(temperature=1.0) == run(temperature=1.0) != greedy
    assert run(temperature=1.0, top_k=1) == greedy
    assert run(temperature=1.0, top_p=1e-6) == greedy


def test_engines_of_other_batches_are_let_go(model: EagleModel, ids: torch.Tensor) -> None:
    text = model.eagenerate(ids, max_new_tokens=5, is_llama3=True)
    kept = model._engine(1, model.drafter.tree)
    for batch in (2, 3):
        model.naivegenerate(ids.expand(batch, -1), max_new_tokens=5)
        assert model._engine(1, model.drafter.tree) is kept, "what is used stays"
        assert len(model._engines) == 2
    assert torch.equal(model.eagenerate(ids, max_new_tokens=5), text)


def test_max_length_counts_the_prompt(model: EagleModel, ids: torch.Tensor) -> None:
    limit = ids.shape[1] + 5
    assert model.eagenerate(ids, max_length=limit).shape[1] <= limit
    with pytest.raises(ValueError, match="leaves no room"):
        model.eagenerate(ids, max_length=ids.shape[1])
    with pytest.raises(ValueError, match="max_new_tokens is 0; give 1 or more"):
        model.eagenerate([[1, 2]], max_new_tokens=0)


@pytest.mark.parametrize("mask", [[[1, 0, 1]], [[1, 1, 0]]])
def test_holes_and_right_padding_are_refused(model: EagleModel, mask: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="pad prompts on the left"):
        model.eagenerate(torch.tensor([[1, 5, 6]]), torch.tensor(mask))


def test_wrong_shapes_are_refused(model: EagleModel) -> None:
    with pytest.raises(ValueError, match=r"input_ids are int64 \[3\]"):
        model.eagenerate(torch.tensor([1, 5, 6]))
    for ids in (torch.tensor([[1.5, 2]]), torch.ones(0, 3, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"expected whole numbers \[batch, length\]"):
            model.eagenerate(ids)
    with pytest.raises(ValueError, match="attention_mask is"):
        model.eagenerate(torch.tensor([[1, 5, 6]]), torch.ones(1, 2))


def test_later_versions_arguments_choose_the_tree(model: EagleModel) -> None:
    pair = {"base_model_path": demo.BASE, "ea_model_path": demo.HEAD, "device_map": "cpu"}
    automatic = EagleModel.from_pretrained(**pair, total_token=-1, use_eagle3=False)
    assert automatic.drafter.tree == model.drafter.tree
    sizes = {"total_token": 26, "depth": 5, "top_k": 6, "threshold": 1.0}
    dynamic = EagleModel.from_pretrained(**pair, **sizes, torch_dtype=torch.float32)
    assert dynamic.drafter.tree == DynamicTree(26, 5, 6)
    ids = torch.tensor([[1, 100, 200]])
    limits = {"max_new_tokens": 24}
    assert torch.equal(dynamic.eagenerate(ids, **limits), dynamic.naivegenerate(ids, **limits))
    # Another static tree for one call, with the same head.
    chained = dynamic.eagenerate(ids, tree_choices=[[0], [0, 0]], **limits)
    assert torch.equal(chained, dynamic.eagenerate(ids, **limits))


def test_a_head_says_itself_whether_it_is_an_eagle3_one() -> None:
    pair = GOLDEN / "byte_pair"
    paths = {"base_model_path": pair / "base", "ea_model_path": pair / "eagle3"}
    model = EagleModel.from_pretrained(**paths, use_eagle3=True, dtype=torch.float32)
    ids = torch.tensor([[1, 40, 50, 60]])
    assert torch.equal(
        model.eagenerate(ids, max_new_tokens=20), model.naivegenerate(ids, max_new_tokens=20)
    )
    with pytest.raises(ValueError, match="expected use_eagle3=False"):
        EagleModel.from_pretrained(**paths, use_eagle3=False)
    with pytest.raises(ValueError, match="give one of them"):
        EagleModel.from_pretrained(**paths, total_token=9, tree="chain-2")


def test_the_calls_of_the_official_readme(model: EagleModel) -> None:
    ids = torch.as_tensor(model.tokenizer(["def read(self):\n"])["input_ids"])
    output = model.eagenerate(ids, [[1] * ids.shape[1]], temperature=0.5, max_new_tokens=9, seed=1)
    text = model.tokenizer.decode(output[0], skip_special_tokens=True)
    assert text.startswith("def read(self):\n")
    assert model.tokenizer.batch_decode(output) == [text]
    assert model.tokenizer.eos_token_id == model.target.config.eos_ids[0]


def test_one_text_gives_one_list_and_tensors_have_a_batch(model: EagleModel) -> None:
    single = model.tokenizer("b")
    assert [single.input_ids] == model.tokenizer(["b"]).input_ids
    tensors = model.tokenizer("b", return_tensors="pt").to("cpu")
    assert tensors["input_ids"].tolist() == [single["input_ids"]]
    assert tensors.attention_mask.shape == tensors.input_ids.shape
    with pytest.raises(AttributeError, match="input_ids, attention_mask, not offsets"):
        _ = single.offsets


def test_templated_prompts_get_one_bos(model: EagleModel) -> None:
    tokenizer = model.tokenizer
    bos, *rest = tokenizer("b").input_ids
    assert bos == tokenizer.bos_token_id
    assert tokenizer("b", add_special_tokens=False).input_ids == rest
    assert tokenizer.encode("b", add_special_tokens=False) == rest
    with pytest.raises(TypeError, match="truncation"):
        tokenizer("b", truncation=True)
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "b"}])


def test_tokenizer_call_pads_on_the_left(model: EagleModel) -> None:
    ids, mask = model.tokenizer(["a = 1\n", "b"], return_tensors="pt").values()
    assert mask[1].tolist() == sorted(mask[1].tolist())
    assert model.tokenizer.decode(ids[0]) == "a = 1\n"
    assert model.tokenizer(["b"]).input_ids == [ids[1][mask[1].bool()].tolist()]
