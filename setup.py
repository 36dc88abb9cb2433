"""Packaging. The extras: quickstart (fetching its model), gpu (Transformer Engine), sglang, tracking, docs, dev."""

from pathlib import Path

from setuptools import find_packages, setup

CORE = [
    "torch>=2.11,<2.15",
    "megatron-core>=0.16.1,<0.17",
    "psutil",  # megatron-core's checkpoints need it and do not say so
    "einops",  # likewise
    "transformers>=5.0,<6",
    "tokenizers",
    "safetensors",
    "numpy>=1.26",
    "pydantic>=2.7,<3",
    "PyYAML>=6",
    "jinja2>=3.1",
    "datasets>=3",
    "pyarrow",
    "reasoning-gym==0.1.25",
    "math-verify==0.9.0",
    "pebble>=5.2",
    "aiohttp>=3.10",  # SGLang's servers are spoken to through it
    "filelock",
    "orjson",
    "packaging",
    "tenacity>=9",
    "rich>=13",
    "shtab>=1.7",  # shell completion
    "matplotlib>=3.8",
    "tensorboard",
]
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.7", "mkdocstrings[python]>=1.0"]

setup(
    name="megatron-hdpo",
    version="0.1.0",
    description="HDPO and on-policy self-distillation on Megatron-Core",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The megatron_hdpo authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["reinforcement learning", "distillation", "language models", "Megatron-Core", "SGLang"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    # The examples become a part of the package, from which `megatron_hdpo init` copies.
    packages=[*find_packages(include=["megatron_hdpo*"]), "megatron_hdpo.recipes"],
    package_dir={"megatron_hdpo.recipes": "examples"},
    package_data={
        "megatron_hdpo": ["py.typed"],
        "megatron_hdpo.tracking": ["templates/*.j2"],
        "megatron_hdpo.recipes": ["*/*.yaml", "cluster/*"],
    },
    install_requires=CORE,
    extras_require={
        "quickstart": ["gguf", "accelerate"],
        "gpu": ["transformer-engine[pytorch]>=2.10,<2.12"],
        "sglang": ["sglang>=0.5.15", "sglang-router>=0.3.2"],
        "tracking": ["wandb>=0.21", "mlflow>=3"],
        "docs": DOCS,
        "dev": [
            *DOCS,
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist>=3.6",
            "hypothesis",
            "import-linter>=2.5",
            "ruff",
            "mypy",
            "types-PyYAML",
            "triton>=3.7.1",
        ],
    },
    entry_points={"console_scripts": ["megatron_hdpo = megatron_hdpo.cli:main"]},
)
