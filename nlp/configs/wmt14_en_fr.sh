#!/usr/bin/env bash
# WMT'14 English-French, from the download to BLEU. Run from anywhere:
#
#   wmt14_en_fr.sh [STEP [MODEL [BATCH]]]      # all revcol big, unless told otherwise
#
# STEP is prepare, train, average, generate, score, or all of them; MODEL is revcol or vanilla. The recipe is that of Ott
# et al. (2018), "Scaling Neural Machine Translation", which the RevCol paper follows. BATCH big, 8 GPUs x 16 batches x
# 5120 tokens an update, is what was published for this task; 8gpu has one batch an update and, as for English-German, a
# lower learning rate. Preparation takes hours, about 40 GB of disk, and 8 GB of memory or more.
# No end was published. MAX_UPDATE, from the environment or as here, is how far a log by the authors goes for big, and the
# 300,000 updates of Vaswani et al. (2017) for 8gpu. DATA and RUN, from the environment, name other folders.
TASK=wmt14_en_fr LANGUAGES=en-fr DATA=${DATA:-data-bin/wmt14_en_fr_bpe40k}
REVCOL=revcol_transformer_wmt_en_fr       # 209 M parameters
VANILLA=transformer_vaswani_wmt_en_fr_big # 221 M
DROPOUT=0.1 MAX_TOKENS=5120
LR_8GPU=0.0005 UPDATES_8GPU=300000
LR_BIG=0.0007 UPDATES_BIG=54000
source "$(dirname "${BASH_SOURCE[0]}")/wmt.sh"
