#!/usr/bin/env bash
# WMT'14 English-French, from the download to BLEU. Run from anywhere:
#
#   wmt14_en_fr.sh [STEP [MODEL [BATCH]]]      # default: all revcol big
#
# STEP is prepare, train, average, generate, score, or all. MODEL is revcol or vanilla. The recipe is that of Ott et al.
# (2018), "Scaling Neural Machine Translation", which the RevCol paper follows. BATCH big uses 8 GPUs x 16 batches x 5120
# tokens per update, as published for this task. 8gpu uses one batch per update and, as for English-German, a lower
# learning rate. Preparation takes hours, about 40 GB of disk space and at least 8 GB of memory.
# The number of updates is not published. MAX_UPDATE defaults to the last update in a log of the authors for big, and to
# the 300,000 updates of Vaswani et al. (2017) for 8gpu. The environment variables MAX_UPDATE, DATA and RUN override the
# number of updates and the directories.
TASK=wmt14_en_fr LANGUAGES=en-fr DATA=${DATA:-data-bin/wmt14_en_fr_bpe40k}
REVCOL=revcol_transformer_wmt_en_fr       # 209 M parameters
VANILLA=transformer_vaswani_wmt_en_fr_big # 221 M
DROPOUT=0.1 MAX_TOKENS=5120
LR_8GPU=0.0005 UPDATES_8GPU=300000
LR_BIG=0.0007 UPDATES_BIG=54000
source "$(dirname "${BASH_SOURCE[0]}")/wmt.sh"
