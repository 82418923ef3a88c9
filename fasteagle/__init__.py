"""fasteagle: exact, compiled EAGLE decoding of LLaMA-family models at batch 1, in pure PyTorch."""

__version__ = "0.1.0"
