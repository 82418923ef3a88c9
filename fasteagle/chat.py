"""How does a conversation become one prompt? The checkpoint's own Jinja, or a built-in format."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn, Protocol

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

Messages = Sequence[Mapping[str, Any]]  # {"role": "user", "content": "..."}

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class ChatTokenizer(Protocol):
    """What a template needs to know of a tokenizer."""

    @property
    def special_tokens(self) -> Mapping[str, str]: ...  # bos_token -> "<s>"

    @property
    def chat_templates(self) -> Mapping[str, str]: ...  # name -> Jinja source


@dataclass(frozen=True)
class ChatTemplate:
    """A named way to write a conversation: `render(messages, special_tokens, prompt) -> text`."""

    name: str
    render: Callable[[Messages, Mapping[str, str], bool], str]


def render_chat(
    messages: Messages,
    *,
    template: ChatTemplate | str | None,
    tokenizer: ChatTokenizer,
    add_generation_prompt: bool = True,
) -> str:
    """Write the conversation as text.

    `template` is a template, the name of a built-in one or of one in the checkpoint, or None for
    the checkpoint's default.
    """
    if not messages:
        raise ValueError("the conversation has no messages; give at least one user message")
    for n, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(  # noqa: TRY004
                f"message {n} has no role; give {{'role': 'user', 'content': '...'}}"
            )
    if not isinstance(template, ChatTemplate):
        template = _named(template, tokenizer)
    return template.render(messages, tokenizer.special_tokens, add_generation_prompt)


def default_template(tokenizer: ChatTokenizer, name_hint: str | None = None) -> ChatTemplate | None:
    """The checkpoint's own template, of several the one named `name_hint`; None if it has none."""
    sources = tokenizer.chat_templates
    for name in (name_hint, "default"):
        if name is not None and name in sources:
            return jinja_template(sources[name], name=name)
    return None


def _named(name: str | None, tokenizer: ChatTokenizer) -> ChatTemplate:
    if name is None:
        template = default_template(tokenizer)
        if template is None:
            raise ValueError(
                f"the checkpoint has no chat template; choose one of {_choices(tokenizer)}"
            )
        return template
    if name in TEMPLATES:
        return TEMPLATES[name]
    if name in tokenizer.chat_templates:
        return jinja_template(tokenizer.chat_templates[name], name=name)
    raise ValueError(f"no chat template is named {name!r}; choose one of {_choices(tokenizer)}")


def _choices(tokenizer: ChatTokenizer) -> str:
    return ", ".join([*TEMPLATES, *tokenizer.chat_templates])


# Jinja


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja that stops at a forbidden attribute, where the stock sandbox prints an empty string."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is not allowed")


class _Generation(Extension):
    """`{% generation %}` marks text to train on; when rendering it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - the type jinja2 declares

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def jinja_template(source: str, *, name: str = "jinja") -> ChatTemplate:
    """Compile a Hugging Face chat template; it runs in a sandbox, for it comes with the weights."""
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        compiled = environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(_refusal(name, error)) from error

    def render(messages: Messages, special_tokens: Mapping[str, str], prompt: bool) -> str:
        variables = {"messages": messages, "tools": None, "documents": None, **special_tokens}
        try:
            return compiled.render(**variables, add_generation_prompt=prompt)
        except _JINJA_ERRORS as error:
            raise ValueError(_refusal(name, error)) from error

    return ChatTemplate(name, render)


# What a template's own code can raise besides Jinja's errors: 1/0, {}[1], "a" + 1, range(10**9).
_JINJA_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


def _refusal(name: str, error: BaseException) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"the chat template {name!r} refused the conversation: {reason}"


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which models never saw in training.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


# Built in


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        raise ValueError(  # noqa: TRY004
            f"a {message['role']} message holds {type(content).__name__}, not text; "
            "built-in chat templates take plain strings"
        )
    return content


def _split(messages: Messages, name: str, prompt: bool) -> tuple[str | None, list[str]]:
    """The system message, if any, and the turns, checked to go user, assistant, user, ..."""
    has_system = messages[0]["role"] == "system"
    turns = messages[1:] if has_system else messages
    for n, message in enumerate(turns):
        wanted = ("user", "assistant")[n % 2]
        if message["role"] != wanted:
            raise ValueError(
                f"chat template {name!r} expects role {wanted!r} at turn {n + 1}, found "
                f"{message['role']!r}; roles alternate user, assistant after one optional system"
            )
    if not turns:
        raise ValueError(f"chat template {name!r} needs a user message, found only a system one")
    if prompt and len(turns) % 2 == 0:
        raise ValueError(
            f"chat template {name!r} expects a user message last, found an assistant one; "
            "add one, or render without a generation prompt"
        )
    return _text(messages[0]) if has_system else None, [_text(message) for message in turns]


def _vicuna(messages: Messages, _special: Mapping[str, str], prompt: bool) -> str:
    system, turns = _split(messages, "vicuna", prompt)
    system = VICUNA_SYSTEM if system is None else system
    written = [f"{system} " if system else ""]
    for n, turn in enumerate(turns):
        written.append(f"USER: {turn} " if n % 2 == 0 else f"ASSISTANT: {turn}</s>")
    return "".join(written) + ("ASSISTANT:" if prompt else "")


def _llama_2_chat(messages: Messages, _special: Mapping[str, str], prompt: bool) -> str:
    system, turns = _split(messages, "llama-2-chat", prompt)
    if system:
        turns[0] = f"<<SYS>>\n{system}\n<</SYS>>\n\n{turns[0]}"
    written = []
    for n, turn in enumerate(turns):
        opening = "<s>" if n else ""  # the first one is the tokenizer's own
        asked = f"{opening}[INST] {turn.strip()} [/INST]"
        written.append(asked if n % 2 == 0 else f" {turn.strip()} </s>")
    return "".join(written)


def _raw(messages: Messages, _special: Mapping[str, str], _prompt: bool) -> str:
    return "".join(map(_text, messages))


TEMPLATES: dict[str, ChatTemplate] = {
    "vicuna": ChatTemplate("vicuna", _vicuna),
    "llama-2-chat": ChatTemplate("llama-2-chat", _llama_2_chat),
    "none": ChatTemplate("none", _raw),
}
