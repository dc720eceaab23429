#!/usr/bin/env bash
# WMT'16 English-German, from the download to BLEU. Run from anywhere:
#
#   wmt16_en_de.sh [STEP [MODEL [BATCH]]]      # default: all revcol big
#
# STEP is prepare, train, average, generate, score, or all. MODEL is revcol or vanilla. The recipe is that of Ott et al.
# (2018), "Scaling Neural Machine Translation", which the RevCol paper follows. BATCH 8gpu uses 8 GPUs x 3584 tokens per
# update. big uses the same 8 GPUs with 16 batches per update and twice the learning rate, and translates better.
# The number of updates is not published. MAX_UPDATE defaults to the 300,000 updates of Vaswani et al. (2017), or to the
# same number of tokens in big batches. The environment variables MAX_UPDATE, DATA and RUN override the number of updates
# and the directories.
TASK=wmt16_en_de LANGUAGES=en-de DATA=${DATA:-data-bin/wmt16_en_de_bpe32k}
REVCOL=revcol_transformer_wmt_en_de       # 200 M parameters
VANILLA=transformer_vaswani_wmt_en_de_big # 209 M; transformer_wmt_en_de_big would add attention dropout
DROPOUT=0.3 MAX_TOKENS=3584
LR_8GPU=0.0005 UPDATES_8GPU=300000
LR_BIG=0.001 UPDATES_BIG=18000
source "$(dirname "${BASH_SOURCE[0]}")/wmt.sh"
