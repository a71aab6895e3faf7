#!/usr/bin/env bash
# The paper's comparison on WMT news and everyday sentences: 28 directions of 9 languages.
#
#   runs/study-news.sh NEWSTEST TATOEBA [WORKDIR]
#
# NEWSTEST holds train.{en,de,fr,es,cs} (13,071 lines, WMT test sets 2008 to 2012), whose last 500
# lines are the test text and the 500 before them for validation. TATOEBA holds train.en-XX.{en,XX}
# and valid.en-XX.{en,XX} (300 lines) for XX in cs de es fi fr it ru tr; the second half of each
# valid file is the test text. See study.sh for SEEDS and SYSTEMS. A study that was stopped goes on
# when the same command is given again.
set -euo pipefail
news=$(realpath "${1:?give the folder of newstest}")
tatoeba=$(realpath "${2:?give the folder of Tatoeba}")
export WORK=${3:-work/study-news}
mkdir -p "$WORK/data/news" "$WORK/data/tatoeba"
for language in en de fr es cs; do
  head -n 12071 "$news/train.$language" > "$WORK/data/news/train.$language"
  sed -n 12072,12571p "$news/train.$language" > "$WORK/data/news/valid.$language"
  tail -n +12572 "$news/train.$language" > "$WORK/data/news/test.$language"
done
for file in "$tatoeba"/valid.en-*; do
  name=${file##*/valid.}
  ln -sfn "$tatoeba/train.$name" "$WORK/data/tatoeba/train.$name"
  head -n 150 "$file" > "$WORK/data/tatoeba/valid.$name"
  tail -n +151 "$file" > "$WORK/data/tatoeba/test.$name"
done
export DATA="--data $WORK/data/news --data $WORK/data/tatoeba" STEPS=3000 VOCAB=6000
export TEACHING=500 LIMIT=100
"$(dirname "$0")/study.sh"
