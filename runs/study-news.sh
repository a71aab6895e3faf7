#!/usr/bin/env bash
# The paper's comparison on WMT news and everyday sentences: English to and from 8 languages, 16
# directions of very different sizes, and German to and from French, which nothing is trained on.
#
#   runs/study-news.sh NEWSTEST TATOEBA [WORKDIR]
#
# NEWSTEST holds train.{en,de,fr,es,cs} (13,071 lines, WMT test sets 2008 to 2012), whose last 100
# lines are test text and the 100 before them for validation. TATOEBA holds train.en-XX.{en,XX} and
# valid.en-XX.{en,XX} (300 lines) for XX in cs de es fi fr it ru tr; the second half of each valid
# file is test text. See study.sh for SEEDS and SYSTEMS. A study that was stopped goes on when the
# same command is given again. Directions with de, es, fr and cs have news and everyday sentences,
# 24,600 to 29,400 before cleaning, and are high-resource here; those with ru, it, tr and fi have
# 9,900 to 18,200. The table:
#
#   python -m taskmoe.bench study WORKDIR --data WORKDIR/data/news --data WORKDIR/data/tatoeba \
#     --high-resource 20000
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
for side in de fr; do # news is multi-parallel: the same sentences as above
  sed -n 12872,12971p "$news/train.$side" > "$WORK/data/news/valid.de-fr.$side"
  tail -n +12972 "$news/train.$side" > "$WORK/data/news/test.de-fr.$side"
done
for file in "$tatoeba"/valid.en-*; do
  name=${file##*/valid.}
  ln -sfn "$tatoeba/train.$name" "$WORK/data/tatoeba/train.$name"
  head -n 150 "$file" > "$WORK/data/tatoeba/valid.$name"
  tail -n +151 "$file" > "$WORK/data/tatoeba/test.$name"
done
export DATA="--data $WORK/data/news --data $WORK/data/tatoeba" STEPS=${STEPS:-8000} VOCAB=${VOCAB:-6000}
export TEACHING=${TEACHING:-5000} LIMIT=${LIMIT:-250} ZERO_SHOT=de-fr,fr-de HIGH_RESOURCE=20000
"$(dirname "$0")/study.sh"
