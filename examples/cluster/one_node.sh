#!/usr/bin/env bash
# One node:   examples/cluster/one_node.sh RECIPE [key.path=value ...]
#
# RANKS: GPUs to train on (8). A killed rank ends the run; started again, it goes on from its last checkpoint.
# Rollouts on SGLang servers that share the GPUs: add
#   rollout.engine=sglang rollout.sglang.servers.memory_saver=true rollout.sglang.servers.mem_fraction_static=0.5
set -euo pipefail
source "$(dirname "$0")/common.sh"
usage_if_asked "$0" "$@"
[ "$#" -ge 1 ] || { usage "$0" >&2; exit 2; }
train_here "${RANKS:-8}" "$@" -- --standalone
