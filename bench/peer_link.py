"""How does peers.py talk to a worker? One line of JSON there, one back, within a time limit.

A worker that says nothing in time is ended. Whatever goes wrong is one PeerError, a line that says
what to do; a worker's own stderr is kept and its last line quoted.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

PASSES = 6  # over the prompts, within which a compiled peer must stop compiling
LONGEST_QUOTE = 300  # characters of a worker's last words


class PeerError(Exception):
    """A peer cannot be made, fails or takes too long."""


class Worker:
    """A running worker; `with` ends it. It is ready when made."""

    def __init__(
        self, name: str, command: Sequence[str], *, variables: Mapping[str, str], timeout: float
    ) -> None:
        self.name, self.timeout = name, timeout
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=dict(variables),
            text=True,
        )
        try:
            self.versions: dict[str, str] = self._read()["versions"]
        except PeerError:
            self.close()
            raise

    def ask(self, prompt: Sequence[int], max_new_tokens: int) -> dict[str, Any]:
        """The answer to one prompt; PeerError unless it is exactly max_new_tokens long."""
        assert self.process.stdin is not None, "stdin is a pipe"
        asked = json.dumps({"prompt": list(prompt), "max_new_tokens": max_new_tokens})
        try:
            self.process.stdin.write(asked + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        answer = self._read()
        found = len(answer["tokens"])
        if found != max_new_tokens:
            raise PeerError(
                f"{self.name}: {found} tokens came back, not {max_new_tokens}; "
                "ask for fewer with --max_new_tokens"
            )
        return answer

    def warm_up(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        """Decode all prompts, untimed, until a pass over them compiles nothing."""
        before = None
        for _ in range(PASSES):
            graphs = [self.ask(prompt, max_new_tokens)["graphs"] for prompt in prompts][-1]
            if graphs in (0, before):
                return
            before = graphs
        raise PeerError(
            f"{self.name}: still compiles after {PASSES} passes over the prompts; "
            "leave it out with --engines"
        )

    def _read(self) -> dict[str, Any]:
        """The next line of the worker."""
        assert self.process.stdout is not None, "stdout is a pipe"
        late = threading.Event()

        def end() -> None:
            late.set()
            self.process.kill()

        watch = threading.Timer(self.timeout, end)
        watch.start()
        line = self.process.stdout.readline()
        watch.cancel()
        if late.is_set():
            raise PeerError(
                f"{self.name}: no answer in {self.timeout:g} s; give it more with --timeout "
                "or leave it out with --engines"
            )
        if not line:
            raise self._ended()
        try:
            return dict(json.loads(line))
        except ValueError:
            raise PeerError(
                f"{self.name}: its worker printed {line.strip()!r:.80}, not a JSON object; "
                "only answers may go to its stdout"
            ) from None

    def _ended(self) -> PeerError:
        status = self.process.wait()
        self.log.seek(0)
        words = [line.strip() for line in self.log if line.strip()]
        last = words[-1][:LONGEST_QUOTE] if words else "nothing on stderr"
        return PeerError(f"{self.name}: its worker ended with status {status}: {last}")

    def close(self) -> None:
        """End the worker, which waits for its next prompt, and forget what it wrote."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.log):
            assert pipe is not None, "all were opened"
            try:
                pipe.close()
            except BrokenPipeError:  # a prompt that the worker did not live to read
                continue

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
