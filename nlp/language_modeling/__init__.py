"""A decoder-only language model of reversible columns, for Hugging Face transformers.

    from nlp.language_modeling import RevColForCausalLM, RevColLMConfig

registers both, so that `AutoModelForCausalLM.from_pretrained` finds the model in a folder. A wheel has this package as
`revnets_nlp.language_modeling`. It needs transformers (`pip install 'revnets[lm]'`), but not fairseq.
"""

try:
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("the language model needs transformers: pip install 'revnets[lm]'") from error

from .configuration import RevColLMConfig as RevColLMConfig
from .modeling import RevColForCausalLM as RevColForCausalLM
from .modeling import RevColLMModel as RevColLMModel
