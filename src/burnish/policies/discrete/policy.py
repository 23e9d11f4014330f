"""burnish's verbs over DiscretePolicy."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from torch import Tensor, nn

from burnish.core.errors import BurnishError, one_line
from burnish.core.reading import read_object
from burnish.core.seeding import seeded
from burnish.core.types import Batch, Chunk, Draws, PolicyLoss
from burnish.policies import folder as folders
from burnish.policies import language, tensors
from burnish.policies.base import Stage, TokenForward
from burnish.policies.discrete.configuration_discrete import DiscreteConfig
from burnish.policies.discrete.network import NetTokenModel, bucketed
from burnish.policies.discrete.tokenizers import FAST_FILES
from burnish.policies.keys import ACTION, CONFIG, FAST_FOLDER, PAD, TOKEN_MASK, VLM_FOLDER
from burnish.policies.load import POLICIES, load
from burnish.policies.pipelines import new_processors
from burnish.policies.pretrained import check_size, load_vlm, require_inside, vlm_config
from burnish.policies.tensors import load_tensors
from burnish.policies.vlm import TokenPolicy, VLMPolicy, add_actions
from burnish.sampling.token_model import Prompt, noise_seeds


@POLICIES.register("burnish_discrete")
class Discrete(TokenPolicy):
    """burnish's verbs over DiscretePolicy, whose VLM is the backbone: action tokens run through all of its layers."""

    config: DiscreteConfig
    tokenizer_folder = VLM_FOLDER

    def __init__(self, policy: nn.Module, preprocessor: Any, postprocessor: Any):
        super().__init__(policy, preprocessor, postprocessor)
        self._image_tokens: dict[torch.Size, int] = {}
        self.state_positions, self.length = policy.model.state_positions, self.config.length
        exact = "masked_diffusion" if self.config.training == "diffusion" else "likelihood"
        ordered = {"prefix"} | ({"carry"} if exact == "masked_diffusion" else set())
        self.capabilities = VLMPolicy.capabilities | {"tokens", exact}
        self.capabilities |= ordered if policy.model.tokens.time_ordered else set()

    @classmethod
    def read_config(cls, raw: dict[str, Any], folder: Path) -> dict[str, Any]:
        """All weights are in model.safetensors, the VLM's and FAST's other files inside the folder."""
        inside = {"vlm_model_name": str(require_inside(folder, VLM_FOLDER, raw.get("vlm_model_name")))}
        if raw.get("tokenizer") == "fast":
            inside["fast_folder"] = str(require_inside(folder, FAST_FOLDER, raw.get("fast_folder")))
        return {**raw, **inside, "load_vlm_weights": False}

    @classmethod
    def build(cls, config: DiscreteConfig, seed: int, folder: Path | None = None) -> nn.Module:
        place = Path(config.vlm_model_name)
        check_size(vlm_config(place), tensors.size(folder or place), place)
        return folders.build(config, seed)

    @classmethod
    def open(
        cls, policy: nn.Module, preprocessor: Any, postprocessor: Any, folder: Path, dataset_stats: dict | None
    ) -> Self:
        if dataset_stats is not None:
            policy.fit_tokens(dataset_stats)
        policy.decoder()  # one that cannot work is found here and not after a training
        return cls(policy, preprocessor, postprocessor)

    @classmethod
    def create(
        cls, name: str, source: Path | str, features: dict, dataset_stats: dict, overrides: dict, **options: Any
    ) -> Self:
        return cls(*new_policy(source, features, dataset_stats, {"type": name, **overrides}, **options))

    @property
    def input_size(self) -> int:
        return self.config.image_size

    @property
    def vlm(self) -> nn.Module:
        return self.policy.model.vlm

    @property
    def backbone(self) -> language.Backbone:
        return language.Backbone(text_model=self.policy.model.text_model, head=self.vlm.get_output_embeddings(),
                                 embed_text=self.vlm.get_input_embeddings(), tokenizer=self.tokenizer)  # fmt: skip

    @property
    def prefix(self) -> language.Backbone:
        return replace(self.backbone, see_prompt=True, scale=self.policy.model.scale)

    def embed_image(self, image: Tensor) -> Tensor:
        return self.policy.model.embed_image(image)

    def prepare_images(self, batch: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return self.policy.model.prepare_images(batch)

    def image_tokens(self, image: Tensor) -> int:
        if image.shape[1:] not in self._image_tokens:
            with torch.no_grad():
                self._image_tokens[image.shape[1:]] = self.embed_image(image[:1]).shape[1]
        return self._image_tokens[image.shape[1:]]

    def model_stages(self) -> list[Stage]:
        model = self.policy.model
        return [Stage("preprocess", model, "prepare_images"), Stage("vision", model, "embed_image"),
                Stage("prompt", model, "joint"), Stage("pass", model, "extend"),
                Stage("head", model.head, "forward")]  # fmt: skip

    def token_counters(self) -> list[nn.Module]:
        return [self.policy.model.text_model.layers[0].mlp]

    def token_model(self) -> NetTokenModel:
        return NetTokenModel(self.policy.model, lambda batch: self._embed(bucketed(self._prepare(batch, None))))

    def token_actions(self, ids: Tensor) -> Tensor:
        return self.policy.model.tokens.decode(ids)

    @property
    def decoder(self) -> tuple[str, dict[str, Any]]:
        return self.config.decoder_name, dict(self.config.decoder_options)

    # The verbs.

    def loss(self, batch: Batch, draws: Draws | None = None) -> PolicyLoss:
        """Cross-entropy of hidden action tokens in nats (of all tokens for an autoregressive policy), plus
        `ordinal_weight` times the distance between expected and true action.

        `total` is the mean over all tokens that count in the batch, `per_sample` [B] the mean over those of one sample.
        Padded steps are trained as repeats of the last action, so that no token tells where an episode ends.
        """
        prepared, draws = self._inputs(batch, batch[ACTION], draws)
        prompt = self._embed(prepared, self.length * (1 + self.config.doubled))
        out = self.policy.token_losses(prompt, prepared[ACTION], draws, batch.get(PAD))
        for watched in self._watched:
            watched.append(TokenForward(out["ids"], out["hidden"], out["weight"], out["logits"]))
        weight = out["weight"]
        summed, counted = (self.policy.combine(out) * weight).sum(1), weight.sum(1)
        share = weight / weight.sum().clamp_min(1)
        parts = {name: (out[name] * share).sum() for name in ("cross_entropy", "ordinal") if name in out}
        return PolicyLoss(summed.sum() / counted.sum().clamp_min(1), summed / counted.clamp_min(1), parts)

    def scores(self, batch: Batch, candidates: Tensor, draws: Draws) -> Tensor:
        """Log-probabilities of the tokens of C chunks on K draws, [B, C, K], in nats; images and prompt are embedded
        once, and chunks that do not see one another share a pass through the language model.

        Exact by the chain rule for an autoregressive policy, exact for one that writes all tokens in one pass; for
        masked diffusion an unbiased estimate of its bound, whose masks follow from `draws.noise` and `draws.time`
        alone, so that equal draws hide the same tokens of every chunk.
        """
        self._check_chunk(candidates, 4)
        prepared = self._prepare(batch, candidates)
        copies = candidates.shape[1] * (draws.time.shape[-1] if self.config.training == "diffusion" else 1)
        prompt = self._embed(prepared, self.policy.copies_at_once(copies)[1])
        return self.policy.log_likelihood(prompt, prepared[ACTION], draws.to(self.device), batch.get(PAD))

    @torch.no_grad()
    def act(self, batch: Batch, draws: Draws | None = None, prefix: Tensor | None = None,
            stream: Callable[[int, Tensor], None] | None = None, until: int | None = None,
            carry: Tensor | None = None) -> Chunk:  # fmt: skip
        """Decode a chunk [B, T, A] on the CPU, in environment units, with the decoder of the config.

        Decoders are greedy, so `draws` change nothing, unless the decoder draws its tokens (`dd_vla`) or their order:
        then their noise decides, for each sample by itself. `prefix` [B, P, A] comes back unchanged. `stream` is called
        with the number n of control steps that are final and their actions [B, n, A], as often as n grows.
        `until` stops when so many steps are final, those of the prefix included; what is behind them is no action yet.
        `carry` [B, L] are tokens to go on with: `Chunk.tokens` of the last chunk behind executed steps, then MASK.
        """
        if prefix is not None and prefix.shape[1] == 0:
            prefix = None
        prepared = bucketed(self._prepare(batch, prefix))
        committed = None if prefix is None else prepared[ACTION]
        prompt = self._embed(prepared)
        if self._captures:
            self.token_model().prefill(prompt)  # a pass over the prompt alone: decoders add tokens as they like
        if self.policy.decoder().draws:
            drawn = draws or self.draw(len(prompt.states), self.generator)
            prompt = replace(prompt, seeds=noise_seeds(drawn.noise))

        def tell(steps: int, actions: Tensor) -> None:
            stream(steps, self._behind(prefix, actions)[:, :steps])

        actions, tokens = self.policy.decode(prompt, committed, None if stream is None else tell, until, carry)
        return Chunk(self._behind(prefix, actions), tokens=tokens)

    def draw(self, batch_size: int, generator: torch.Generator) -> Draws:
        """Noise [B, T, A], times [B], and the hidden tokens of the config's noise schedule, bool [B, L]."""
        return self.policy.draw(batch_size, generator)

    def token_logits(
        self, batch: Batch, forward: TokenForward, block: int | None = None, prompt_sees_actions: bool | None = None
    ) -> Tensor:
        prompt = self._embed(self._prepare(batch, None))
        return self.policy.logits(prompt, forward.ids, forward.hidden, block, prompt_sees_actions)

    def write_extras(self, folder: Path, home: Path) -> None:
        """VLM config, tokenizer and processor under `vlm/` (not its weights), the FAST tokenizer under `fast/`."""
        self.vlm.config.save_pretrained(folder / VLM_FOLDER)
        self.tokenizer.save_pretrained(folder / VLM_FOLDER)
        fast = self.config.tokenizer == "fast"
        if fast and Path(self.config.fast_folder).absolute() != (folder / FAST_FOLDER).absolute():
            (folder / FAST_FOLDER).mkdir(exist_ok=True)
            for name in FAST_FILES:
                shutil.copyfile(Path(self.config.fast_folder) / name, folder / FAST_FOLDER / name)
        folders.point_at(folder, str(home / VLM_FOLDER), **({"fast_folder": str(home / FAST_FOLDER)} if fast else {}))

    # Inside.

    def _inputs(self, batch: Batch, actions: Tensor, draws: Draws | None) -> tuple[dict[str, Any], Draws]:
        self._check_chunk(actions)
        prepared = self._prepare(batch, actions)
        return prepared, (draws or self.draw(len(actions), self.generator)).to(self.device)

    def _embed(self, prepared: dict[str, Any], action_tokens: int = 0) -> Prompt:
        if self._captures:
            images, masks = self.prepare_images(prepared)
            self._note(images, masks, prepared[TOKEN_MASK])
            tokens = torch.ones(len(images[0]), action_tokens, dtype=torch.bool, device=self.device)
            for captured in self._captures:
                add_actions(captured, tokens)
        return self.policy.model.prompt(prepared)


_SHARED = ("max_state_dim", "tokenizer_max_length", "pad_language_to")
"""Config fields that a new policy takes over from a SmolVLA."""


def new_policy(source: Path | str, features: dict[str, Any], dataset_stats: dict[str, Any], fields: dict[str, Any], *,
               generator_seed: int = 0, device: str = "cpu") -> tuple[nn.Module, Any, Any]:  # fmt: skip
    """A new DiscretePolicy and its processors: the VLM as it is, action embeddings and head fresh.

    Args:
        source: a VLM folder (config, weights, tokenizer), a SmolVLA policy folder, or a shipped base's name. From a
            SmolVLA come the VLM, the state projection and the way it scales embeddings; its action expert is left.
        fields: of DiscreteConfig, and its "type"; the others are those of `SmolVLA.create`.
    """
    source = Path(source)
    if (source / CONFIG).is_file() and "type" not in read_object(source / CONFIG):
        return _build(source.absolute(), None, features, dataset_stats, fields, generator_seed, device)
    base = load(source)
    if base.name != "smolvla":
        raise BurnishError(f"a policy of type {base.name} in {source}", "a SmolVLA or a VLM folder")
    with TemporaryDirectory() as vlm:
        base.vlm.config.text_config.num_hidden_layers = base.num_layers  # LeRobot cuts layers off, not the config
        base.vlm.config.save_pretrained(vlm)
        base.policy.model.vlm_with_expert.processor.save_pretrained(vlm)
        return _build(Path(vlm), base, features, dataset_stats, fields, generator_seed, device)


def _build(
    vlm_folder: Path, base: Any, features: dict, stats: dict, fields: dict, seed: int, device: str
) -> tuple[nn.Module, Any, Any]:
    taken = {} if base is None else {name: getattr(base.config, name) for name in _SHARED}
    raw = {"push_to_hub": False, "scale_embeddings": base is not None, **_pixels(vlm_folder), **taken, **fields,
           "vlm_model_name": str(vlm_folder), "load_vlm_weights": False}  # fmt: skip
    config = folders.decode_config(raw, str(vlm_folder), features, device)
    policy = folders.build(config, seed)
    vlm = load_vlm(vlm_folder) if base is None else base.vlm
    load_tensors(policy.model.vlm, vlm.state_dict(), str(vlm_folder), extra_allowed=True)
    if base is not None and config.state_as == "row" and config.max_state_dim == base.config.max_state_dim:
        policy.model.state_proj.load_state_dict(base.policy.model.state_proj.state_dict())
    with seeded(seed):
        policy.model.start()
    policy.fit_tokens(stats)
    _check_images(policy)
    return policy.to(device).eval(), *new_processors(config, stats, tokenizer=vlm_folder)


def _pixels(vlm_folder: Path) -> dict[str, list[float]]:
    """Mean and deviation of pixels that the vision tower was trained with."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (vlm_folder / name).is_file():
            found = read_object(vlm_folder / name)
            inner = found.get("image_processor")
            found = inner if isinstance(inner, dict) else found
            return {key: found[key] for key in ("image_mean", "image_std") if key in found}
    return {}


@torch.no_grad()
def _check_images(policy: nn.Module) -> None:
    """Vision towers that want more than pixels (sizes of tiles, say) are found here and not in the first step."""
    size = policy.config.image_size
    try:
        embedded = policy.model.embed_image(torch.zeros(1, 3, size, size))
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        kind, reason = policy.model.vlm.config.model_type, one_line(error, 200)
        raise BurnishError(
            f"a VLM of type '{kind}' that cannot embed an image ({reason})",
            "one whose get_image_features takes pixel values alone, as SmolVLM or PaliGemma",
        ) from error
    if embedded.ndim != 3:
        raise BurnishError(f"image features of shape {tuple(embedded.shape)}", "[B, tokens, width]")
