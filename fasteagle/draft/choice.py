"""Which draft does a user want, and does it know what to do with all that was asked?"""

from __future__ import annotations

from collections.abc import Mapping

# Drafts without weights, which a user names, and the flags that mean something to them.
BY_NAME: dict[str, frozenset[str]] = {
    "none": frozenset(),
    "lookup": frozenset({"lookup", "ngram"}),
    "lookahead": frozenset({"ngram", "window", "guesses"}),
}
ANY_WEIGHTS = "eagle"  # insist on a draft from a file
NAMES = (ANY_WEIGHTS, *BY_NAME)
FLAGS = ("tree", "draft_vocab", "lookup", "ngram", "window", "guesses")  # what may be asked
LOOKAHEAD_ONLY = BY_NAME["lookahead"] - BY_NAME["lookup"]


def check_choice(draft: str | None, asked: Mapping[str, object], *, path: bool, base: bool) -> None:
    """ValueError unless a draft of NAMES, or None for the default, fits the flags.

    asked: flags and their values, None or 0 where one was not given. path, base: whether a draft's
    path and a base's path were. Without a base, the embedded pair brings its head.
    """
    if draft is not None and draft not in NAMES:
        raise ValueError(f"draft {draft!r} is unknown; give one of {', '.join(NAMES)}")
    if draft in BY_NAME and path:
        raise ValueError(
            f"--draft {draft} and --draft_checkpoint_path exclude each other; drop one"
        )
    if draft == ANY_WEIGHTS and base and not path:
        raise ValueError("--draft eagle needs --draft_checkpoint_path")
    given = [flag for flag, value in asked.items() if value not in (None, 0)]
    for flag in given:
        if draft in BY_NAME:
            _check_by_name(draft, flag)
        elif base and not path:
            raise ValueError(f"--{flag} needs a drafter; {_remedy(flag)}, or drop it")
        elif flag in LOOKAHEAD_ONLY:
            raise ValueError(f"--{flag} is for Lookahead; add --draft lookahead or drop it")
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
