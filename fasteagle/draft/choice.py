"""Which draft does a user want, and does it know what to do with all that was asked?"""

from __future__ import annotations

from typing import TypedDict

from fasteagle.tree import MAX_NODES

ALL_TOKENS = "none"  # in place of a draft vocabulary
# Drafts without weights, which a user names, and the flags that mean something to them.
BY_NAME: dict[str, frozenset[str]] = {
    "none": frozenset(),
    "lookup": frozenset({"lookup", "ngram"}),
    "lookahead": frozenset({"ngram", "window", "guesses"}),
}
ANY_WEIGHTS = "eagle"  # insist on a draft from a file
NAMES = (ANY_WEIGHTS, *BY_NAME)
LOOKAHEAD_ONLY = BY_NAME["lookahead"] - BY_NAME["lookup"]


class Asked(TypedDict, total=False):
    """Keywords of `load`, and flags, that shape a draft; None (lookup: 0) is its own choice."""

    tree: str | None
    draft_vocab: str | None
    speculate_k: int | None
    lookup: int | None
    ngram: int | None
    window: int | None
    guesses: int | None


def check_names(asked: Asked) -> None:
    """TypeError for a keyword that Asked does not have."""
    unknown = sorted(set(asked) - set(Asked.__annotations__))
    if unknown:
        raise TypeError(
            f"unexpected keyword {unknown[0]!r}; a draft is shaped by "
            f"{', '.join(Asked.__annotations__)}"
        )


def check_choice(draft: str | None, asked: Asked, *, path: bool, base: bool) -> None:
    """ValueError unless a draft of NAMES, or None for the default, fits what is asked of it.

    path, base: whether a draft's path and a base's path were given. Without a base, the embedded
    pair brings its head.
    """
    if draft is not None and draft not in NAMES:
        raise ValueError(f"draft {draft!r} is unknown; give one of {', '.join(NAMES)}")
    if draft in BY_NAME and path:
        raise ValueError(
            f"--draft {draft} and --draft_checkpoint_path exclude each other; drop one"
        )
    if draft == ANY_WEIGHTS and base and not path:
        raise ValueError("--draft eagle needs --draft_checkpoint_path")
    ignored = (None, 0, ALL_TOKENS)
    given = [flag for flag, value in asked.items() if value not in ignored]
    for flag in given:
        if draft in BY_NAME:
            _check_by_name(draft, flag)
        elif base and not path:
            raise ValueError(f"--{flag} needs a drafter; {_remedy(flag)}, or drop it")
        elif flag in LOOKAHEAD_ONLY:
            raise ValueError(f"--{flag} is for Lookahead; add --draft lookahead or drop it")
    length = asked.get("speculate_k")
    if length is not None and not 1 <= length < MAX_NODES:
        raise ValueError(f"--speculate_k {length}; give 1 to {MAX_NODES - 1}")
    if {"speculate_k", "tree"} <= set(given):
        raise ValueError("--speculate_k and --tree both say what is guessed; drop one")
    if "ngram" in given and draft not in BY_NAME and "lookup" not in given:
        raise ValueError("--ngram is what lookup compares; add --lookup, or drop it")


def _check_by_name(draft: str, flag: str) -> None:
    if flag in BY_NAME[draft]:
        return
    if flag == "tree":
        raise ValueError(f"--draft {draft} has no tree; drop --tree, or decode with a head")
    why = "guesses nothing" if draft == "none" else f"has no use for --{flag}"
    raise ValueError(f"--draft {draft} {why}; drop --{flag}")


def _remedy(flag: str) -> str:
    names = [f"--draft {name}" for name, flags in BY_NAME.items() if flag in flags]
    paths = [] if flag in LOOKAHEAD_ONLY else ["--draft_checkpoint_path"]
    return f"give {' or '.join(paths + names)}"
