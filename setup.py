"""Packaging: what the trainer needs, and what only some recipes, commands or machines need (the extras).

Ranges, no pins: `constraints` has a set of exact versions per Python and device, and `docs/install.md` the table.
"""

from pathlib import Path

from setuptools import find_packages, setup

CORE = [
    "torch>=2.11,<2.16",
    # Newer ones import triton, which is for Linux only.
    "megatron-core>=0.16.1,<0.20; platform_system == 'Linux'",
    "megatron-core>=0.16.1,<0.18; platform_system != 'Linux'",
    # megatron-core imports it from 0.18 on, and has no such release for Python 3.11. It does not say so.
    "triton>=3.6; platform_system == 'Linux' and python_version >= '3.12'",
    "psutil",  # megatron-core's checkpoints need it and do not say so
    "einops",  # likewise
    "transformers>=5.0,<6",
    "tokenizers",
    "safetensors",
    "numpy>=1.26",
    "pyarrow>=15",  # the cache of problems, and Parquet files
    "pydantic>=2.7,<3",
    "PyYAML>=6",
    "jinja2>=3.1",
    "math-verify>=0.9,<0.10",
    "pebble>=5.2",
    "aiohttp>=3.10",  # SGLang's servers are spoken to through it
    "filelock",
    "orjson",
    "packaging",
    "tenacity>=9",
    "rich>=13",
    "shtab>=1.7",  # shell completion
]
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.7", "mkdocstrings[python]>=1.0"]

# `megatron_hdpo/environment.py` names the extra of a package that is missing.
FEATURES = {
    "tasks": ["reasoning-gym>=0.1.25"],  # needs a C compiler
    "datasets": ["datasets>=3"],
    "report": ["matplotlib>=3.8"],
    "tensorboard": ["tensorboard"],
    "tracking": ["wandb>=0.21", "mlflow>=3"],
}
QUICKSTART = ["gguf", "accelerate", *(FEATURES[name][0] for name in ("tasks", "report", "tensorboard"))]

# The cuBLAS that comes with torch decides which Transformer Engine loads: 2.13 and later need that of torch 2.15.
GPU = ["torch<2.15", "transformer-engine[pytorch]>=2.10,<2.13"]
GPU_TORCH_2_15 = ["torch>=2.15", "transformer-engine[pytorch]>=2.13,<2.21"]

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
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11,<3.14",
    # The examples become a part of the package, from which `megatron_hdpo init` copies.
    packages=[*find_packages(include=["megatron_hdpo*"]), "megatron_hdpo.recipes"],
    package_dir={"megatron_hdpo.recipes": "examples"},
    package_data={
        "megatron_hdpo": ["py.typed"],
        "megatron_hdpo.tracking": ["templates/*.j2"],
        "megatron_hdpo.recipes": ["*/*.yaml", "cluster/*"],
    },
    install_requires=CORE,
    extras_require=FEATURES
    | {
        "all": [requirement for feature in FEATURES.values() for requirement in feature],
        "quickstart": QUICKSTART,
        "gpu": GPU,
        "gpu-torch215": GPU_TORCH_2_15,
        "sglang": ["sglang>=0.5.21,<0.6", "sglang-router>=0.3.2"],
        "docs": DOCS,
        # Headers of CUDA beside those that torch brings; tests are run in its environment too.
        "rehearsal": ["nvidia-cuda-crt", "pytest>=8"],
        "dev": [
            *DOCS,
            *FEATURES["datasets"],
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
