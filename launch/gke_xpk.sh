#!/usr/bin/env bash
# launch/gke_xpk.sh --name NAME --cluster CLUSTER --image IMAGE (--tpu-type T | --device-type D) [--num-slices N] [--zone Z] [--project P]
#                   [--restarts N] [--dry-run] --config C --workdir W ...
#
# Hands the job to GKE through xpk (https://github.com/AI-Hypercomputer/xpk). The image is one of launch/Dockerfile.*, the workdir lies
# on storage that all pods mount. Status 75 (saved, not finished) starts the workload again.
set -euo pipefail
name='' cluster='' image='' device=() slices=1 place=() restarts=20 dry='' args=()
while [ $# -gt 0 ]; do
  case "$1" in
    --name|--cluster|--image|--tpu-type|--device-type|--num-slices|--zone|--project|--restarts)
      [ $# -gt 1 ] || { echo "memjax: $1 wants a value" >&2; exit 2; }
      case "$1" in
        --tpu-type|--device-type) device=("$1" "$2") ;;
        --zone|--project) place+=("$1" "$2") ;;
        --num-slices) slices=$2 ;;
        *) printf -v "${1#--}" %s "$2" ;;
      esac
      shift ;;
    --dry-run) dry=1 ;;
    *) args+=("$1") ;;
  esac
  shift
done
if [ -z "$name" ] || [ -z "$cluster" ] || [ -z "$image" ] || [ "${#device[@]}" -eq 0 ]; then
  echo 'memjax: --name, --cluster, --image and one of --tpu-type and --device-type are required' >&2
  exit 2
fi
words=''
[ "${#args[@]}" -eq 0 ] || words=$(printf ' %q' "${args[@]}")
command=(xpk workload create --workload "$name" --cluster "$cluster" ${place[@]+"${place[@]}"} "${device[@]}" --num-slices "$slices"
         --docker-image "$image" --max-restarts "$restarts" --restart-on-exit-codes 75 --termination-grace-period-seconds 120
         --command "python -m memjax.train$words")
printf '%q ' "${command[@]}"
echo
[ "$dry" ] || exec "${command[@]}"
