"""The LeRobot config of `burnish_discrete` (names and places of these files are LeRobot's convention for plug-ins)."""

from dataclasses import dataclass, field
from inspect import signature
from typing import Any

from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.optim import AdamWConfig, CosineDecayWithWarmupSchedulerConfig

from burnish.core.options import number
from burnish.core.renames import note
from burnish.policies.discrete.losses import NOISE

TRAININGS = ("autoregressive", "parallel", "diffusion")
TOKENIZERS = ("uniform", "quantile", "fast")
_CHOICES = {
    "training": TRAININGS, "tokenizer": TOKENIZERS, "state_as": ("row", "tokens"), "dtype": ("float32", "bfloat16"),
    "token_weights": ("equal", "inverse_share"),
}  # fmt: skip
_BOUNDS = {
    "n_obs_steps": (1, 1), "chunk_size": (1, 4096), "n_action_steps": (1, 4096), "image_size": (0, 4096),
    "max_state_dim": (1, 65536), "tokenizer_max_length": (1, 8192), "bins": (2, 4096), "fast_length": (1, 65536),
    "block_size": (0, 65536),
}  # fmt: skip
_MOST_TOKENS = 65536


@PreTrainedConfig.register_subclass("burnish_discrete")
@dataclass
class DiscreteConfig(PreTrainedConfig):
    """Fields of `--policy.` and of a recipe's `policy.overrides`."""

    n_obs_steps: int = 1
    chunk_size: int = 8
    n_action_steps: int = 8
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {
            "VISUAL": NormalizationMode.IDENTITY,
            "STATE": NormalizationMode.MEAN_STD,
            "ACTION": NormalizationMode.QUANTILES,
        }
    )

    # Backbone.
    vlm_model_name: str = ""
    """Folder of the VLM's config, tokenizer and processor (and weights, for a new policy)."""
    load_vlm_weights: bool = False
    """Take the VLM's weights from that folder; False where model.safetensors has everything."""
    image_size: int = 0
    """Images are resized to this side, with padding; 0 means the vision tower's own."""
    image_mean: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    image_std: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    scale_embeddings: bool = False
    """Multiply image and text embeddings by the square root of the width, as SmolVLA does."""
    state_as: str = "row"
    """"row": the state is one projected position of the prompt; "tokens": one binned token for each dimension."""
    max_state_dim: int = 32
    """Width of the state projection."""
    tokenizer_max_length: int = 48
    pad_language_to: str = "longest"

    # Action tokens.
    tokenizer: str = "uniform"
    """uniform or quantile bins, or fast (frequencies and byte pairs; needs `fast_folder`)."""
    bins: int = 256
    """Bins of an action dimension."""
    fast_folder: str = ""
    """Folder with FAST's tokenizer.json and processor_config.json."""
    fast_length: int = 64
    """Tokens of a chunk with FAST; shorter ones are padded, longer ones refused."""

    # Training.
    training: str = "diffusion"
    """autoregressive (next token), parallel (all tokens hidden), or diffusion (some hidden, see `noise`)."""
    block_size: int = 0
    """Tokens that see one another; each also sees all earlier blocks. 0 means the whole chunk (bidirectional), the
    action dimension means one control step; autoregressive has 1."""
    shift: bool = False
    """Read the token at a position from the position before it, as language models do; autoregressive always does."""
    prompt_sees_actions: bool = False
    """Let the prompt attend to actions in training. Keys of the prompt can then not be kept between passes."""
    open_prompt: bool | None = None
    """Former name of `prompt_sees_actions`, in policies stored before."""
    noise: str = "uniform"
    """Schedule of the hidden tokens, see losses.NOISE."""
    noise_options: dict[str, float] = field(default_factory=dict)
    ordinal_weight: float = 0.0
    """Weight of the distance between the expected and the true action beside the cross-entropy."""
    doubled: bool = False
    """Train every block given all earlier ones without noise, on a noisy and a clean copy of the chunk, as block
    diffusion does (arXiv 2503.09573): what `sequential` decoding meets. Needs attention over blocks."""
    token_weights: str = "equal"
    """Of hidden tokens in diffusion: equal, or inverse_share, the 1 / t of the likelihood bound (noisier)."""

    # Decoding.
    decoder: str = ""
    """Name of a decoder; empty means autoregressive, one_pass, confidence or d2f, as the training says: each writes
    what is likely together, see docs/methods/decode.md."""
    decoder_options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    """Of all weights when the policy is loaded: float32, or bfloat16 for inference. Bin edges stay float32."""

    optimizer_lr: float = 1e-4
    optimizer_betas: tuple[float, float] = (0.9, 0.95)
    optimizer_weight_decay: float = 1e-4
    optimizer_grad_clip_norm: float = 1.0
    scheduler_warmup_steps: int = 1_000
    scheduler_decay_steps: int = 30_000
    scheduler_decay_lr: float = 2.5e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.open_prompt is not None:  # stored under its former name, and read by LeRobot's own commands
            note("burnish_discrete: open_prompt", "prompt_sees_actions")
            self.prompt_sees_actions, self.open_prompt = self.open_prompt, None
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, not one of {', '.join(known)}")
        for name, (least, most) in _BOUNDS.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise ValueError(f"{name} is {value!r}, not {least} to {most}")
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if not isinstance(values, list | tuple) or len(values) != 3 or not all(map(number, values)):
                raise ValueError(f"{name} is {values!r}, not three numbers")
        if min(self.image_std) <= 0:
            raise ValueError(f"image_std is {self.image_std}, not above 0")
        if not number(self.ordinal_weight) or self.ordinal_weight < 0:
            raise ValueError(f"ordinal_weight is {self.ordinal_weight!r}, not a number of at least 0")
        if self.n_action_steps > self.chunk_size:
            raise ValueError(f"n_action_steps {self.n_action_steps} is more than chunk_size {self.chunk_size}")
        if self.tokenizer == "fast" and not self.fast_folder:
            raise ValueError("tokenizer is fast but fast_folder is empty")
        if self.prompt_sees_actions and (self.training == "autoregressive" or self.block_size):
            raise ValueError(
                "prompt_sees_actions with attention over blocks: what a block tells the prompt, all blocks see"
            )
        if self.doubled and (self.training != "diffusion" or not self.block_size):
            raise ValueError("doubled without blocks: only what is trained by diffusion over blocks has earlier ones")
        if self.training == "autoregressive":
            if self.block_size not in (0, 1):
                raise ValueError(f"block_size is {self.block_size}, but an autoregressive policy sees back only")
            self.block_size, self.shift = 1, True
        mode = self.normalization_mapping.get("ACTION")
        if self.tokenizer != "fast" and mode not in (NormalizationMode.QUANTILES, NormalizationMode.MIN_MAX):
            raise ValueError(f"actions are normalised by {mode}, but bins need QUANTILES or MIN_MAX (-1 to 1)")

    def validate_features(self) -> None:
        """Chunk length and block size must fit; called when the features are known."""
        if self.action_feature is None or self.robot_state_feature is None:
            raise ValueError("burnish_discrete needs observation.state and action")
        if self.length > _MOST_TOKENS:
            raise ValueError(f"a chunk of {self.length} tokens, more than {_MOST_TOKENS}")
        if self.block_size > 0 and self.length % self.block_size:
            raise ValueError(f"blocks of {self.block_size} do not divide the {self.length} tokens of a chunk")
        if self.robot_state_feature.shape[0] > self.max_state_dim:
            raise ValueError(f"a state of {self.robot_state_feature.shape[0]} but max_state_dim {self.max_state_dim}")
        try:
            signature(NOISE.get(self.noise)).bind(1, 1, None, **self.noise_options)
        except TypeError as error:
            raise ValueError(f"noise schedule {self.noise} with {self.noise_options}: {error}") from error
        for name, value in self.noise_options.items():
            least, most = (1, 65536) if name == "window" else (0, 1)
            if not number(value) or not least <= value <= most:
                raise ValueError(f"noise option {name} is {value!r}, not {least} to {most}")

    @property
    def action_dim(self) -> int:
        return self.action_feature.shape[0]

    @property
    def length(self) -> int:
        """L, tokens of a chunk."""
        return self.fast_length if self.tokenizer == "fast" else self.chunk_size * self.action_dim

    @property
    def block(self) -> int:
        """Tokens that see one another."""
        return self.block_size or self.length

    @property
    def decoder_name(self) -> str:
        if self.decoder:
            return self.decoder
        if self.training != "diffusion":
            return {"autoregressive": "autoregressive", "parallel": "one_pass"}[self.training]
        return "confidence" if self.block == self.length else "d2f"

    def get_optimizer_preset(self) -> AdamWConfig:
        return AdamWConfig(lr=self.optimizer_lr, betas=self.optimizer_betas, weight_decay=self.optimizer_weight_decay,
                           grad_clip_norm=self.optimizer_grad_clip_norm)  # fmt: skip

    def get_scheduler_preset(self) -> CosineDecayWithWarmupSchedulerConfig:
        return CosineDecayWithWarmupSchedulerConfig(peak_lr=self.optimizer_lr, decay_lr=self.scheduler_decay_lr,
                                                    num_warmup_steps=self.scheduler_warmup_steps,
                                                    num_decay_steps=self.scheduler_decay_steps)  # fmt: skip

    @property
    def observation_delta_indices(self) -> list[int]:
        return [0]

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        return None
