# Commands shared by wmt14_en_fr.sh and wmt16_en_de.sh, which set the variables used here and then source this file. Their
# headers explain the arguments.
set -euo pipefail

STEP=${1:-all} MODEL=${2:-revcol} BATCH=${3:-big}
RUN=${RUN:-runs/${TASK}_${MODEL}_$BATCH}
USER_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

case $MODEL in
  revcol) ARCH=$REVCOL ;;
  vanilla) ARCH=$VANILLA ;;
  *) echo "MODEL $MODEL: choose revcol or vanilla" >&2; exit 2 ;;
esac
case $BATCH in
  8gpu) LR=$LR_8GPU UPDATE_FREQ=1 MAX_UPDATE=${MAX_UPDATE:-$UPDATES_8GPU} ;;
  big) LR=$LR_BIG UPDATE_FREQ=16 MAX_UPDATE=${MAX_UPDATE:-$UPDATES_BIG} ;;
  *) echo "BATCH $BATCH: choose 8gpu or big" >&2; exit 2 ;;
esac

prepare() {
  revnets prepare-mt "$TASK" --output "$DATA"
}

train() {
  fairseq-train "$DATA" \
    --user-dir "$USER_DIR" --arch "$ARCH" --share-all-embeddings \
    --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 0.0 --weight-decay 0.0 \
    --lr "$LR" --lr-scheduler inverse_sqrt --warmup-updates 4000 --warmup-init-lr 1e-07 \
    --dropout "$DROPOUT" --criterion label_smoothed_cross_entropy --label-smoothing 0.1 \
    --max-tokens "$MAX_TOKENS" --update-freq $UPDATE_FREQ --max-update "$MAX_UPDATE" --fp16 \
    --ddp-backend legacy_ddp --keep-last-epochs 10 --save-dir "$RUN"
}

average() {
  revnets average-checkpoints "$RUN" --last 10 --output "$RUN/average.pt"
}

generate() {
  fairseq-generate "$DATA" \
    --user-dir "$USER_DIR" --path "$RUN/average.pt" --gen-subset test \
    --beam 4 --lenpen 0.6 --remove-bpe --max-tokens 8192 --required-batch-size-multiple 1 > "$RUN/test.out"
}

score() {
  revnets score-mt "$RUN/test.out" --language "${LANGUAGES#*-}" --test-set "wmt14/full:$LANGUAGES"
}

case $STEP in
  all) prepare; train; average; generate; score ;;
  prepare | train | average | generate | score) "$STEP" ;;
  *) echo "STEP $STEP: choose prepare, train, average, generate, score or all" >&2; exit 2 ;;
esac
