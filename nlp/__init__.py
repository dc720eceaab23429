"""RevCol-Transformer for fairseq: `fairseq-train DATA --user-dir nlp --arch revcol_transformer ...`.

The guide is docs/guides/translation-model.md.

With `--user-dir`, fairseq imports this package and then every module in `models`, which registers the model. It skips
both if a package of this name is already imported. In that case, import `nlp.models.revcol_transformer` to register the
model. This module does not import fairseq, which takes seconds.

Modules import each other by relative names, because a wheel installs this package as `revnets_nlp`: a top-level package
`nlp` would conflict with packages of users.
"""
