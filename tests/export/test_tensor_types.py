import re

from mode_gguf.export.tensor_types import tensor_types_text
from mode_gguf.quantization.types import QUANT_TYPES


def test_lines_match_their_tensor_and_no_other() -> None:
    types = {
        "blk.7.ffn_down_exps.weight": QUANT_TYPES["Q3_K"],
        "token_embd.weight": QUANT_TYPES["Q8_0"],
        "output.weight": QUANT_TYPES["BF16"],
        "blk.7.ffn_up_exps.weight": QUANT_TYPES["IQ2_XXS"],
    }
    lines = tensor_types_text(types).splitlines()
    assert lines[0] == r"^blk\.7\.ffn_down_exps\.weight$=q3_K"
    assert [line.rpartition("=")[2] for line in lines] == ["q3_K", "q8_0", "bf16", "iq2_xxs"]
    patterns = [line.rpartition("=")[0] for line in lines]
    names = [*types, "blk.17.ffn_down_exps.weight", "blk.7xffn_down_exps.weight", "v.output.weight"]
    assert [[name for name in names if re.search(pattern, name)] for pattern in patterns] == [[n] for n in types]
    assert all(pattern == pattern.lower() for pattern in patterns), "llama-quantize lower-cases patterns"


def test_no_types_no_lines() -> None:
    assert tensor_types_text({}) == ""
