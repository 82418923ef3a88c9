"""Does a conversion show how far it is at a terminal, and nothing anywhere else?"""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from fasteagle import demo

SCRIPT = Path(__file__).parents[1] / "convert" / "convert_hf_checkpoint.py"


def stderr_of(command: list[str], reader: int, writer: int) -> str:
    """What a command that succeeds writes to a stderr with these two ends."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=writer) as process:
        os.close(writer)
        text = b""
        while block := read(reader):
            text += block
        os.close(reader)
        assert process.wait(timeout=60) == 0, text
    return text.decode()


def read(reader: int) -> bytes:
    """The next bytes; none at the end, which Linux reports as an error of the terminal."""
    try:
        return os.read(reader, 4096)
    except OSError:
        return b""


@pytest.mark.parametrize("terminal", [True, False])
def test_only_a_terminal_gets_the_converters_bar(tmp_path: Path, terminal: bool) -> None:
    command = [sys.executable, str(SCRIPT), "--checkpoint_dir", str(demo.BASE)]
    ends = pty.openpty() if terminal else os.pipe()
    if terminal:
        termios.tcsetwinsize(ends[1], (24, 80))  # a new one has no columns, so no room for a bar
    text = stderr_of([*command, "--out", str(tmp_path / "out")], *ends)
    if terminal:
        assert "converting:   0%" in text
        assert "converting: 100%" in text
    else:
        assert text == ""
