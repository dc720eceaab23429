#!/usr/bin/env bash
# WMT'16 English-German, from the download to BLEU. Run from anywhere:
#
#   wmt16_en_de.sh STEP [MODEL [BATCH]]        # revcol or vanilla; 8gpu or big
#
# STEP is prepare, train, average, generate, score, or all of them. The recipe is that of Ott et al. (2018), "Scaling
# Neural Machine Translation", which the RevCol paper follows. BATCH 8gpu is 8 GPUs x 3584 tokens an update; big is the
# same 8 GPUs with 16 batches an update and twice the learning rate, and translates better.
# No end was published. MAX_UPDATE, from the environment or as here, is the 300,000 updates of Vaswani et al. (2017), or as
# many words in big batches.
set -euo pipefail

STEP=${1:-all} MODEL=${2:-revcol} BATCH=${3:-big}
DATA=${DATA:-data-bin/wmt16_en_de_bpe32k}
RUN=${RUN:-runs/wmt16_en_de_${MODEL}_$BATCH}
USER_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

case $MODEL in
  revcol) ARCH=revcol_transformer_wmt_en_de ;; # 200 M parameters
  vanilla) ARCH=transformer_wmt_en_de_big ;;   # 209 M
  *) echo "MODEL $MODEL: choose revcol or vanilla" >&2; exit 2 ;;
esac
case $BATCH in
  8gpu) LR=0.0005 UPDATE_FREQ=1 MAX_UPDATE=${MAX_UPDATE:-300000} ;;
  big) LR=0.001 UPDATE_FREQ=16 MAX_UPDATE=${MAX_UPDATE:-18000} ;;
  *) echo "BATCH $BATCH: choose 8gpu or big" >&2; exit 2 ;;
esac

prepare() {
  revnets prepare-mt wmt16_en_de --output "$DATA"
}

train() {
  fairseq-train "$DATA" \
    --user-dir "$USER_DIR" --arch $ARCH --share-all-embeddings \
    --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 0.0 --weight-decay 0.0 \
    --lr $LR --lr-scheduler inverse_sqrt --warmup-updates 4000 --warmup-init-lr 1e-07 \
    --dropout 0.3 --criterion label_smoothed_cross_entropy --label-smoothing 0.1 \
    --max-tokens 3584 --update-freq $UPDATE_FREQ --max-update $MAX_UPDATE --fp16 \
    --ddp-backend legacy_ddp --keep-last-epochs 10 --save-dir "$RUN"
}

average() {
  revnets average-checkpoints "$RUN" --last 10 --output "$RUN/average.pt"
}

generate() {
  fairseq-generate "$DATA" \
    --user-dir "$USER_DIR" --path "$RUN/average.pt" --gen-subset test \
    --beam 4 --lenpen 0.6 --remove-bpe --max-tokens 8192 > "$RUN/test.out"
}

score() {
  revnets score-mt "$RUN/test.out" --language de --test-set wmt14/full:en-de
}

case $STEP in
  all) prepare; train; average; generate; score ;;
  prepare | train | average | generate | score) "$STEP" ;;
  *) echo "STEP $STEP: choose prepare, train, average, generate, score or all" >&2; exit 2 ;;
esac
