"""Which commands are there? `fasteagle <command>`; a command is imported only when it is chosen.

fasteagle demo
fasteagle generate --checkpoint_path vicuna-7b --draft_checkpoint_path EAGLE-Vicuna-7B --compile
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from fasteagle import __version__, commands

COMMANDS = {
    "generate": "continue a prompt, several, or what you type; text streams to stdout",
    "chat": "talk to a model in its own chat format",
    "convert": "turn a Hugging Face checkpoint or an EAGLE head into a fasteagle folder",
    "quantize": "write an int8 or int4 file of a model or a head beside it",
    "evaluate": "perplexity of a text, or agreement with a reference model",
    "tune": "measure which draft tree is the fastest here, and write it beside the head",
    "draft-vocab": "count which tokens occur, so that a head guesses only the frequent ones",
    "trace": "decode token ids and write every draft tree and accepted count as JSON",
    "warmup": "compile once, so that later starts with --compile take seconds",
    "doctor": "show what this machine can run, and whether a checkpoint fits its memory",
    "demo": "plain and EAGLE decoding of the embedded pair, side by side",
}


def usage() -> str:
    """The help of `fasteagle` itself."""
    rows = "\n".join(f"  {name:13}{text}" for name, text in COMMANDS.items())
    return f"""usage: fasteagle <command> [flags]

Exact, compiled EAGLE decoding of LLaMA-family models. Without a checkpoint, commands use the
small trained pair that is part of the package.

commands:
{rows}

`fasteagle <command> --help` explains a command's flags.
  -h, --help       this text
  --version        the version

examples:
  fasteagle demo
  fasteagle generate --checkpoint_path meta-llama/Llama-2-7b-chat-hf \\
      --draft_checkpoint_path yuhuili/EAGLE-llama2-chat-7B --chat_template auto \\
      --prompt "Why is the sky blue?" --compile"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: the process's) and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    name, *rest = argv
    if name == "--version":
        print(f"fasteagle {__version__}")
        return 0
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        return commands.fail(f"{name!r} is no command; expected one of {known}")
    return commands.run(module_of(name), rest, prog=f"fasteagle {name}")


def module_of(name: str) -> ModuleType:
    """The module of a command; `draft-vocab` is draft_vocab.py."""
    return importlib.import_module(f"fasteagle.commands.{name.replace('-', '_')}")
