"""How does a command run? One module a command; the `fasteagle` program and the scripts share them.

A command module has a docstring (its help), `add_arguments(parser)` and `run(args)`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType


def run(module: ModuleType, argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run a command module on `argv` (default: the process's) and return its exit status."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    return run_parsed(module, parser.parse_args(argv))


def run_parsed(module: ModuleType, args: argparse.Namespace) -> int:
    """Run a command on parsed arguments; a user's error is one line on stderr and status 2."""
    try:
        module.run(args)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:  # FileNotFoundError is an OSError
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0
