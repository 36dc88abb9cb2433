#!/usr/bin/env bash
# Make the environment of the SGLang tests: install.sh PYTHON FOLDER. Two minutes, 2.6 GB; stock SGLang, for a CPU.
# It is apart from the trainer's because SGLang pins its own torch and transformers.
set -euo pipefail
python=$1 folder=$2 here=$(dirname "$0")

"$python" -m venv "$folder"
pip() { "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$here/constraints.txt" "$@"; }
pip --requirement "$here/requirements.txt"
# Their declared dependencies are CUDA libraries.
pip --no-deps torchvision==0.28.0 sglang==0.5.23
pip sglang-router==0.3.2
