"""The plan in the words of stock llama-quantize: one `pattern=type` per line for --tensor-type-file."""

import re
from collections.abc import Mapping

from mode_gguf.quantization.types import QuantType


def tensor_types_text(types: Mapping[str, QuantType]) -> str:
    r"""Lines such as `^blk\.7\.ffn_down_exps\.weight$=q3_K`.

    llama-quantize takes the part before `=` for an unanchored regular expression, hence the anchors. It lower-cases
    names, which GGUF names are already, and compares types in any case.
    """
    return "".join(f"^{re.escape(name)}$={_spelling(quant_type)}\n" for name, quant_type in types.items())


def _spelling(quant_type: QuantType) -> str:
    """ggml's own spelling: q3_K, q8_0, iq2_xxs, bf16."""
    return quant_type.name.lower().replace("_k", "_K")
