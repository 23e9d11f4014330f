"""LeRobot's flow-matching models taken apart, for an executor that runs them in an order of its own.

Nothing is copied: the parts are the very modules of the policy, so trained weights and adapters are seen at once.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from burnish.core.errors import BurnishError


@dataclass(frozen=True)
class FlowParts:
    """A flow-matching model on a vision-language model, as an executor needs it.

    Args:
        family: "smolvla" or "pi", how its layers are run.
        kind: LeRobot's name of its type.
        chunk_size, width: T and A_model of the noise.
        steps: Euler steps of its config.
        heads, kv_heads, head_dim: of attention, alike in language model and expert.
        periods: shortest and longest of the sine-cosine embedding of time.
        embed_image: [B, 3, H, W] to [B, n, D].
        embed_text: long [B, n] to [B, n, D].
        text_layers: of the language model.
        expert_layers: for each of those the expert's beside it, or None.
        crosses: for each of those whether the expert only reads the language model's keys (SmolVLA).
        expert_norm: the expert's last norm.
        adaptive: whether time enters through the norms (pi05) and not beside the actions.
        prefix_length: least positions of a prefix, filled up with padding (SmolVLA).
        image_marks: token ids before and after each image (SmolVLA).
        rotary: of language model and expert (pi0, pi05).
        sample: LeRobot's own sampler, of inputs and noise.
        model: LeRobot's module, whose weights all of this is.
    """

    family: str
    kind: str
    chunk_size: int
    width: int
    steps: int
    heads: int
    kv_heads: int
    head_dim: int
    periods: tuple[float, float]
    embed_image: Callable[[Tensor], Tensor]
    embed_text: Callable[[Tensor], Tensor]
    text_layers: Sequence[nn.Module]
    expert_layers: Sequence[nn.Module | None]
    crosses: tuple[bool, ...]
    expert_norm: nn.Module
    adaptive: bool
    model: Any
    sample: Callable[..., Tensor]
    prefix_length: int = 0
    image_marks: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    rotary: tuple[nn.Module, ...] = ()

    # LeRobot's projections, asked for by name each time: an adapter stands in the place of the layer that it adapts.

    @property
    def action_in(self) -> Any:
        return self.model.action_in_proj

    @property
    def action_out(self) -> Any:
        return self.model.action_out_proj

    @property
    def time_in(self) -> Any:
        return self.model.time_mlp_in if self.adaptive else self.model.action_time_mlp_in

    @property
    def time_out(self) -> Any:
        return self.model.time_mlp_out if self.adaptive else self.model.action_time_mlp_out

    @property
    def state_in(self) -> Any:
        """pi05 has none: its state is in the text."""
        return self.model.state_proj

    def in_bf16(self) -> "FlowParts":
        """Parts of a copy whose language model, vision tower and expert are in bf16; time, norms and what reads and
        writes actions stay in float32.
        """
        model = copy.deepcopy(self.model)
        if self.family == "pi":
            model.paligemma_with_expert.to_bfloat16_for_selected_params("bfloat16")
            model.paligemma_with_expert.paligemma.model.vision_tower.to(torch.bfloat16)
            model.paligemma_with_expert.paligemma.model.multi_modal_projector.to(torch.bfloat16)
        else:
            model.vlm_with_expert.to(torch.bfloat16)
        return flow_parts(self.kind, model)


def flow_parts(kind: str, model: nn.Module) -> FlowParts:
    """The parts of the model in LeRobot's SmolVLAPolicy, PI0Policy or PI05Policy; `kind` is its type's name."""
    if kind not in _MAKERS:
        raise BurnishError(f"a policy of type '{kind}' to be run by the executor", f"one of {', '.join(_MAKERS)}")
    return _MAKERS[kind](kind, model)


def _smolvla(kind: str, model: Any) -> FlowParts:
    joint, config = model.vlm_with_expert, model.config
    text_config = joint.vlm.config.text_config
    text, expert = joint.get_model_layers([joint.get_vlm_model().text_model, joint.lm_expert])
    every, cross = joint.self_attn_every_n_layers, "cross" in joint.attention_mode
    marks = (tuple(model.global_image_start_token.tolist()), tuple(model.image_end_token.tolist()))
    return FlowParts(
        family="smolvla", kind=kind, chunk_size=config.chunk_size, width=config.max_action_dim, steps=config.num_steps,
        heads=joint.num_attention_heads, kv_heads=joint.num_key_value_heads, head_dim=text_config.head_dim,
        periods=(config.min_period, config.max_period), embed_image=joint.embed_image,
        embed_text=joint.embed_language_tokens, text_layers=text, expert_layers=expert,
        crosses=tuple(cross and not (every > 0 and i % every == 0) for i in range(len(text))),
        expert_norm=joint.lm_expert.norm, adaptive=False, model=model, sample=_sampler(model),
        prefix_length=model.prefix_length,
        image_marks=marks if model.add_image_special_tokens else ((), ()),
    )  # fmt: skip


def _pi(kind: str, model: Any) -> FlowParts:
    joint, config, adaptive = model.paligemma_with_expert, model.config, kind == "pi05"
    text, expert = joint.paligemma.model.language_model, joint.gemma_expert.model
    attention = expert.layers[0].self_attn
    return FlowParts(
        family="pi", kind=kind, chunk_size=config.chunk_size, width=config.max_action_dim,
        steps=config.num_inference_steps, heads=expert.config.num_attention_heads,
        kv_heads=expert.config.num_key_value_heads, head_dim=attention.head_dim,
        periods=(config.min_period, config.max_period), embed_image=joint.embed_image,
        embed_text=joint.embed_language_tokens, text_layers=list(text.layers), expert_layers=list(expert.layers),
        crosses=(False,) * len(text.layers), expert_norm=expert.norm, adaptive=adaptive, model=model,
        sample=_sampler(model), rotary=(text.rotary_emb, expert.rotary_emb),
    )  # fmt: skip


def _sampler(model: Any) -> Callable[..., Tensor]:
    """LeRobot's own method, whatever stands in its place by now: LeRobot's compiled one, the plug-in's."""
    own = inspect.unwrap(type(model).sample_actions)

    def sample(inputs: Sequence[Any], noise: Tensor) -> Tensor:
        with torch.no_grad():
            return own(model, *inputs, noise=noise)

    return sample


_MAKERS: dict[str, Callable[[str, Any], FlowParts]] = {"smolvla": _smolvla, "pi0": _pi, "pi05": _pi}
