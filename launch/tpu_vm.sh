#!/usr/bin/env bash
# launch/tpu_vm.sh ACTION --name NAME --zone ZONE [--type TYPE] [--version VERSION] [--project P] [--spot] [--dry-run] [--config C ...]
#
#   create   makes the TPU VM and installs this folder on all of its hosts
#   train    runs python -m memjax.train on all hosts, with what this file does not know: --config C --workdir W ...
#   logs     follows the log of host 0
#   delete   removes the TPU VM
#
# jax finds the other hosts in the metadata of the TPU: no variables are needed. The workdir lies where all hosts see it. After a
# preemption: create again, train again with the same workdir.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
action='' name='' zone='' type=v5litepod-16 version=v2-alpha-tpuv5-lite dry='' spot=() project=() args=()
usage() { sed -n '2,7s/^# \{0,1\}//p' "launch/tpu_vm.sh" >&2; exit 2; }
if [ $# -gt 0 ]; then action=$1; shift; fi
while [ $# -gt 0 ]; do
  case "$1" in
    --name|--zone|--type|--version|--project)
      [ $# -gt 1 ] || { echo "memjax: $1 wants a value" >&2; exit 2; }
      if [ "$1" = --project ]; then project=(--project "$2"); else printf -v "${1#--}" %s "$2"; fi
      shift ;;
    --spot) spot=(--spot) ;;
    --dry-run) dry=1 ;;
    *) args+=("$1") ;;
  esac
  shift
done
case "$action" in create|train|logs|delete) ;; *) usage ;; esac
[ "$name" ] && [ "$zone" ] || { echo 'memjax: --name and --zone are required' >&2; exit 2; }
place=(--zone "$zone" ${project[@]+"${project[@]}"})
run() { printf '%q ' "$@"; echo; [ "$dry" ] || "$@"; }
on() { run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" "--worker=$1" --command "$2"; }
case "$action" in
  create)
    run gcloud compute tpus tpu-vm create "$name" "${place[@]}" --accelerator-type "$type" --version "$version" ${spot[@]+"${spot[@]}"}
    run tar czf memjax.tar.gz memjax configs launch pyproject.toml README.md LICENSE
    run gcloud compute tpus tpu-vm scp memjax.tar.gz "$name:" "${place[@]}" --worker=all
    run rm memjax.tar.gz
    on all "mkdir -p memjax && tar xzf memjax.tar.gz -C memjax && python3 -m pip install -e './memjax[tpu,text,hub]' && cd memjax && python3 -m memjax.doctor --part=devices"
    ;;
  train)
    words=''
    [ "${#args[@]}" -eq 0 ] || words=$(printf '%q ' "${args[@]}")
    on all "cd memjax && python3 -m memjax.train $words 2>&1 | tee -a memjax.log; exit \${PIPESTATUS[0]}"
    ;;
  logs) on 0 'tail -n 100 -f memjax/memjax.log' ;;
  delete) run gcloud compute tpus tpu-vm delete "$name" "${place[@]}" --quiet ;;
esac
