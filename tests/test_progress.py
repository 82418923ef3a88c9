"""Does a conversion show how far it is at a terminal, and nothing anywhere else?"""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from fasteagle import demo

ROOT = Path(__file__).parents[1]
SCRIPTS = {
    "converting": ROOT / "convert" / "convert_hf_checkpoint.py",
    "quantizing": ROOT / "quantize" / "quantize_llama.py",
}
FLAGS = {"converting": ["--checkpoint_dir"], "quantizing": ["--pad", "--checkpoint_path"]}


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
@pytest.mark.parametrize("what", ["converting", "quantizing"])
def test_only_a_terminal_gets_a_bar(tmp_path: Path, what: str, terminal: bool) -> None:
    folder = shutil.copytree(demo.BASE, tmp_path / "base")
    command = [sys.executable, str(SCRIPTS[what])]
    command += FLAGS[what] + [str(folder)]
    ends = pty.openpty() if terminal else os.pipe()
    if terminal:
        termios.tcsetwinsize(ends[1], (24, 80))  # a new one has no columns, so no room for a bar
    text = stderr_of(command, *ends)
    if terminal:
        assert f"{what}:   0%" in text
        assert f"{what}: 100%" in text
    else:
        assert text == ""
