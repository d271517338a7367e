#!/bin/bash
# A long list of scans on a cluster: each task of a Slurm array embeds its part, then one job makes the table.
#   TASKS=50 examples/hpc/embed.sh SCANS embeddings.parquet --model simclr_resnet18_3d
# The parts stay in embeddings.parquet.parts; the same command goes on where tasks failed or ran out of time.
set -euo pipefail
scans=$1
table=$2
here=$(cd "$(dirname "$0")" && pwd)

array=$(sbatch --parsable --array="1-${TASKS:-8}" "$here/task.sbatch" embed "$scans" -o "$table.parts" "${@:3}")
sbatch --dependency="afterany:$array" --job-name=brainfm-merge --cpus-per-task=1 --mem=8G \
    --wrap="${BRAINFM:-brainfm} $(printf '%q ' merge "$table.parts" -o "$table")"
