#!/usr/bin/env bash
# Train the recipe of this folder on one node with 8 GPUs:   launch.sh [key.path=value ...]
#
# Without arguments it starts at once. RANKS: GPUs to train on (8). Started again, it goes on from its last checkpoint.
# Rollouts on SGLang servers that share the GPUs with the trainer (docs/rollouts-on-sglang.md):
#   launch.sh rollout.engine=sglang rollout.sglang.servers.memory_saver=true rollout.sglang.servers.mem_fraction_static=0.5
set -euo pipefail
source "$(dirname "$0")/../cluster/common.sh"
usage_if_asked "$0" "$@"
exec "$(dirname "$0")/../cluster/one_node.sh" "$(dirname "$0")/hdpo.yaml" "$@"
