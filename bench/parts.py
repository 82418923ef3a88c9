"""Where are the parts of a round? In the package; this is the name that benches know."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fasteagle.parts import separate

__all__ = ["separate"]
