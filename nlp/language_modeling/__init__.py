"""Decoder-only language model of reversible columns for Hugging Face transformers.

    from nlp.language_modeling import RevColForCausalLM, RevColLMConfig

This import registers both classes, so `AutoModelForCausalLM.from_pretrained` can load the model from a directory. In a
wheel, the package is `revnets_nlp.language_modeling`. It needs transformers (`pip install 'revnets[lm]'`), not fairseq.
"""

try:
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("the language model needs transformers: pip install 'revnets[lm]'") from error

from .configuration import RevColLMConfig as RevColLMConfig
from .modeling import RevColForCausalLM as RevColForCausalLM
from .modeling import RevColLMModel as RevColLMModel
