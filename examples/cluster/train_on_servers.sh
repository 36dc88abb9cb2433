#!/usr/bin/env bash
# A trainer for servers that servers.sh starts on other nodes; the same command on each of the trainer's nodes:
#
#   URLS=/shared/run.urls SERVER_NODES=2 NODES=4 HEAD=node2:29400 examples/cluster/train_on_servers.sh RECIPE [key=value ...]
#
# Waits until SERVER_NODES lines are in the file URLS (for START_S seconds, 1200), then is several_nodes.sh. Remove the
# files of an earlier run first: URLS and URLS.key.
set -euo pipefail
source "$(dirname "$0")/common.sh"
usage_if_asked "$0" "$@"
need URLS SERVER_NODES
need_recipe "$@"
given=$(wait_for_urls "$URLS" "$SERVER_NODES")
SERVER_KEY=$(server_key "$URLS")
export SERVER_KEY
exec "$(dirname "$0")/several_nodes.sh" "$@" rollout.engine=sglang rollout.sglang.placement=given "$given" \
  rollout.sglang.api_key_variable=SERVER_KEY
