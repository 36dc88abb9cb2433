#!/usr/bin/env bash
# Make the environment of the SGLang tests: install.sh PYTHON FOLDER. Stock SGLang, for a CPU.
# PYTHON is the interpreter of the trainer's environment. FOLDER sees that environment's packages behind its own, so
# only what it lacks, and the versions that SGLang wants otherwise, are installed.
set -euo pipefail
python=$1 folder=$2 here=$(dirname "$0")

if ! shared=$("$python" -c 'import sysconfig, torch; print(sysconfig.get_path("purelib"))' 2>/dev/null); then
    echo "install.sh: $python has no torch: make the trainer's environment first (make setup)" >&2
    exit 1
fi
"$python" -m venv "$folder"
own=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$shared" >"$own/trainer_environment.pth"
pip() { "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$here/constraints.txt" "$@"; }
pip --requirement "$here/requirements.txt" sglang-router==0.3.2
# Their declared dependencies are CUDA libraries.
pip --no-deps torchvision==0.28.0 sglang==0.5.23
