"""Which parameters of each policy `loss` leaves without gradient (None or exactly zero): facts of the architectures."""

import re


def idle_parameters(policy) -> list[str]:
    """Their names."""
    return {"smolvla": _smolvla, "pi0": _pi, "pi05": _pi, "burnish_discrete": _discrete}[policy.name](policy)


def _pi(policy) -> list[str]:
    """Both heads, the language model's final norm, and what follows keys and values in its last layer."""
    pattern = re.compile(
        r"policy\.model\.paligemma_with_expert\.(gemma_expert\.lm_head\.|paligemma\.(lm_head\.|"
        rf"model\.language_model\.(norm\.|layers\.{policy.num_layers - 1}\."
        r"(self_attn\.(q|o)_proj|post_attention_layernorm|mlp)\.)))"
    )
    return [name for name, _ in policy.named_parameters() if pattern.match(name)]


def _smolvla(policy) -> list[str]:
    """The head, the final norm, and what follows keys and values in the last layer that an expert layer reads."""
    inner = policy.policy.model.vlm_with_expert
    stride = inner.num_vlm_layers // inner.num_expert_layers
    last = (inner.num_vlm_layers - 1) // stride * stride
    layer = r"model\.text_model\.layers\."
    beyond = "|".join(str(i) for i in range(last + 1, inner.num_vlm_layers)) or "none"
    pattern = re.compile(
        rf"lm_head\.|model\.text_model\.norm\.|{layer}({beyond})\.|"
        rf"{layer}{last}\.(self_attn\.(q|o)_proj|post_attention_layernorm|mlp)\."
    )
    prefix = "policy.model.vlm_with_expert.vlm."
    return [n for n, _ in policy.named_parameters() if n.startswith(prefix) and pattern.match(n.removeprefix(prefix))]


def _discrete(policy) -> list[str]:
    """The head of the language model: actions have their own."""
    head = policy.vlm.get_output_embeddings().weight
    shared = policy.vlm.get_input_embeddings().weight is head
    return [name for name, p in policy.named_parameters() if p is head and not shared]
