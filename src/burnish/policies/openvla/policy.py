"""burnish's verbs over OpenVLA and OpenVLA-OFT."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from burnish.core.errors import BurnishError
from burnish.core.types import Batch, Chunk, Draws, PolicyLoss
from burnish.policies import language
from burnish.policies.base import Captured, Stage, TokenForward, lacks
from burnish.policies.discrete import losses
from burnish.policies.discrete.network import NetTokenModel
from burnish.policies.keys import ACTION, PAD, STATE, TASK
from burnish.policies.load import POLICIES
from burnish.policies.openvla import files, images
from burnish.policies.openvla.configuration import OWN, OpenVLAConfig, read_config
from burnish.policies.openvla.network import HEADS, OpenVLANet
from burnish.policies.vlm import TokenPolicy, VLMPolicy
from burnish.sampling.token_model import Decoder, Prompt, make_decoder

SEVEN_B = {
    "vision_backbone_id": "dinosiglip-vit-so-224px", "image_resize_strategy": "resize-naive",
    "text_config": {"model_type": "llama", "vocab_size": 32064},
    "norm_stats": {"any": {name: {"q01": [-1.0] * 7, "q99": [1.0] * 7} for name in ("action", "proprio")}},
}  # fmt: skip
"""What config.json of openvla/openvla-7b says, with statistics of no data."""


@POLICIES.register("openvla")
class OpenVLA(TokenPolicy):
    """OpenVLA writes action tokens one by one; OpenVLA-OFT regresses a chunk in one pass. Which, the config says.

    Args:
        kept: contents of the folder's other files, to be stored again.
    """

    config: OpenVLAConfig
    policy: OpenVLANet
    own_folder = True
    adapter_targets = (
        r"policy\.(vision_backbone\.\w+\.blocks|language_model\.model\.layers)\.\d+\..*|policy\.projector\.\w+"
    )

    def __init__(self, network: OpenVLANet, tokenizer: Any, kept: dict[str, bytes]):
        self._tokenizer, self.kept = tokenizer, kept
        space = network.tokens
        super().__init__(network, space, space.denormalise)
        self.continuous = self.config.settings.head == "l1"
        self.whole_parts = tuple(f"policy.{name}" for name in HEADS if name in network._modules)
        if not self.continuous:
            self.capabilities = VLMPolicy.capabilities | {"tokens", "likelihood", "prefix"}
        self._start = tokenizer.convert_tokens_to_ids(tokenizer.bos_token)
        self._stop = tokenizer.convert_tokens_to_ids(tokenizer.eos_token)
        self._decoder: Decoder | None = None

    @classmethod
    def load(
        cls, folder: Path, raw: dict[str, Any], *, overrides: dict[str, Any], device: str,
        dataset_stats: dict[str, Any] | None, features: dict[str, Any] | None, stats_source: str,
    ) -> Self:  # fmt: skip
        """The policy of a published folder, or of one that burnish wrote; see `burnish.policies.load_policy`.

        Args:
            folder, raw: the folder and its config.json.
        """
        stored = raw.get(OWN) if isinstance(raw.get(OWN), dict) else {}
        config = read_config(folder, raw, overrides, features, dataset_stats, stats_source)
        files.check_heads(folder, config, stored)
        tokenizer = files.read_tokenizer(folder)
        network = files.build(config, folder)
        return cls(network, tokenizer, files.kept_files(folder, raw)).to(device).eval()

    @classmethod
    def empty(cls, folder: Path | None, raw: dict[str, Any], changes: dict[str, Any], features: dict[str, Any] | None,
              tokens: Callable[[Any], Any]) -> Self:  # fmt: skip
        """See PolicyWrapper.empty; without a folder it is openvla-7b."""
        raw, where = (SEVEN_B, Path("openvla-7b")) if folder is None else (raw, folder)
        with _disable_current_modes():  # it looks at the values of statistics
            config = read_config(where, raw, changes, features, None, "")
        return cls(OpenVLANet(config).to(getattr(torch, config.settings.dtype)), tokens(config).tokenizer, {})

    def save(self, folder: Path, *, home: Path | None = None, dtype: torch.dtype | None = None,
             state_dict: Mapping[str, Tensor] | None = None) -> None:  # fmt: skip
        """Write the published layout, see `openvla.files`; arguments as for `PolicyWrapper.save`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.policy.state_dict() if state_dict is None else state_dict
        files.write(folder, self.config, self.kept, state, dtype)

    # What it is made of.

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    @property
    def input_size(self) -> int:
        return self.config.image_size

    @property
    def vlm(self) -> torch.nn.Module:
        """All but OFT's parts: published checkpoints of the backbone end where those begin."""
        parts = (self.policy.vision_backbone, self.policy.projector, self.policy.language_model)
        return torch.nn.ModuleList(parts)

    @property
    def backbone(self) -> language.Backbone:
        start = self.tokenizer.convert_tokens_to_ids(self.tokenizer.bos_token)
        return language.Backbone(text_model=self.policy.text_model, head=self.policy.head,
                                 embed_text=self.policy.text_model.embed_tokens, tokenizer=self.tokenizer,
                                 around_image=([start], []))  # fmt: skip

    @property
    def prefix(self) -> language.Backbone:
        return replace(self.backbone, see_prompt=self.continuous)

    def embed_image(self, image: Tensor) -> Tensor:
        return self.policy.embed_image(image)

    def image_tokens(self, image: Tensor) -> int:
        return self.policy.vision_backbone.num_patches

    def prepare_images(self, batch: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """[B, 6, H, W] of each camera of the batch, as both vision towers take it, and bool [B]."""
        own, found = self.config.settings, []
        for key in self.camera_keys:
            if key in batch:
                pixels = images.resized(images.pixels_of(batch[key]), self.config.image_size, own.resize)
                pixels = images.centre_crop(pixels) if own.center_crop else pixels
                found.append(images.normalised(pixels, self.config.means, self.config.stds))
        return found, [image.new_ones(len(image), dtype=torch.bool) for image in found]

    def normalization(self, kind: str) -> str:
        mode = {"bounds_q99": "QUANTILES", "bounds": "MIN_MAX"}[self.config.settings.normalization]
        return mode if kind in ("ACTION", "STATE") else ""

    def settings(self) -> dict[str, Any]:
        return dict(vars(self.config.settings))

    def model_stages(self) -> list[Stage]:
        network = self.policy
        vision = Stage("vision", network, "embed_image")
        if self.continuous:  # one call holds the prompt and the only pass
            return [vision, Stage("prompt", network, "actions"), Stage("head", network.action_head, "forward")]
        return [vision, Stage("prompt", network, "joint"), Stage("pass", network, "extend"),
                Stage("head", network.head, "forward")]  # fmt: skip

    def blocks(self) -> list[torch.nn.Module]:
        """Blocks of both vision towers that are read (all but the last), and the language model's layers."""
        vision = self.policy.vision_backbone
        towers = [block for tower in (vision.featurizer, vision.fused_featurizer) for block in tower.blocks[:-1]]
        return [*towers, *self.policy.text_model.layers]

    def token_counters(self) -> list[torch.nn.Module]:
        return [self.policy.text_model.layers[0].mlp]

    # The verbs.

    def loss(self, batch: Batch, draws: Draws | None = None) -> PolicyLoss:
        """OpenVLA: cross-entropy in nats over the whole vocabulary, on action tokens and the one that ends them.
        OFT: mean absolute error of the normalised actions.

        Padded steps count nothing, and neither does the end of a chunk that has some.
        """
        self._check_chunk(batch[ACTION])
        prepared = self._prepare(batch, batch[ACTION])
        padded = batch.get(PAD)
        valid = torch.ones(batch[ACTION].shape[:2]) if padded is None else ~padded.bool()
        weight = valid.to(self.device).float().repeat_interleave(self.action_dim, dim=1)
        if self.continuous:
            errors = (self._regress(prepared) - prepared[ACTION]).abs().flatten(1)
        else:
            errors, weight = self._nats(prepared, weight)
        summed, counted = (errors * weight).sum(1), weight.sum(1)
        total = summed.sum() / counted.sum().clamp_min(1)
        name = "l1" if self.continuous else "cross_entropy"
        return PolicyLoss(total, summed / counted.clamp_min(1), {name: total})

    def scores(self, batch: Batch, candidates: Tensor, draws: Draws) -> Tensor:
        """Of C chunks, [B, C, K]; the observation is encoded once, and all chunks share one forward pass.

        OpenVLA: exact log-probability of the action tokens, the sum of their log-softmax over the vocabulary. OFT:
        minus the absolute error summed over the chunk, the log-density of a Laplace distribution of scale 1 around its
        prediction, up to a constant. Draws change nothing.
        """
        self._check_chunk(candidates, 4)
        prepared = self._prepare(batch, candidates)
        (B, C), K = candidates.shape[:2], draws.time.shape[-1]
        valid = ~batch[PAD].bool() if PAD in batch else torch.ones(candidates.shape[:3])
        weight = valid.to(self.device).float().repeat_interleave(self.action_dim, dim=2)
        if self.continuous:
            errors = (self._regress(prepared)[:, None] - prepared[ACTION]).abs().flatten(2)
        else:
            ids = self.config.space.encode(prepared[ACTION])
            logits = self.policy.chunk_logits(self._embed(prepared, ids[0].numel()), ids)
            errors = losses.cross_entropy(logits.flatten(0, 1), ids.flatten(0, 1)).view_as(ids)
        return -(errors * weight).sum(-1)[..., None].expand(B, C, K)

    @torch.no_grad()
    def act(self, batch: Batch, draws: Draws | None = None, prefix: Tensor | None = None,
            stream: Callable[[int, Tensor], None] | None = None) -> Chunk:  # fmt: skip
        """A chunk [B, T, A] on the CPU, in environment units: greedy tokens with cached keys, or OFT's one pass.

        `prefix` [B, P, A] comes back unchanged, and OpenVLA goes on from its tokens; OFT has no way to see it.
        `stream` is called as in `Discrete.act`; OFT has no parts to tell.
        """
        prefix = None if prefix is None or prefix.shape[1] == 0 else prefix
        if prefix is not None and self.continuous:
            raise lacks(self, "prefix", "act")
        prepared = self._prepare(batch, prefix)
        if self.continuous:
            return Chunk(self.postprocessor(self._regress(prepared).float()))
        space = self.config.space
        known = None if prefix is None else space.encode(prepared[ACTION])
        prompt = self._embed(prepared, 0 if known is None else known.shape[1])
        self._decoder = self._decoder or make_decoder("autoregressive", self.token_model())

        def whole(ids: Tensor) -> Tensor:
            return self._behind(prefix, space.decode(ids))

        tell = None if stream is None else lambda steps, ids: stream(steps, whole(ids)[:, :steps])
        return Chunk(whole(self._decoder(prompt, prefix=known, stream=tell).ids))

    def draw(self, batch_size: int, generator: torch.Generator) -> Draws:
        """Nothing in these policies is random."""
        return Draws(torch.zeros(batch_size, 1, 1, device=generator.device),
                     torch.ones(batch_size, device=generator.device))  # fmt: skip

    # Tokens, for OpenVLA.

    def token_model(self) -> NetTokenModel:
        self._check_tokens("token_model")
        return NetTokenModel(self.policy, lambda batch: self._embed(self._prepare(batch, None)))

    def token_actions(self, ids: Tensor) -> Tensor:
        self._check_tokens("token_actions")
        return self.config.space.decode(ids)

    @property
    def decoder(self) -> tuple[str, dict[str, Any]]:
        self._check_tokens("decoder")
        return "autoregressive", {}

    def watch_tokens(self) -> AbstractContextManager[list[TokenForward]]:
        self._check_tokens("watch_tokens")
        return super().watch_tokens()

    def token_logits(
        self, batch: Batch, forward: TokenForward, block: int | None = None, prompt_sees_actions: bool | None = None
    ) -> Tensor:
        if block not in (None, 1) or prompt_sees_actions:
            raise BurnishError("tokens of OpenVLA that see later ones", "block 1: it reads from left to right")
        self._check_tokens("token_logits")
        return self.policy.chunk_logits(
            self._embed(self._prepare(batch, None), self.config.length), forward.ids[:, None]
        )[:, 0]

    # Inside.

    def _check_tokens(self, wanted: str) -> None:
        if self.continuous:
            raise lacks(self, "tokens", wanted)

    def _prepare(self, batch: Batch, actions: Tensor | None) -> dict[str, Any]:
        """The batch as the network takes it: views on its device, actions and state (where it enters) normalised."""
        own = self.config.settings
        needed = (*self.camera_keys, TASK, *((STATE,) if own.proprio else ()))
        missing = [key for key in needed if key not in batch]
        if missing:
            raise BurnishError(f"a batch without {', '.join(missing)} (it has {', '.join(batch)})", ", ".join(needed))
        widths = [(ACTION, actions, self.action_dim), (STATE, batch[STATE] if own.proprio else None, self.state_dim)]
        for key, value, width in widths:
            if value is not None and value.shape[-1] != width:
                raise BurnishError(f"{key} of {value.shape[-1]} dimensions",
                                   f"{width}, as the policy's config declares")  # fmt: skip
        if actions is not None and actions.shape[-2] > self.chunk_size:
            raise BurnishError(f"{actions.shape[-2]} actions", f"at most the chunk of {self.chunk_size}")
        chosen: dict[str, Any] = {key: batch[key].to(self.device) for key in self.camera_keys}
        chosen[TASK] = batch[TASK]
        if own.proprio:
            chosen[STATE] = self.config.space.normalise_state(batch[STATE].to(self.device))
        if actions is not None:
            chosen[ACTION] = self.preprocessor(actions.to(self.device))
        return chosen

    def _embed(self, prepared: dict[str, Any], after: int = 0) -> Prompt:
        """The prompt of a prepared batch; open captures learn its layout, with `after` positions of actions."""
        views, _ = self.prepare_images(prepared)
        ids, mask = (part.to(self.device) for part in files.encode(self.tokenizer, prepared[TASK]))
        state = prepared.get(STATE) if self.config.settings.proprio else None
        for captured in self._captures:
            self._layout(captured, mask, after)
        start = torch.full((len(mask), 1), self._start, device=self.device)
        return self.policy.prompt(views, start, ids, mask, state)

    def _layout(self, captured: Captured, mask: Tensor, after: int) -> None:
        """<s>, the cameras, the state where it enters, the instruction, actions, and OFT's stop token."""
        count, proprio = self.policy.vision_backbone.num_patches, int(self.config.settings.proprio)
        state = 1 + count * len(self.cameras)
        first = state + proprio
        begin = first + mask.shape[1]
        empty = torch.zeros(len(mask), begin + after + int(self.continuous), dtype=torch.bool, device=self.device)
        captured.hidden.clear()
        captured.layout.clear()
        captured.layout.update({name: empty.clone() for name in ("image", "text", "state", "action")})
        captured.layout["image"][:, 1:state] = True
        captured.layout["state"][:, state:first] = True
        captured.layout["text"][:, first:begin] = mask
        captured.layout["action"][:, begin : begin + after] = True
        captured.cameras.clear()
        captured.cameras.update({camera: slice(1 + i * count, 1 + (i + 1) * count)
                                 for i, camera in enumerate(self.cameras)})  # fmt: skip

    def _regress(self, prepared: dict[str, Any]) -> Tensor:
        return self.policy.actions(self._embed(prepared, self.config.length), self._stop)

    def _nats(self, prepared: dict[str, Any], weight: Tensor) -> tuple[Tensor, Tensor]:
        """[B, L + 1] nats of action tokens and of the end, and their weights."""
        ids = self.config.space.encode(prepared[ACTION])
        logits = self.policy.chunk_logits(self._embed(prepared, self.config.length), ids[:, None], stop=True)[:, 0]
        for watched in self._watched:
            watched.append(TokenForward(ids, torch.zeros_like(ids, dtype=torch.bool), weight, logits[:, :-1]))
        wanted = torch.cat([ids, torch.full_like(ids[:, :1], self._stop)], dim=1)
        return losses.cross_entropy(logits, wanted), torch.cat([weight, weight[:, -1:]], dim=1)
