#!/usr/bin/env bash
# One node with 8 GPUs: data parallelism 8. Further arguments are overrides: key.path=value.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec torchrun --standalone --nproc-per-node 8 -m megatron_hdpo train examples/qwen2.5-math-1.5b/hdpo.yaml "$@"
