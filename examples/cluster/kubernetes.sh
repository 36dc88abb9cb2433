#!/usr/bin/env bash
# The command of a pod's container:   examples/cluster/kubernetes.sh RECIPE [key.path=value ...]
#
# Under Kubeflow's PyTorchJob the operator gives MASTER_ADDR and PET_NNODES (older ones the number of pods as WORLD_SIZE;
# with an elasticPolicy the address as PET_RDZV_ENDPOINT). Under a plain Job with completionMode: Indexed give NODES
# (= completions) and SERVICE (the headless service that is the pods' subdomain): pod 0, whose name is the Job's and -0,
# is then the head. RANKS: GPUs per pod (8).
set -euo pipefail
source "$(dirname "$0")/common.sh"
usage_if_asked "$0" "$@"
port=${MASTER_PORT:-29400}
if [ -n "${PET_RDZV_ENDPOINT:-}" ]; then
  export HEAD=$PET_RDZV_ENDPOINT
elif [ -n "${MASTER_ADDR:-}" ]; then
  # The port of MASTER_PORT is the one that the operator's service opens; nobody else listens there.
  export HEAD=$MASTER_ADDR:$port
elif [ -n "${JOB_COMPLETION_INDEX:-}" ]; then
  need SERVICE
  pod=$(hostname)
  export HEAD=${pod%-"$JOB_COMPLETION_INDEX"}-0.$SERVICE:$port
fi
NODE_ADDRESS=$(hostname -i | cut -d" " -f1)  # names of pods do not always resolve
export NODE_ADDRESS NODES=${NODES:-${PET_NNODES:-${WORLD_SIZE:-}}} RANKS=${RANKS:-8}
# Both would name a rank before the agents have met: torchrun takes flags from PET_*, ranks from the rendezvous.
unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT "${!PET_@}"
exec "$(dirname "$0")/several_nodes.sh" "$@"
