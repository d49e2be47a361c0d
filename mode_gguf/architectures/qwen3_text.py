"""The decoder of Qwen3 with experts, which several vision-language models have under names of their own."""

from mode_gguf.architectures.experts import FusedTransform, expert_rules
from mode_gguf.architectures.family import TensorRule
from mode_gguf.architectures.tensors import Role


def text_rules(model: str, head: str, experts: FusedTransform) -> tuple[TensorRule, ...]:
    """Tensors of the text model, in file order.

    Args:
        model: the checkpoint's name of it, without the output head.
        head: that of the output head.
        experts: takes fused experts apart.
    """
    layer = f"{model}.layers.{{layer}}"

    def attention(source: str, name: str) -> TensorRule:
        name = f"blk.{{layer}}.{name}.weight"
        return TensorRule(f"{layer}.self_attn.{source}.weight", name, Role.DENSE, activation=name)

    def keep(source: str, name: str) -> TensorRule:
        return TensorRule(f"{layer}.{source}.weight", f"blk.{{layer}}.{name}.weight", Role.KEEP)

    return (
        TensorRule(f"{model}.embed_tokens.weight", "token_embd.weight", Role.EMBEDDING),
        keep("input_layernorm", "attn_norm"),
        attention("q_proj", "attn_q"),
        attention("k_proj", "attn_k"),
        attention("v_proj", "attn_v"),
        attention("o_proj", "attn_output"),
        keep("self_attn.q_norm", "attn_q_norm"),
        keep("self_attn.k_norm", "attn_k_norm"),
        keep("post_attention_layernorm", "ffn_norm"),
        keep("mlp.gate", "ffn_gate_inp"),
        *expert_rules(layer, experts),
        TensorRule(f"{model}.norm.weight", "output_norm.weight", Role.KEEP),
        TensorRule(f"{head}.weight", "output.weight", Role.OUTPUT, activation="output.weight"),
    )
