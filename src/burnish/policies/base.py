"""The four verbs of a policy, `capture`, and what else a policy may be able to do.

No method may reach round them into a model. What only some policies can do has a name in CAPABILITIES: a policy
declares it, a method asks `policy.supports(name)` or calls `require`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from burnish.core.errors import BurnishError
from burnish.core.types import Batch, Chunk, Draws, LanguageLoss, PolicyLoss, Window
from burnish.policies.parts import FlowParts
from burnish.sampling.token_model import TokenModel


def recompute(owner: nn.Module, name: str = "forward") -> Callable[[], None]:
    """From now on calls of `owner.name` keep their inputs alone; the backward pass runs them again for the rest.

    Values and gradients stay the same. A call that fills a cache of keys and values is left as it is: run twice, it
    would fill it twice. What is returned takes it back.
    """
    plain, before = getattr(type(owner), name), vars(owner).get(name)

    def again(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or kwargs.get("past_key_values") is not None:
            return plain(self, *args, **kwargs)
        return checkpoint(partial(plain, self), *args, use_reentrant=False, **kwargs)

    setattr(owner, name, MethodType(again, owner))  # a bound method, so that a deep copy runs its own weights
    return partial(delattr, owner, name) if before is None else partial(setattr, owner, name, before)


@contextmanager
def recomputing(policy: Any) -> Iterator[None]:
    """Inside, `policy.recompute()` holds, and afterwards what held before."""
    undo = policy.recompute()
    try:
        yield
    finally:
        for one in undo:
            one()


CAPABILITIES: dict[str, tuple[str, str]] = {
    "score": ("log-probability of its actions", "a flow-matching or token policy"),
    "likelihood": (
        "exact log-probability of its actions",
        "openvla, or an autoregressive or parallel burnish_discrete",
    ),
    "language": ("language model that answers questions", "a policy on a vision-language model"),
    "capture": ("hidden states of a backbone", "a policy on a vision-language model"),
    "velocity": ("velocity field", "a flow-matching policy: smolvla, pi0 or pi05"),
    "tokens": ("action tokens", "openvla or a burnish_discrete policy"),
    "masked_diffusion": ("masked tokens", "a burnish_discrete policy trained by diffusion"),
    "runtime": ("model that the executor can run", "smolvla, pi0 or pi05"),
    "steering": ("way to go on from an old chunk", "a flow-matching policy: smolvla, pi0 or pi05"),
    "carry": ("way to go on with tokens of its last chunk", "a burnish_discrete policy of binned tokens with MASK"),
    "prefix": ("way to continue actions that are committed", "a flow-matching policy, openvla or burnish_discrete"),
}
"""What a policy may be able to do: its name, what a policy without it lacks, and which policies have it.

score: `score`, `scores`. likelihood: `score` is exact, so that draws change nothing. language: `language`, `answer`,
`view_tokens`. capture: `capture`. velocity: `velocity`, `to_model`. tokens: `token_model`, `token_actions`, `decoder`,
`watch_tokens`, `token_logits`, `act(stream=)`. masked_diffusion: trained on partly hidden tokens. runtime:
`flow_parts`, `begin`, `finish`, `set_steps`, `sampler`. steering: `act(steering=)`, `candidates`, `Chunk.raw`,
`rtc_training_max_delay`. prefix: `act(prefix=)`. carry: `act(until=, carry=)`, `Chunk.tokens`.
"""


ADAPTER_TARGETS = (
    r".*\.(q_proj|k_proj|v_proj|o_proj|out_proj|gate_proj|up_proj|down_proj|fc1|fc2"
    r"|state_proj|action_in_proj|action_out_proj|action_time_mlp_in|action_time_mlp_out|time_mlp_in|time_mlp_out)"
)
"""Attention, MLP and action projections."""


@dataclass
class Captured:
    """Hidden states of the forward that ran inside `capture`.

    Args:
        hidden: layer index to [B, S, D], the output of that backbone layer (0 is the first layer's output).
        layout: what the S positions hold: "image", "text", "state" to a bool [B, S] (padding False everywhere).
        cameras: camera name to the slice of S that holds its image tokens.
    """

    hidden: dict[int, Tensor] = field(default_factory=dict)
    layout: dict[str, Tensor] = field(default_factory=dict)
    cameras: dict[str, slice] = field(default_factory=dict)


@dataclass
class TokenForward:
    """The forward of a `loss` that ran inside `watch_tokens`.

    Args:
        ids: [B, L] true tokens.
        hidden: bool [B, L], those that the model did not see.
        weight: [B, L] of each token's loss.
        logits: [B, L, V], with gradient.
    """

    ids: Tensor
    hidden: Tensor
    weight: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Stage:
    """A call inside `act` that a profiler may time.

    Args:
        name: preprocess, vision, prompt, pass, head or postprocess. The prompt's call counts as such once, later ones
            are passes; inside a pass it is part of that.
        owner: object whose attribute is called; a module's `forward` will do.
        call: the attribute.
    """

    name: str
    owner: Any
    call: str


class Policy(nn.Module, ABC):
    """A policy as the rest of burnish sees it.

    Batches are in environment units with raw instructions (see core.types); a policy normalises and tokenises
    inside its verbs.

    Attributes:
        name: LeRobot's name of its type, e.g. smolvla.
        capabilities: names from CAPABILITIES (or a package's own), see `supports`.
        cameras: names of its cameras.
        chunk_size: T, actions in a chunk of the training data.
        n_action_steps: actions of a chunk to execute before asking again.
        window: which observations it sees, and where its chunks begin.
        adapter_targets: regular expression over the linear layers that adapters go to by default.
        whole_parts: names of modules that adapters leave out and a run with adapters trains whole.
        image_size: side of the images it was trained on, in pixels.
        input_size: longest edge to which it resizes its images; 0 where it takes them as they are.
        sampler: of a flow-matching policy, a name of sampling.solvers that `act` uses; "" for its config's own.
        action_dim: A.
        state_dim: dimensions of the state.
        num_layers: layers of the backbone.
        rtc_training_max_delay: of a policy that supports "steering", the greatest delay that `loss` trains it to go on
            from; 0 for plain training.
    """

    name: str = ""
    capabilities: frozenset[str] = frozenset()
    cameras: tuple[str, ...]
    chunk_size: int
    n_action_steps: int
    image_size: int
    input_size: int = 0
    window: Window = Window()
    adapter_targets: str = ADAPTER_TARGETS
    whole_parts: tuple[str, ...] = ()
    sampler: str = ""
    action_dim: int
    state_dim: int
    num_layers: int
    rtc_training_max_delay: int = 0

    @property
    def view_sizes(self) -> dict[str, tuple[int, int]]:
        """(height, width) of the images that it was trained on, by camera."""
        return {camera: (self.image_size, self.image_size) for camera in self.cameras}

    @property
    def act_steps(self) -> int:
        """Actions that `act` returns, the present step's first."""
        return self.chunk_size

    def supports(self, capability: str) -> bool:
        """Whether this policy can do what `capability` (see CAPABILITIES) stands for."""
        return capability in self.capabilities

    @abstractmethod
    def loss(self, batch: Batch, draws: Draws | None = None) -> PolicyLoss:
        """Imitation loss of one forward; without `draws` they are drawn by `draw` with the module's generator."""

    def score(self, batch: Batch, actions: Tensor, draws: Draws) -> Tensor:
        """[B] log-probability of `actions` [B, T, A] or its surrogate (higher is likelier), with gradient."""
        raise lacks(self, "score", "score")

    def scores(self, batch: Batch, candidates: Tensor, draws: Draws) -> Tensor:
        """`score` of several chunks for each observation, on several draws, kept apart: [B, C, K], with gradient.

        This one asks `score` C times K times; a policy that can encode the observation once does so instead.

        Args:
            batch: as for `score`; "action_is_pad", where present, is bool [B, C, T].
            candidates: [B, C, T, A] chunks in environment units.
            draws: noise [B, K, ...] and time [B, K], shared by the C candidates; or [B, C, K, ...] and [B, C, K].
        """
        own = draws.time.ndim == 3

        def one(c: int, k: int) -> Tensor:
            at = (slice(None), c, k) if own else (slice(None), k)
            padded = {"action_is_pad": batch["action_is_pad"][:, c]} if "action_is_pad" in batch else {}
            return self.score({**batch, **padded}, candidates[:, c], Draws(draws.noise[at], draws.time[at]))

        columns = [[one(c, k) for k in range(draws.time.shape[-1])] for c in range(candidates.shape[1])]
        return torch.stack([torch.stack(column, dim=1) for column in columns], dim=1)

    @abstractmethod
    def act(self, batch: Batch, draws: Draws | None = None, prefix: Tensor | None = None) -> Chunk:
        """Sample a chunk, without gradient; `prefix` [B, P, A] are committed actions that it must continue."""

    def language(self, batch: Batch, through: Literal["vlm", "prefix"] = "vlm") -> LanguageLoss:
        """Answer loss of the very backbone that acts.

        Args:
            batch: "observation.images.<camera>" (one image) [B, 3, H, W] and lists "question", "answer".
            through: "vlm" reads picture and question as the VLM was trained to, which is where its answers are;
                "prefix" as the policy does in `loss`, the question in the place of the instruction. They differ where
                a policy scales embeddings (SmolVLA) or lets its prompt see itself both ways.
        """
        raise lacks(self, "language", "language")

    def answer(self, batch: Batch, max_new_tokens: int = 8) -> list[str]:
        """Greedy answers to `batch["question"]`."""
        raise lacks(self, "language", "answer")

    def view_tokens(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] as its vision tower hands them to the language model: [B, n, D]."""
        raise lacks(self, "language", "view_tokens")

    @abstractmethod
    def draw(self, batch_size: int, generator: torch.Generator) -> Draws:
        """Noise and time for `batch_size` samples, on the generator's device."""

    def capture(self, layers: Sequence[int]) -> AbstractContextManager[Captured]:
        """Hand out hidden states of the backbone for the forward that runs inside."""
        raise lacks(self, "capture", "capture")

    def view_mask(self, size: tuple[int, int]) -> Tensor:
        """bool [H', W']: where the picture that the backbone gets of a view [H, W] shows it; elsewhere is padding."""
        return torch.ones(size, dtype=torch.bool)

    def backbone_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that hold the VLM's knowledge: vision tower, connector, language model. None without one."""
        return iter(())

    def velocity(self, batch: Batch, points: Tensor, time: Tensor) -> Tensor:
        """[B, R, T, A_model] velocities (noise minus data) at R points of each observation's flow, see FlowPolicy."""
        raise lacks(self, "velocity", "velocity")

    def to_model(self, batch: Batch, actions: Tensor) -> Tensor:
        """Actions [B, T, A] in environment units as `velocity` takes them: [B, T, A_model], normalised and padded."""
        raise lacks(self, "velocity", "to_model")

    def flow_parts(self) -> FlowParts:
        """The model taken apart, for `runtime.executor`."""
        raise lacks(self, "runtime", "flow_parts")

    def set_steps(self, count: int) -> None:
        """Set the steps that its config's own sampler takes."""
        raise lacks(self, "runtime", "set_steps")

    def begin(self, batch: Batch, prefix: Tensor | None = None) -> tuple[list[Any], Tensor | None]:
        """What the model takes of a batch, and committed actions as `velocity` takes them; see FlowPolicy."""
        raise lacks(self, "runtime", "begin")

    def finish(self, sampled: Tensor, prefix: Tensor | None = None) -> Chunk:
        """Sampled [B, T, A_model] as `act` returns them."""
        raise lacks(self, "runtime", "finish")

    def candidates(self, batch: Batch, noise: Tensor) -> Chunk:
        """Chunks [B, K, T, A] from noise [B, K, ...]: as many calls of `act` as there are, for policies without a
        cheaper way.
        """
        times = torch.ones(noise.shape[0])
        chunks = [self.act(batch, Draws(noise[:, k], times)).actions for k in range(noise.shape[1])]
        return Chunk(torch.stack(chunks, 1))

    def token_model(self) -> TokenModel:
        """The policy as decoders see it; batches are those of the verbs."""
        raise lacks(self, "tokens", "token_model")

    def token_actions(self, ids: Tensor) -> Tensor:
        """[B, L] token ids to normalised actions [B, T, A]."""
        raise lacks(self, "tokens", "token_actions")

    @property
    def decoder(self) -> tuple[str, dict[str, Any]]:
        """Name and options of the decoder that `act` uses."""
        raise lacks(self, "tokens", "decoder")

    def watch_tokens(self) -> AbstractContextManager[list[TokenForward]]:
        """Hand out a list that gets ids, masks and logits of every `loss` inside."""
        raise lacks(self, "tokens", "watch_tokens")

    def token_logits(
        self, batch: Batch, forward: TokenForward, block: int | None = None, prompt_sees_actions: bool | None = None
    ) -> Tensor:
        """[B, L, V] logits for the tokens of an earlier forward, hidden as they were there.

        Args:
            block: action tokens that see one another; None means the policy's own, L lets all see all.
            prompt_sees_actions: whether the prompt attends to action tokens; None means as in the policy.
        """
        raise lacks(self, "tokens", "token_logits")

    def recompute(self) -> list[Callable[[], None]]:
        """From now on a `loss` keeps the inputs of its `blocks` alone, and the backward pass computes them again.

        Returns:
            Calls that take it back.
        """
        return [recompute(block) for block in self.blocks()]

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def normalization(self, kind: str) -> str:
        """LeRobot's normalisation mode of a kind of feature ("ACTION", "STATE"), "" where the policy names none."""
        return ""

    def settings(self) -> dict[str, Any]:
        """The fields of its config by name, for the keys of caches."""
        return {}

    def stages(self) -> list[Stage]:
        """What `act` consists of, for the profiler; time of no stage is the host's."""
        return []

    def blocks(self) -> list[nn.Module]:
        """The repeated parts that sharding wraps one by one and checkpointing recomputes; none lies inside another.

        Each is called as a module, with hooks, in every forward that reaches it. This one takes the modules whose
        class LeRobot's policy names for sharding (`_fsdp_wrap_modules`) or a transformers model will not have split
        (`_no_split_modules`), else the items of its lists of modules. A policy whose layers are run part by part names
        the parts.
        """
        named = {name for module in self.modules() for table in ("_fsdp_wrap_modules", "_no_split_modules")
                 for name in getattr(module, table, None) or ()}  # fmt: skip
        found = outermost(self, lambda module: type(module).__name__ in named)
        return [block for block in found or listed(self) if any(True for _ in block.parameters())]

    def token_counters(self) -> list[nn.Module]:
        """Modules whose inputs [B, S, D] together are all token positions of a forward pass, each once."""
        return []

    def stored(self) -> nn.Module:
        """The module whose state `save` writes."""
        return self

    @abstractmethod
    def save(
        self, folder: Path, *, home: Path | None = None, state_dict: Mapping[str, Tensor] | None = None
    ) -> None:  # fmt: skip
        """Write an ordinary LeRobot policy folder (config.json, model.safetensors, processors).

        `home` is where the folder will lie in the end, when it is written elsewhere and renamed. `state_dict` are
        weights to store in place of its own, with the names of `stored`'s state.
        """


def outermost(root: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """Modules below `root` that are `wanted`, in order, without those inside another one."""
    found: list[nn.Module] = []
    for child in root.children():
        found += [child] if wanted(child) else outermost(child, wanted)
    return found


def listed(root: nn.Module) -> list[nn.Module]:
    """The items of all lists of modules below `root`, those of lists inside a list in their places."""
    if isinstance(root, nn.ModuleList):  # which itself cannot be called
        return [one for item in root for one in (listed(item) if isinstance(item, nn.ModuleList) else [item])]
    return [item for each in outermost(root, lambda module: isinstance(module, nn.ModuleList)) for item in listed(each)]


def lacks(policy: Policy, capability: str, wanted: str) -> BurnishError:
    """The error of a policy that cannot do what is asked; `wanted` is the method or verb that asks."""
    what, which = CAPABILITIES.get(capability, (f"capability '{capability}'", "one that declares it"))
    return BurnishError(f"{wanted}: a policy of type {policy.name or type(policy).__name__} has no {what}", which)


def require(policy: Policy, capability: str, method: str) -> None:
    """Raise BurnishError where `policy` cannot do what `method` needs of it (a name from CAPABILITIES)."""
    if not policy.supports(capability):
        raise lacks(policy, capability, method)
