"""What is fasteagle to pip? Name, version, requirements and the files that ship.

pip install -c constraints.txt -e .
pip install -c constraints.txt -e .[dev]
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# Read as text: importing the package would need torch before pip has installed it.
VERSION = re.findall(r'^__version__ = "(.+)"$', (ROOT / "fasteagle/__init__.py").read_text(), re.M)

EXTRAS = {
    "train": ["accelerate"],
    "serve": ["fastapi", "uvicorn"],
    "ui": ["gradio"],
    "hf": ["transformers"],
}

setup(
    name="fasteagle",
    version=VERSION[0],
    description="Exact, compiled EAGLE decoding of LLaMA-family models, in pure PyTorch",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="the fasteagle authors",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["fasteagle", "fasteagle.*"]),
    include_package_data=False,
    package_data={
        "fasteagle": ["py.typed"],
        "fasteagle.demo": ["README.md", "*/*.json", "*/*.safetensors", "*/tokenizer.model"],
    },
    zip_safe=False,
    # Lower bounds only; the versions that were tested together are in constraints.txt.
    install_requires=[
        "torch>=2.11",
        "numpy",
        "safetensors",
        "sentencepiece",
        "tokenizers",
        "huggingface_hub",
        "jinja2>=3.1.6",
        "tqdm",
    ],
    extras_require={
        **EXTRAS,
        "all": [name for names in EXTRAS.values() for name in names],
        "dev": [
            *("pytest", "pytest-xdist", "hypothesis", "ruff", "mypy"),
            *("transformers", "setuptools>=77"),
            "matplotlib",  # bench/plot_drafters.py
            # Its kernels are tested in its interpreter. A CUDA build of torch asks for the version
            # that it was made with, so constraints.txt names none.
            "triton; sys_platform == 'linux' and platform_machine == 'x86_64'",
        ],
    },
    entry_points={"console_scripts": ["fasteagle=fasteagle.commands.main:main"]},
    classifiers=[
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
