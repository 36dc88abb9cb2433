# What the launch scripts share; sourced by them. They run in the folder that a recipe's paths start from.
# shellcheck shell=bash

# SIGUSR1 asks a run to end. Slurm sends it to every process of a job step, and it would end all but the ranks, which
# take it: agents and servers inherit that it is ignored.
trap '' USR1

# usage_if_asked SCRIPT ARGUMENTS...: print the comment at the top of SCRIPT and end, where the first argument is --help.
usage_if_asked() {
  case ${2:-} in -h | --help) usage "$1"; exit 0 ;; esac
}

# usage SCRIPT: print the comment at its top.
usage() {
  sed -n '2,/^[^#]/{/^#*SBATCH/d; s/^# \{0,1\}//p;}' "$1"
}

# need_command NAME: end with a sentence when a program of the environment is not there.
need_command() {
  command -v "$1" > /dev/null && return
  echo "$1 is not installed: run \`make quickstart\`, then \`source .venv/bin/activate\`" >&2
  exit 1
}

# Where a recipe's run goes: the last output= override, else the recipe's own line.
output_of() {
  local recipe=$1 output argument
  shift
  [ -f "$recipe" ] || { echo "$recipe: no such recipe" >&2; return 2; }
  output=$(sed -n 's/^output:[[:space:]]*\([^[:space:]#]*\).*/\1/p' "$recipe")
  for argument in "$@"; do
    case $argument in output=*) output=${argument#output=} ;; esac
  done
  output=${output//[\"\']/}
  [ -n "$output" ] || { echo "$recipe: has no line 'output: FOLDER'" >&2; return 2; }
  echo "$output"
}

# "0:3,1:2,2:2": of all ranks stderr on the console, of the node's first one stdout too. The files get both of all.
tee_map() {
  local map="0:3" rank
  for ((rank = 1; rank < $1; rank++)); do map+=",$rank:2"; done
  echo "$map"
}

# train_here RANKS RECIPE OVERRIDES... -- TORCHRUN_FLAGS...: one torchrun agent on this node, in place of the shell.
# It keeps what ranks print, before Python's logging begins and while they crash, in OUTPUT/logs/torchrun/HOST.
train_here() {
  local ranks=$1 recipe=$2 output
  shift 2
  local overrides=()
  while [ "$#" -gt 0 ] && [ "$1" != -- ]; do overrides+=("$1"); shift; done
  shift
  output=$(output_of "$recipe" "${overrides[@]}") || return
  need_command "${TORCHRUN:-torchrun}"
  local logs
  logs="$output/logs/torchrun/$(hostname)"
  mkdir -p "$logs"
  gpu_settings
  # After SIGTERM an agent gives its ranks this long to finish a step and save; Slurm and Kubernetes have limits of
  # their own.
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
  exec "${TORCHRUN:-torchrun}" --nproc-per-node "$ranks" --log-dir "$logs" --redirects 3 --tee "$(tee_map "$ranks")" \
    "$@" -m megatron_hdpo train "$recipe" "${overrides[@]}"
}

# Nothing here makes a healthy cluster faster by guess; every line has its reason. What is set already is kept.
gpu_settings() {
  # Megatron starts a communication before the matrix product that is to hide it, and counts on one hardware queue to
  # keep that order under tensor parallelism (Hopper and older; from Blackwell on it is not needed).
  export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
  # NCCL says why it failed, and nothing else; without this an error is a number. INFO shows which network it took.
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
  # One thread per rank outside of PyTorch's own: torchrun would say so at length.
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
}

# Further settings for a set of nodes that train together.
several_nodes() {
  # By default agents hand their first store on from round to round, and one that joined later waits for an address that
  # nobody writes any more: a node could not be replaced (seen with torch 2.13). With this each round has its own.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
  # NODE_INTERFACE=ib0, say, where a node has several networks: the one for host-side exchange (gloo) and for NCCL's
  # first contact. Both guess otherwise, and may choose one that other nodes cannot reach.
  if [ -n "${NODE_INTERFACE:-}" ]; then
    export NCCL_SOCKET_IFNAME=$NODE_INTERFACE GLOO_SOCKET_IFNAME=$NODE_INTERFACE
  fi
  # NODE_HCA=mlx5_0,mlx5_1, say, where some InfiniBand adapters are for storage: those that NCCL may use.
  if [ -n "${NODE_HCA:-}" ]; then export NCCL_IB_HCA=$NODE_HCA; fi
}

# need NAME...: end with a sentence when a variable is not set.
need() {
  local name
  for name in "$@"; do
    [ -n "${!name:-}" ] || { echo "$0: set $name (see --help)" >&2; exit 2; }
  done
}

# need_recipe ARGUMENTS...: end with a sentence when there are none.
need_recipe() {
  [ "$#" -ge 1 ] || { echo "$0: name a recipe (see --help)" >&2; exit 2; }
}

# join_by , a b c: "a,b,c".
join_by() {
  local IFS=$1
  shift
  echo "$*"
}

# server_key FILE: the key of all servers and trainers of URLS=FILE, in FILE.key, which only its user can read. The first
# script that asks makes it; it is in no command line, which all users of a node see.
server_key() {
  local made
  made=$(mktemp "$1.key.XXXXXX")  # readable by its user alone
  od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$made"
  ln "$made" "$1.key" 2>/dev/null || true  # there is one already
  rm "$made"
  cat "$1.key"
}

# wait_for_urls FILE NODES: the override rollout.sglang.urls=[...] once that many nodes have added their line.
wait_for_urls() {
  local deadline=$((SECONDS + ${START_S:-1200})) found=0
  until [ "$found" -ge "$2" ]; do
    ((SECONDS < deadline)) || { echo "$1: $found of $2 server nodes are there" >&2; return 1; }
    sleep 1
    if [ -f "$1" ]; then found=$(wc -l < "$1"); fi
  done
  # shellcheck disable=SC2046  # one address per word
  echo "rollout.sglang.urls=[$(join_by , $(sort "$1"))]"
}
