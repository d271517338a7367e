#!/bin/bash
# A BIDS data set on a cluster: each task of a Slurm array prepares and embeds its part, then one job makes the tables.
#   TASKS=50 examples/hpc/bids.sh BIDS_DIR OUT_DIR --model simclr_resnet18_3d -w /scratch/work
# The same command goes on where tasks failed or ran out of time. Memory and time: about 1.5 GB and minutes a scan.
set -euo pipefail
bids_dir=$1
out_dir=$2
here=$(cd "$(dirname "$0")" && pwd)

array=$(sbatch --parsable --array="1-${TASKS:-8}" "$here/task.sbatch" bids "$bids_dir" "$out_dir" participant "${@:3}")
# afterany: scans that failed are named in the tables; those of other tasks are not held up by them.
sbatch --dependency="afterany:$array" --job-name=brainfm-group --cpus-per-task=1 --mem=8G \
    --wrap="${BRAINFM:-brainfm} $(printf '%q ' bids "$bids_dir" "$out_dir" group)"
