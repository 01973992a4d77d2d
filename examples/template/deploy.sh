#!/bin/bash
# Makes the template, the endpoint and the workergroup on Vast, and asks the doctor: deploy.sh [--dry-run]
# Set what is yours in the environment; VAST_API_KEY, or `vastai set api-key`, says whose account it is.
set -euo pipefail

NAME=${NAME:-my-endpoint}
IMAGE=${IMAGE:?set IMAGE to that of your consumer, as you@registry has it}
PYWORKER_REPO=${PYWORKER_REPO:?set PYWORKER_REPO to this repository, or your fork of it}
PYWORKER_REF=${PYWORKER_REF:-main}
# The longest job, with some room: what a forgotten reservation may cost. An hour is the default of the worker.
MAX_RESERVATION_SECONDS=${MAX_RESERVATION_SECONDS:?set MAX_RESERVATION_SECONDS to the seconds of your longest job}
MAX_WORKERS=${MAX_WORKERS:-5}
COLD_WORKERS=${COLD_WORKERS:-0}
DISK_SPACE=${DISK_SPACE:-20}
SEARCH=${SEARCH:-gpu_ram>=23 num_gpus=1 rented=False}
# Further docker options, as `-e REDIS_URL=...`; everybody who can see the template can read them.
DOCKER_OPTIONS=${DOCKER_OPTIONS:-}
VASTAI_OPTIONS=${VASTAI_OPTIONS:-} # of every call, as --url

case ${1:-} in
    --dry-run) run() { printf '%q ' "$@"; echo; } ;;
    "") run() { "$@"; } ;;
    *) echo "usage: deploy.sh [--dry-run]" >&2; exit 2 ;;
esac

docker="-p 3000:3000 -e PYWORKER_REPO=$PYWORKER_REPO -e PYWORKER_REF=$PYWORKER_REF"
docker+=" -e MAX_RESERVATION_SECONDS=$MAX_RESERVATION_SECONDS -e NULL_MAX_QUEUE_SECONDS=0"
docker+=" -e BACKEND_HEALTH_URL=http://127.0.0.1:18998/health -e NULL_UNHEALTHY_ACTION=cancel"
docker+="${DOCKER_OPTIONS:+ $DOCKER_OPTIONS}"

# shellcheck disable=SC2086 # options are words
told=$(run vastai create template --name "$NAME" --image "$IMAGE" --disk_space "$DISK_SPACE" --env "$docker" \
    --search_params "$SEARCH" $VASTAI_OPTIONS)
echo "$told"
hash=$(sed -nE "s/.*'hash_id': '([^']+)'.*/\1/p" <<<"$told")
if [ "${1:-}" = --dry-run ]; then
    hash=HASH
elif [ -z "$hash" ]; then
    echo "deploy.sh: no template was made, so nothing else is" >&2
    exit 1
fi
# shellcheck disable=SC2086
run vastai create endpoint --endpoint_name "$NAME" --target_util 1.0 --max_queue_time 1 --target_queue_time 0.5 \
    --min_load 0 --cold_workers "$COLD_WORKERS" --max_workers "$MAX_WORKERS" --inactivity_timeout 10 $VASTAI_OPTIONS
# shellcheck disable=SC2086
run vastai create workergroup --endpoint_name "$NAME" --template_hash "$hash" --search_params "$SEARCH" $VASTAI_OPTIONS
run nullworker doctor --endpoint "$NAME"
