#!/usr/bin/env bash
# The paper's comparison on Multi30k: image captions in four languages, 12 directions.
#
#   runs/study-multi30k.sh FOLDER [WORKDIR]
#
# FOLDER holds train.{en,de,fr,cs} (29,000 lines) and val.{en,de,fr,cs} (1,014 lines). The first half
# of val is for validation, the second half is the test text. See study.sh for what the environment
# may set, SEEDS and SYSTEMS among it. A study that was stopped goes on when the same command is
# given again.
set -euo pipefail
from=$(realpath "${1:?give the folder of Multi30k}")
export WORK=${2:-work/study-multi30k}
mkdir -p "$WORK/data"
for language in en de fr cs; do
  ln -sfn "$from/train.$language" "$WORK/data/train.$language"
  head -n 507 "$from/val.$language" > "$WORK/data/valid.$language"
  tail -n +508 "$from/val.$language" > "$WORK/data/test.$language"
done
export DATA="--data $WORK/data" STEPS=${STEPS:-6000} VOCAB=${VOCAB:-4000} TEACHING=${TEACHING:-10000} LIMIT=${LIMIT:-250}
"$(dirname "$0")/study.sh"
