#!/usr/bin/env bash
# WMT'16 English-German, from the download to BLEU. Run from anywhere:
#
#   wmt16_en_de.sh [STEP [MODEL [BATCH]]]      # all revcol big, unless told otherwise
#
# STEP is prepare, train, average, generate, score, or all of them; MODEL is revcol or vanilla. The recipe is that of Ott
# et al. (2018), "Scaling Neural Machine Translation", which the RevCol paper follows. BATCH 8gpu is 8 GPUs x 3584 tokens
# an update; big is the same 8 GPUs with 16 batches an update and twice the learning rate, and translates better.
# No end was published. MAX_UPDATE, from the environment or as here, is the 300,000 updates of Vaswani et al. (2017), or as
# many words in big batches. DATA and RUN, from the environment, name other folders.
TASK=wmt16_en_de LANGUAGES=en-de DATA=${DATA:-data-bin/wmt16_en_de_bpe32k}
REVCOL=revcol_transformer_wmt_en_de       # 200 M parameters
VANILLA=transformer_vaswani_wmt_en_de_big # 209 M; transformer_wmt_en_de_big would add attention dropout
DROPOUT=0.3 MAX_TOKENS=3584
LR_8GPU=0.0005 UPDATES_8GPU=300000
LR_BIG=0.001 UPDATES_BIG=18000
source "$(dirname "${BASH_SOURCE[0]}")/wmt.sh"
