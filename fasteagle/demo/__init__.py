"""Where is the embedded trained pair? What fasteagle runs when no checkpoint is named."""

from pathlib import Path

BASE: Path = Path(__file__).parent / "base"
HEAD: Path = Path(__file__).parent / "head"
