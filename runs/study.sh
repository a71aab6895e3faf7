#!/usr/bin/env bash
# The paper's comparison on one corpus: ten systems after equally many steps, all of equal compute
# per token but the paper's narrower dense model. Called by study-*.sh, which say what the corpus is:
#
#   WORK       folder of the results, one folder a system and seed; what is there is not done again
#   DATA       --data arguments with train, valid and test text
#   STEPS      of each training run
#   VOCAB      words of the vocabulary
#   TEACHING   sentences a direction that the teacher translates for its student
#   LIMIT      first test sentences of each direction that are scored
#   ZERO_SHOT  directions like de-fr,fr-de that are scored and not trained on, default none; not for
#              pruned models, which know the languages of the text that they were pruned by
#   HIGH_RESOURCE  sentence pairs from which on a direction is high-resource, default a million
#   SETTINGS   more arguments of every training: batches, learning rate; they go over those here
#   SIZES      more arguments that say the model's sizes, for all but the student, which has its
#              teacher's; D_FF and VOCAB say d_ff and vocab_size
#   D_FF       width of an expert, default 256
#   SEEDS      default "0 1 2"
#   ALL        the study's systems, default all ten
#   SYSTEMS    default ALL; some of them, to share the work between machines or cores
#   PHASES     default "prepare train test": text is prepared once, into WORK/set; test text is scored
#              once every system is trained for STEPS and has its score on the validation text
#
# With more STEPS a study goes on where it ended, under a schedule that does not fix them: not the
# cosine, which is the default here.
set -euo pipefail
python=${PYTHON:-python}
all=${ALL:-narrow dense token sentence target token-target static distilled pruned reaped}
systems=${SYSTEMS:-$all}
read -ra from <<< "$DATA"
data=(--data "$WORK/set")
settings=(--config tiny --steps "$STEPS" --set batch_tokens=1024 --set row_multiple=8
  --set schedule=cosine --set learning_rate=2e-3 --set warmup_steps=400
  --set checkpoint_every=1000 --set keep_checkpoints=1 ${SETTINGS:-})
sizes=(${SIZES:-})
width=${D_FF:-256}

prepare() {
  [ -f "$WORK/set/manifest.json" ] || "$python" -m taskmoe.wmt prepare "${from[@]}" \
    --out "$WORK/set" --set "vocab_size=$VOCAB"
}

at_end() { # folder of a training: whether it went on to STEPS; it exits where it cannot have so many
  local answer
  answer=$("$python" - "$1" "$STEPS" << 'ANSWER'
import json, pathlib, sys
folder, wanted = pathlib.Path(sys.argv[1]), int(sys.argv[2])
model = (folder / "model").is_dir()
if not model and not any(folder.glob("checkpoints/[0-9]*")):
    print("no")
    sys.exit()
try:
    path = folder / "config.json"
    fixed = json.loads(path.read_text())["train"].get("steps", wanted)
    path = folder / "log.jsonl"
    step = json.loads(path.read_text().splitlines()[-1])["step"] if model else 0
except (OSError, ValueError, LookupError, TypeError, AttributeError):
    sys.exit(f"{path} is damaged: mend it, or remove {folder} to train anew")
if fixed != wanted:
    sys.exit(f"{folder} is a training of {fixed} steps, which its schedule fixes, not of {wanted}: "
             f"give STEPS={fixed}, or another folder for the study")
print("yes" if step >= wanted else "no")
ANSWER
  ) || exit 2
  [ "$answer" = yes ]
}

ended() { # folder of a training: as at_end; where it did not, what was made of its model goes
  at_end "$1" && return 0
  rm -rf "$1/translations" "$1/test.json" "$1/valid.json" "$1/model"
  return 1
}

train() { # system, seed
  local to=$WORK/$1-$2 encoder=$1 decoder=$1
  local narrow=()
  [ "$1" = token-target ] && encoder=token decoder=target
  [ "$1" = narrow ] && encoder=dense decoder=dense &&
    narrow=(--set "encoder_wide_d_ff=$width" --set "decoder_wide_d_ff=$width")
  ended "$to" && return
  # What was made of a token-routed model is stale once that model goes on.
  [ "$1" != token ] || rm -rf "$WORK"/{pruned,reaped,distilled}-"$2"
  "$python" -m taskmoe.wmt train "${data[@]}" --workdir "$to" \
    --encoder "$encoder" --decoder "$decoder" --seed "$2" "${settings[@]}" \
    "${sizes[@]}" --set "d_ff=$width" --set "vocab_size=$VOCAB" "${narrow[@]}"
}

distilled() { # seed; the student is as wide as the dense model
  local to=$WORK/distilled-$1
  ended "$to" || "$python" -m taskmoe.wmt distill "${data[@]}" --workdir "$to" \
    --teacher "$WORK/token-$1" --beam 1 --seed "$1" "${settings[@]}" \
    --set "max_sentences=$TEACHING" \
    --set "encoder_wide_d_ff=$((2 * width))" --set "decoder_wide_d_ff=$((2 * width))"
}

pruned() { # system, seed, criterion; the highest 2 of 8 experts for each target language
  local pairs
  for pairs in $("$python" - "$WORK/token-$2/model/config.json" << 'PAIRS'
import json, sys
pairs = json.load(open(sys.argv[1]))["pairs"]
for language in dict.fromkeys(p.split("-")[1] for p in pairs):
    print(",".join(p for p in pairs if p.endswith("-" + language)))
PAIRS
  ); do
    local to=$WORK/$1-$2/${pairs##*-}
    [ -d "$to" ] || "$python" -m taskmoe.wmt prune --model "$WORK/token-$2" "${data[@]}" \
      --pairs "$pairs" --by "$3" --keep 2 --limit 300 --out "$to"
  done
}

models() { # system, seed: its folder, of a pruned system one a target language
  case $1 in
    pruned | reaped) printf '%s\n' "$WORK/$1-$2"/*/ ;;
    *) printf '%s\n' "$WORK/$1-$2" ;;
  esac
}

scored() { # system, seed: whether it is trained and has its scores on the validation text
  local model
  case $1 in
    pruned | reaped) ;;
    *) at_end "$WORK/$1-$2" || return 1 ;;
  esac
  for model in $(models "$1" "$2"); do
    [ -f "${model%/}/valid.json" ] || return 1
  done
}

pairs() { # model: directions that it is scored on; a pruned one knows the languages of its text only
  local config=$1/config.json
  [ -d "$1/model" ] && config=$1/model/config.json
  "$python" - "$config" "$1" "${ZERO_SHOT:-}" << 'PAIRS'
import json, sys
config, model, more = sys.argv[1:]
pairs = json.load(open(config))["pairs"]
whole = config.endswith("/model/config.json")
print(",".join(pairs + [p for p in more.split(",") if p and whole]))
PAIRS
}

evaluate() { # system, seed, split, beam; translations of the test text are kept for intervals
  local model keep
  for model in $(models "$1" "$2"); do
    model=${model%/}
    keep=()
    if [ "$3" = test ]; then
      keep=(--out "$model/translations")
      # The scores are written last, and say that the translations are whole.
      [ -d "$model/translations" ] || rm -f "$model/test.json"
    fi
    [ -f "$model/$3.json" ] ||
      "$python" -m taskmoe.wmt evaluate --model "$model" "${from[@]}" --split "$3" \
        --pairs "$(pairs "$model")" --limit "$LIMIT" --beam "$4" "${keep[@]}" \
        --high-resource "${HIGH_RESOURCE:-1000000}" --json "$model/$3.json"
  done
}

for seed in ${SEEDS:-0 1 2}; do
  for phase in ${PHASES:-prepare train test}; do
    if [ "$phase" = prepare ]; then
      prepare
      continue
    fi
    for system in $systems; do
      if [ "$phase" = train ]; then
        case $system in
          distilled) distilled "$seed" ;;
          pruned) pruned "$system" "$seed" load ;;
          reaped) pruned "$system" "$seed" reap ;;
          *) train "$system" "$seed" ;;
        esac
        evaluate "$system" "$seed" valid 1
      else
        for other in $all; do
          scored "$other" "$seed" || {
            echo "$other, seed $seed, is not trained for $STEPS steps and scored on the validation" \
              "text yet: the test text stays closed" >&2
            exit 2
          }
        done
        evaluate "$system" "$seed" test 4
      fi
    done
  done
done
