#!/usr/bin/env bash
# SGLang servers on a node of their own, for rollout.sglang.placement=given; the same command on each such node:
#
#   MODEL=models/Qwen2.5-7B-Instruct URLS=/shared/run.urls examples/cluster/servers.sh [flags of sglang.launch_server]
#
# MODEL: the trainer's model.path. URLS: a file on the shared file system, to which each node adds one line with the
# addresses of its servers when all of them answer. GPUS (8), TENSOR_PARALLEL (1): a node has GPUS / TENSOR_PARALLEL
# servers. PORT: of the first (30000). NODE_ADDRESS: this node for the trainer (its host name). PYTHON: interpreter of
# SGLang's environment (python). START_S: longest start (900).
# The servers run in the foreground; ending this script ends them. Whoever reaches a server could replace its weights, so
# they refuse requests without the key in the file $URLS.key, which train_on_servers.sh and slurm.sbatch hand to the run.
set -euo pipefail
source "$(dirname "$0")/common.sh"
usage_if_asked "$0" "$@"
need MODEL URLS
need_sglang() {
  command -v "$1" > /dev/null || { echo "PYTHON=$1: no such program" >&2; exit 2; }
  "$1" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("sglang") is None)' && return
  echo "PYTHON=$1: SGLang is not installed there; name the interpreter of an environment that has it" >&2
  exit 2
}
need_sglang "${PYTHON:-python}"
gpus=${GPUS:-8} wide=${TENSOR_PARALLEL:-1} port=${PORT:-30000} host=${NODE_ADDRESS:-$(hostname)}
mkdir -p "$URLS.logs"
key=$(server_key "$URLS")
config=$(mktemp "$URLS.logs/$host.XXXXXX.yaml") header=$(mktemp)  # readable by their user alone
echo "api-key: $key" > "$config"
echo "Authorization: Bearer $key" > "$header"
processes=() addresses=()
trap 'kill "${processes[@]}" 2>/dev/null || true; rm -f "$config" "$header"; wait' EXIT

for ((i = 0; i < gpus / wide; i++)); do
  # A warm-up would stand in the way of the first weight update. Answers are token ids, each piece holds the new ones.
  "${PYTHON:-python}" -m sglang.launch_server --model-path "$MODEL" --host 0.0.0.0 --port $((port + i)) \
    --tp-size "$wide" --base-gpu-id $((i * wide)) --dtype bfloat16 --skip-server-warmup \
    --incremental-streaming-output --skip-tokenizer-init --config "$config" "$@" \
    > "$URLS.logs/$host-$i.log" 2>&1 &
  processes+=("$!")
  addresses+=("http://$host:$((port + i))")
done

deadline=$((SECONDS + ${START_S:-900}))
for url in "${addresses[@]}"; do
  until curl --silent --fail --max-time 5 --header "@$header" --output /dev/null "$url/model_info"; do
    for process in "${processes[@]}"; do
      kill -0 "$process" 2>/dev/null || { echo "$host: a server ended; see $URLS.logs/$host-*.log" >&2; exit 1; }
    done
    ((SECONDS < deadline)) || { echo "$url does not answer; see $URLS.logs/$host-*.log" >&2; exit 1; }
    sleep 1
  done
done
# One short line, appended: nodes that are ready together do not tear each other's.
echo "${addresses[*]}" >> "$URLS"
echo "$host: ${#addresses[@]} servers answer"
wait -n "${processes[@]}" || true
echo "$host: a server ended; see $URLS.logs/$host-*.log" >&2
exit 1
