#!/usr/bin/env bash
# The paper's comparison on Multi30k, trained for longer: d_model 128, five systems and what is
# pruned out of one, one seed.
#
#   runs/study-multi30k-long.sh FOLDER [WORKDIR]
#
# FOLDER as for study-multi30k.sh, which this calls. The learning rate falls with the root of the
# step, so that a study that has ended goes on from its checkpoints with more STEPS. STEPS (default
# 34500, 8 epochs), SEEDS, SYSTEMS, ALL and PHASES are taken from the environment.
set -euo pipefail
export STEPS=${STEPS:-34500} SEEDS=${SEEDS:-0} ALL=${ALL:-narrow dense token target static pruned reaped}
export SETTINGS="--set batch_tokens=4096 --set buckets=12,16,20,24,32,48
  --set schedule=inverse_sqrt --set warmup_steps=1000 --set checkpoint_every=500"
"$(dirname "$0")/study-multi30k.sh" "${1:?give the folder of Multi30k}" "${2:-work/study-long}"
