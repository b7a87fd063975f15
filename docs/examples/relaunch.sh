#!/usr/bin/env bash
# bash docs/examples/relaunch.sh RUN_DIR COMMAND ...
# bash docs/examples/relaunch.sh runs/mine deepspeed --hostfile HOSTS --module bpgo_video.train --config RECIPE \
#     --run.dir runs/mine --run.resume auto
# Repeats a training command until it ends with 0 (finished, or stopped on request) or 2 (wrong input), or until SIGINT or
# SIGTERM to this script, which it passes on. After RESTARTS (10) failures in a row without a newer checkpoint it gives up.
set -um  # m: the command has a process group of its own, which a signal can reach as a whole

run_dir=${1:?usage: relaunch.sh RUN_DIR COMMAND ...}
shift
restarts=${RESTARTS:-10} pause=${PAUSE:-5} failures=0 child=

run() { "$@" & child=$!; wait "$child"; }
newest() { cat "$run_dir/checkpoints/latest" 2> /dev/null || echo "the beginning"; }
stop() { kill -TERM -- "-$child"; wait "$child"; exit 143; }
trap stop INT TERM

before=$(newest)
while true; do
    run "$@"
    code=$?
    case $code in 0 | 2 | 130 | 143) exit "$code" ;; esac # the last two: a signal to the command itself
    reached=$(newest)
    if [[ $reached == "$before" ]]; then failures=$((failures + 1)); else failures=1; fi
    before=$reached
    if ((failures > restarts)); then exit "$code"; fi
    seconds=$((pause * 2 ** (failures < 7 ? failures - 1 : 6)))
    echo "relaunch.sh: exit code $code; again in $seconds s from $reached ($failures of $restarts without progress)" >&2
    run sleep "$seconds"
done
