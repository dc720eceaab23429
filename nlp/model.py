"""Former path of `nlp.models.revcol_transformer`."""

from .models.revcol_transformer import RevColTransformerModel as RevColTransformerModel
