"""Do conversations become the text that each model was trained on?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fasteagle.chat import TEMPLATES, default_template, jinja_template, render_chat
from fasteagle.tokenizer import Tokenizer, load_tokenizer

DEMO = Path(__file__).parents[1] / "fasteagle" / "demo" / "base"
CHATML = (
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n"
    "{%- endif %}\n"
)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


TURNS = [user("Hi"), assistant("Hello."), user("How are you?")]


@pytest.fixture
def tokenizer() -> Tokenizer:
    return load_tokenizer(DEMO)


def with_template(folder: Path, template: Any) -> Tokenizer:
    (folder / "tokenizer.model").write_bytes((DEMO / "tokenizer.model").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return load_tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "messages", "text"),
    [
        (
            "vicuna",
            TURNS,
            "A chat between a curious user and an artificial intelligence assistant. The assistant "
            "gives helpful, detailed, and polite answers to the user's questions. USER: Hi "
            "ASSISTANT: Hello.</s>USER: How are you? ASSISTANT:",
        ),
        ("vicuna", [system("Be brief."), user("Hi")], "Be brief. USER: Hi ASSISTANT:"),
        ("vicuna", [system(""), user("Hi")], "USER: Hi ASSISTANT:"),
        (
            "llama-2-chat",
            TURNS,
            "[INST] Hi [/INST] Hello. </s><s>[INST] How are you? [/INST]",
        ),
        (
            "llama-2-chat",
            [system("Be brief."), *TURNS],
            "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello. </s><s>[INST] How are you? "
            "[/INST]",
        ),
        ("none", TURNS, "HiHello.How are you?"),
    ],
)
def test_built_in_template_writes(
    tokenizer: Tokenizer, name: str, messages: list[dict[str, str]], text: str
) -> None:
    assert render_chat(messages, template=name, tokenizer=tokenizer) == text
    assert render_chat(messages, template=TEMPLATES[name], tokenizer=tokenizer) == text


def test_finished_conversation_ends_with_eos(tokenizer: Tokenizer) -> None:
    for name in ("vicuna", "llama-2-chat"):
        text = render_chat(
            TURNS[:2], template=name, tokenizer=tokenizer, add_generation_prompt=False
        )
        assert text.endswith("</s>")


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "no messages"),
        ([{"content": "Hi"}], "no role"),
        ([system("Be brief.")], "needs a user message"),
        ([assistant("Hi")], "expects role 'user' at turn 1"),
        ([user("a"), user("b")], "expects role 'assistant' at turn 2"),
        ([user("a"), system("b")], "found 'system'"),
        ([user("a"), assistant("b")], "user message last"),
        ([{"role": "user", "content": None}], "not text"),
    ],
)
@pytest.mark.parametrize("name", ["vicuna", "llama-2-chat"])
def test_conversation_out_of_order_is_refused(
    tokenizer: Tokenizer, name: str, messages: list[Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        render_chat(messages, template=name, tokenizer=tokenizer)


def test_unknown_or_missing_template_names_the_choices(tokenizer: Tokenizer) -> None:
    assert default_template(tokenizer) is None
    for name in ("alpaca", None):
        with pytest.raises(ValueError, match="vicuna, llama-2-chat, none"):
            render_chat(TURNS, template=name, tokenizer=tokenizer)


def test_checkpoint_template_is_the_default(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, CHATML)
    text = render_chat([user("Hi <b>")], template=None, tokenizer=tokenizer)
    assert text == "<|im_start|>user\nHi <b><|im_end|>\n<|im_start|>assistant\n"
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}new")
    assert render_chat(TURNS, template=None, tokenizer=load_tokenizer(tmp_path)) == "</s>new"


def test_named_templates_are_chosen_by_name(tmp_path: Path) -> None:
    sources = [{"name": "default", "template": "a"}, {"name": "tools", "template": "b"}]
    tokenizer = with_template(tmp_path, sources)
    assert render_chat(TURNS, template=None, tokenizer=tokenizer) == "a"
    assert render_chat(TURNS, template="tools", tokenizer=tokenizer) == "b"
    chosen = [default_template(tokenizer, hint) for hint in ("tools", "absent", None)]
    assert [template and template.name for template in chosen] == ["tools", "default", "default"]


def test_bos_comes_once(tmp_path: Path) -> None:
    for source in ("{{ bos_token }}hi", "hi"):
        tokenizer = with_template(tmp_path, source)
        assert tokenizer.encode_chat(TURNS) == [1, *tokenizer.encode("hi", bos=False)]


def test_written_eos_is_the_token(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_chat(TURNS, "vicuna")
    assert ids.count(2) == 1
    assert ids.count(1) == 1
    assert tokenizer.encode_chat(TURNS, "llama-2-chat").count(1) == 2


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
        ("{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}x{% endfor %}", "x"),
        ("{% generation %}a{% endgeneration %}b", "ab"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("  {% if true %}\na\n  {% endif %}\nb", "a\nb"),
        ("{{ tools is none }}{{ pad_token is defined }}", "TrueFalse"),
    ],
)
def test_jinja_has_what_checkpoints_use(tokenizer: Tokenizer, source: str, text: str) -> None:
    assert render_chat(TURNS, template=jinja_template(source), tokenizer=tokenizer) == text


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].clear() }}",
        "{% for n in range(10 ** 9) %}{% endfor %}",
        "{{ raise_exception('roles must\nalternate') }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{{ absent.field }}",
        "{% include 'file' %}",
        "{% if %}",
    ],
)
def test_bad_or_hostile_jinja_is_refused_in_one_line(tokenizer: Tokenizer, source: str) -> None:
    messages = [user("Hi")]
    with pytest.raises(ValueError, match="refused") as caught:
        render_chat(messages, template=jinja_template(source), tokenizer=tokenizer)
    assert "\n" not in str(caught.value)
    assert messages == [user("Hi")]
