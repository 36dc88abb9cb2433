#!/usr/bin/env bash
# Several nodes, the same command on each:
#
#   NODES=2 HEAD=node0:29400 examples/cluster/several_nodes.sh RECIPE [key.path=value ...]
#
# NODES: how many. HEAD: host and free port of one of them, where the agents meet; that one must stay up.
# RANKS: GPUs of each node (8). RUN_ID: a name that differs between runs that share HEAD. RESTARTS: how often a node
# starts its ranks anew after a failure (3). REJOIN_S: seconds without a sign of life after which a node counts as lost
# (15). NODE_ADDRESS: what the others call this node, where its host name does not do. NODE_INTERFACE, NODE_HCA: see
# common.sh.
# A rank that dies, or a node that dies and is started again with the same command, brings all ranks back to the last
# checkpoint.
set -euo pipefail
source "$(dirname "$0")/common.sh"
usage_if_asked "$0" "$@"
need NODES HEAD
need_recipe "$@"
several_nodes
keep_alive=$(((${REJOIN_S:-15} + 2) / 3))
train_here "${RANKS:-8}" "$@" -- --nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "$HEAD" \
  --rdzv-id "${RUN_ID:-megatron-hdpo}" --rdzv-conf "keep_alive_interval=$keep_alive,keep_alive_max_attempt=3" \
  --max-restarts "${RESTARTS:-3}" ${NODE_ADDRESS:+--local-addr "$NODE_ADDRESS"}
