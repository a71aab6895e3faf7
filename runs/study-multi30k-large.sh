#!/usr/bin/env bash
# The paper's comparison on Multi30k at d_model 512 with 32 experts, for a GPU: six systems, one seed,
# of 19 to 149 million parameters.
#
#   runs/study-multi30k-large.sh FOLDER [WORKDIR]
#
# FOLDER as for study-multi30k.sh, which this calls. STEPS (default 1250, 1.2 times the text), WARMUP
# (default STEPS / 8 + 1), SEEDS, SYSTEMS and PHASES are taken from the environment: several systems
# train side by side on one GPU, each in a process of its own with
# XLA_PYTHON_CLIENT_PREALLOCATE=false. On an H200 all six together took
# 80 seconds of steps, after they were compiled.
set -euo pipefail
export STEPS=${STEPS:-1250} VOCAB=8000 SEEDS=${SEEDS:-0} D_FF=2048
export ALL="narrow dense token target token-target static"
export SIZES="--set d_model=512 --set num_heads=8 --set num_experts=32"
export SETTINGS="--set compute_dtype=bfloat16 --set batch_tokens=16384 --set buckets=16,24,40
  --set learning_rate=1e-3 --set warmup_steps=${WARMUP:-$((STEPS / 8 + 1))}
  --set checkpoint_every=100000"
"$(dirname "$0")/study-multi30k.sh" "${1:?give the folder of Multi30k}" "${2:-work/study-large}"
