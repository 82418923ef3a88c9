"""How does a command run? One module a command; the `fasteagle` program and the scripts share them.

A command module has a docstring (its help), `add_arguments(parser)` and `run(args)`, which may
return an exit status.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from types import FrameType, ModuleType
from typing import NoReturn

from fasteagle.errors import CompileError, first_line, ran_out_of_memory

WRONG_CALL = 2
INTERRUPTED = 130
PIPE_CLOSED = 141


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like every other user error."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def run(module: ModuleType, argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run a command module on `argv` (default: the process's) and return its exit status.

    A user's error is one line on stderr and status 2.
    """
    parser = Parser(
        prog=prog,
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    set_up_process()
    try:
        args = parser.parse_args(argv)
        words = sys.argv[1:] if argv is None else [*map(str, argv)]
        args.call = [module.__name__.rpartition(".")[2].replace("_", "-"), *words]
        status: int | None = module.run(args)
    except KeyboardInterrupt:
        print(file=sys.stderr)  # the shell's next line begins on a line of its own
        return INTERRUPTED
    except BrokenPipeError:  # whoever read stdout has left, as in `... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except (ValueError, OSError) as error:  # FileNotFoundError is an OSError
        return fail(str(error))
    except CompileError as error:
        advice = "give --no_compile" if hasattr(args, "no_compile") else "leave out --compile"
        return fail(f"{error}; {advice}, and see what `fasteagle doctor` says of torch.compile")
    except (MemoryError, RuntimeError) as error:
        if not ran_out_of_memory(error):
            raise
        return fail(
            f"out of memory ({first_line(error)}); see the plan of `fasteagle doctor`, then try "
            "--dtype bfloat16, a smaller --max_length or --batch_size, or another --device"
        )
    return status or 0


def set_up_process() -> None:
    """Let output replace what the terminal cannot show, and a polite kill end like an exception."""
    warnings.formatwarning = one_line_warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if threading.current_thread() is not threading.main_thread():
        return
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:  # nohup stays nohup
            signal.signal(number, leave)


def one_line_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """Our own warnings are for the user, who need not see where in the program they come from."""
    del line
    if category.__module__.startswith("fasteagle."):
        return f"note: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def leave(number: int, _: FrameType | None) -> NoReturn:
    """End like an exception when told to stop, so that half-written files are removed."""
    sys.exit(128 + number)


def fail(message: str) -> int:
    """Say on one line what is wrong with a call; returns its exit status."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    return WRONG_CALL
