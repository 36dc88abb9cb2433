#!/usr/bin/env bash
# One node with 8 GPUs: data parallelism 8. Further arguments are overrides: key.path=value.
#
# Rollouts on SGLang servers that share the GPUs with the trainer (docs/rollouts-on-sglang.md):
#   launch.sh rollout.engine=sglang rollout.sglang.servers.memory_saver=true rollout.sglang.servers.mem_fraction_static=0.5
set -euo pipefail
exec "$(dirname "$0")/../cluster/one_node.sh" examples/qwen2.5-math-1.5b/hdpo.yaml "$@"
