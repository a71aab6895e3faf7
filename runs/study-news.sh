#!/usr/bin/env bash
# The paper's comparison on WMT news and everyday sentences: English to and from 8 languages, 16
# directions of very different sizes.
#
#   runs/study-news.sh NEWSTEST TATOEBA [WORKDIR]
#
# NEWSTEST holds train.{en,de,fr,es,cs} (13,071 lines, WMT test sets 2008 to 2012), whose last 100
# lines are test text and the 100 before them for validation. TATOEBA holds train.en-XX.{en,XX} and
# valid.en-XX.{en,XX} (300 lines) for XX in cs de es fi fr it ru tr; the second half of each valid
# file is test text. See study.sh for SEEDS and SYSTEMS. A study that was stopped goes on when the
# same command is given again.
set -euo pipefail
news=$(realpath "${1:?give the folder of newstest}")
tatoeba=$(realpath "${2:?give the folder of Tatoeba}")
export WORK=${3:-work/study-news}
mkdir -p "$WORK/data/news" "$WORK/data/tatoeba"
for language in de fr es cs; do
  for side in en "$language"; do
    name=en-$language.$side
    head -n 12871 "$news/train.$side" > "$WORK/data/news/train.$name"
    sed -n 12872,12971p "$news/train.$side" > "$WORK/data/news/valid.$name"
    tail -n +12972 "$news/train.$side" > "$WORK/data/news/test.$name"
  done
done
for file in "$tatoeba"/valid.en-*; do
  name=${file##*/valid.}
  ln -sfn "$tatoeba/train.$name" "$WORK/data/tatoeba/train.$name"
  head -n 150 "$file" > "$WORK/data/tatoeba/valid.$name"
  tail -n +151 "$file" > "$WORK/data/tatoeba/test.$name"
done
export DATA="--data $WORK/data/news --data $WORK/data/tatoeba" STEPS=8000 VOCAB=6000
export TEACHING=5000 LIMIT=250
"$(dirname "$0")/study.sh"
