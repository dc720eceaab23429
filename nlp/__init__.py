"""RevCol-Transformer for fairseq: `fairseq-train DATA --user-dir nlp --arch revcol_transformer ...`.

The guide is docs/guides/translation-model.md.

fairseq imports this folder when it is named by `--user-dir`, and then every module of its folder `models`, which
registers the model. It skips both if a package of this name is imported already: `import nlp.models.revcol_transformer`
registers the model then, and `nlp.model`, its former path. This module does not import fairseq, which takes seconds.

Modules here import each other by relative names, because a wheel installs the folder as `revnets_nlp`: a top-level
package `nlp` would be in the way of everybody's own.
"""
