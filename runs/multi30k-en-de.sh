#!/usr/bin/env bash
# English to German on Multi30k: a small dense model, scored on the whole validation set, of which
# the first 400 sentences also choose the checkpoint.
#
#   runs/multi30k-en-de.sh FOLDER [WORKDIR]
#
# FOLDER holds train.en, train.de, val.en and val.de (29,000 and 1,014 lines). A run that was stopped
# goes on where it was when the same command is given again.
set -euo pipefail
data=${1:?give the folder of Multi30k: train.en, train.de, val.en, val.de}
work=${2:-work/multi30k-en-de}
python=${PYTHON:-python}

"$python" -m taskmoe.wmt train --data "$data" --pairs en-de --workdir "$work" \
  --config tiny --encoder dense --decoder dense --steps 6000 \
  --set encoder_layers=3 --set decoder_layers=3 --set dropout=0.2 \
  --set schedule=cosine --set warmup_steps=400 --set checkpoint_every=500 --set row_multiple=8 \
  --validate-every 500 --validate-sentences 400
"$python" -m taskmoe.wmt evaluate --model "$work/best" --data "$data" --pairs en-de \
  --split valid --beam 4 --json "$work/valid.json"
