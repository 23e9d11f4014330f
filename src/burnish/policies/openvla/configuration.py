"""What a published OpenVLA folder says in config.json, and what burnish adds to it under "burnish"."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from burnish.core.errors import BurnishError
from burnish.core.options import number, option, read_options
from burnish.core.reading import read_object
from burnish.policies.keys import ACTION, CONFIG, IMAGES, STATE
from burnish.policies.openvla.actions import BOUNDS, OWN_KEY, ActionSpace, choose_stats, stats_entry
from burnish.policies.pretrained import foreign
from burnish.policies.sizes import MOST_EDGE, MOST_LAYERS, check_model_numbers

OWN = "burnish"
"""Field of config.json with `Settings`; other readers pass it over."""
IMAGE_PROCESSOR, STATISTICS = "preprocessor_config.json", "dataset_statistics.json"
BACKBONES = {
    "dinosiglip-vit-so-224px": ("vit_large_patch14_reg4_dinov2", "vit_so400m_patch14_siglip_224", 224),
    "dinosiglip-vit-so-384px": ("vit_large_patch14_reg4_dinov2", "vit_so400m_patch14_siglip_384", 384),
}
"""timm's names of both vision towers, and the edge of their images, by the published name."""
_MEANS, _STDS = [[0.485, 0.456, 0.406], [0.5] * 3], [[0.229, 0.224, 0.225], [0.5] * 3]


@dataclass
class Settings:
    """Stored under "burnish" in config.json, and the fields of `policy.overrides`."""

    cameras: list[str] = option(["image"], "names of its cameras, in the order in which the model reads them")
    image_shape: list[int] = option([], "height and width of its cameras' images; empty: the vision towers' own")
    chunk_size: int = option(1, "actions in a chunk", least=1, most=256)
    n_action_steps: int = option(0, "actions of a chunk to execute; 0: all", least=0, most=256)
    unnorm_key: str = option("", "entry of norm_stats that actions are in; empty: the only one")
    normalization: str = option("bounds_q99", "statistics that are sent to -1 and 1", choices=tuple(BOUNDS))
    gripper: str = option("same", "libero: open and closed are -1 and 1 outside, 1 and 0 in the policy",
                          choices=("same", "libero"))  # fmt: skip
    resize: str = option("lanczos3", "how images are brought to size", choices=("lanczos3", "bicubic"))
    center_crop: bool = option(False, "keep the middle 90 per cent of an image, as for models trained on random crops")
    head: str = option("tokens", "tokens: OpenVLA; l1: OpenVLA-OFT's regression head", choices=("tokens", "l1"))
    proprio: bool = option(False, "the state enters through OFT's projector")
    state_dim: int = option(0, "dimensions of the state; 0: those of norm_stats", least=0, most=256)
    dtype: str = option("float32", "of all weights when it is loaded", choices=("float32", "bfloat16"))
    towers: list[dict] = option([], "sizes of small vision towers, in place of timm's")
    init_seed: int = option(0, "of heads that the folder has not", least=0)


@dataclass
class Tower:
    """Sizes of a small vision tower."""

    embed_dim: int = option(64, least=8, most=8192)
    depth: int = option(3, least=2, most=MOST_LAYERS)
    num_heads: int = option(2, least=1, most=256)
    mlp_ratio: float = option(2.0, above=0, most=16)
    patch_size: int = option(14, least=1, most=64)
    init_values: float | None = option(None, above=0, most=10)


@dataclass
class OpenVLAConfig:
    """A published folder's config with ours; has what the wrapper asks of a LeRobot config.

    Args:
        raw: config.json as it was read, `norm_stats` included; what is stored again.
        text: the language model's transformers config.
        means, stds: of pixels, for each vision tower.
        image_size: edge of the images that the towers take.
        space: actions as the entry of norm_stats in use has them.
        shapes: camera to (height, width).
    """

    raw: dict[str, Any]
    settings: Settings
    text: Any
    means: list[list[float]]
    stds: list[list[float]]
    image_size: int
    space: ActionSpace
    shapes: dict[str, tuple[int, int]]

    training = "autoregressive"
    observation_delta_indices = None
    block, shift, prompt_sees_actions = 1, True, False

    @property
    def type(self) -> str:
        return "openvla_oft" if self.settings.head == "l1" else "openvla"

    @property
    def chunk_size(self) -> int:
        return self.settings.chunk_size

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.chunk_size))

    @property
    def n_action_steps(self) -> int:
        return self.settings.n_action_steps or self.chunk_size

    @property
    def action_dim(self) -> int:
        return self.space.action_dim

    @property
    def length(self) -> int:
        return self.chunk_size * self.action_dim

    @property
    def image_features(self) -> dict[str, Any]:
        from lerobot.configs.types import FeatureType, PolicyFeature

        return {
            IMAGES + camera: PolicyFeature(FeatureType.VISUAL, (3, *shape)) for camera, shape in self.shapes.items()
        }

    @property
    def action_feature(self) -> Any:
        from lerobot.configs.types import FeatureType, PolicyFeature

        return PolicyFeature(FeatureType.ACTION, (self.action_dim,))

    @property
    def robot_state_feature(self) -> Any:
        from lerobot.configs.types import FeatureType, PolicyFeature

        return PolicyFeature(FeatureType.STATE, (self.settings.state_dim,))

    def stored(self) -> dict[str, Any]:
        """config.json as it is written."""
        return {**self.raw, OWN: asdict(self.settings)}


def read_config(folder: Path, raw: dict[str, Any], overrides: dict[str, Any], features: dict[str, Any] | None,
                stats: dict[str, Any] | None, source: str) -> OpenVLAConfig:  # fmt: skip
    """The config of a folder.

    Args:
        features: LeRobot features that replace cameras, state and action.
        stats: LeRobot statistics that become the entry of norm_stats in use.
    """
    where = str(folder / CONFIG)
    check_model_numbers(raw, where)
    backbone = raw.get("vision_backbone_id")
    if not isinstance(backbone, str) or backbone not in BACKBONES:
        raise BurnishError(f"{where}: vision_backbone_id is {str(backbone)[:60]!r}", f"one of {', '.join(BACKBONES)}")
    if raw.get("image_resize_strategy") != "resize-naive":
        raise BurnishError(f"{where}: image_resize_strategy is {str(raw.get('image_resize_strategy'))[:60]!r}",
                           "resize-naive, as OpenVLA was trained")  # fmt: skip
    for name, default in (("n_action_bins", 256), ("pad_to_multiple_of", 64)):
        value = raw.setdefault(name, default)
        if type(value) is not int or not 2 <= value <= 4096:
            raise BurnishError(f"{where}: {name} is {str(value)[:60]}", "a whole number from 2 to 4096")
    own = raw.get(OWN, {})
    if not isinstance(own, dict):
        raise BurnishError(f"{where}: '{OWN}' is {str(own)[:60]}", "a table of settings")
    settings = read_options(Settings, {**own, **overrides}, where)
    if not all(isinstance(camera, str) and camera for camera in settings.cameras):
        raise BurnishError(f"{where}: cameras are {str(settings.cameras)[:60]}", "names of 1 to 16 cameras")
    raw, settings = _statistics(folder, dict(raw), settings, stats, features, source)
    key, entry = choose_stats(raw.get("norm_stats"), settings.unnorm_key, where)
    size = _image_size(raw, settings, BACKBONES[backbone][2], where)
    shape = settings.image_shape or [size, size]
    if len(shape) != 2 or not all(type(edge) is int and 1 <= edge <= MOST_EDGE for edge in shape):
        raise BurnishError(f"{where}: image_shape is {shape}", f"height and width, from 1 to {MOST_EDGE}")
    shapes = {camera: (shape[0], shape[1]) for camera in settings.cameras}
    if features is not None:
        views = {name.removeprefix(IMAGES): one for name, one in features.items() if name.startswith(IMAGES)}
        shapes = {camera: tuple(one.shape[-2:]) for camera, one in views.items()}
        known = set(settings.cameras) == set(shapes)
        if settings.proprio and STATE not in features:
            raise BurnishError(f"{where} reads the robot's state, and the data set has none", STATE)
        states = features[STATE].shape[0] if STATE in features else settings.state_dim
        settings = replace(settings, cameras=settings.cameras if known else list(shapes), state_dim=states)
        shapes = {camera: shapes[camera] for camera in settings.cameras}
    if not 1 <= len(shapes) <= 16:
        raise BurnishError(f"{where}: cameras are {list(shapes)}", "names of 1 to 16 cameras")
    text = text_config(raw, where)
    space = ActionSpace(entry, settings.normalization, raw["n_action_bins"],
                        text.vocab_size - raw["pad_to_multiple_of"], text.vocab_size, settings.gripper == "libero",
                        where)  # fmt: skip
    settings = replace(settings, unnorm_key=key, state_dim=settings.state_dim or space.state_dim or space.action_dim)
    if settings.proprio and settings.state_dim != space.state_dim:
        raise BurnishError(f"{where}: a state of {settings.state_dim} dimensions, and norm_stats of {space.state_dim}",
                           "statistics of proprio for the state of the head",
                           "unnorm_key, of the data of the head")  # fmt: skip
    return OpenVLAConfig(raw, settings, text, *_pixels(folder), size, space, shapes)


def text_config(raw: dict[str, Any], where: str) -> Any:
    """The language model's config: Llama 2 of 7 billion parameters in what the folder leaves out."""
    from transformers import LlamaConfig

    given = raw.get("text_config")
    if not isinstance(given, dict) or given.get("model_type") != "llama":
        raise BurnishError(f"{where}: text_config is no llama", "a language model of type llama")
    sevenb = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
              "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}  # fmt: skip
    known = {*sevenb, "vocab_size", "num_key_value_heads", "head_dim", "hidden_act", "pad_token_id"}
    chosen = {**sevenb, **{name: value for name, value in given.items() if name in known}}
    theta = given.get("rope_theta", 10000.0)
    if not number(theta) or not 1 <= theta <= 1e9 or chosen.get("hidden_act", "silu") != "silu":
        raise BurnishError(f"{where}: rope_theta {theta!r}, hidden_act {chosen.get('hidden_act')!r}",
                           "those of Llama 2")  # fmt: skip
    with foreign(f"{where}: text_config cannot be read", "a Llama config of transformers"):
        return LlamaConfig(**chosen, rope_parameters={"rope_type": "default", "rope_theta": float(theta)})


def towers(config: OpenVLAConfig) -> list[tuple[str, dict[str, Any]]]:
    """timm's name of each vision tower, and the sizes that differ from it."""
    names, sizes = BACKBONES[config.raw["vision_backbone_id"]][:2], config.settings.towers
    if sizes and len(sizes) != len(names):
        raise BurnishError(f"sizes of {len(sizes)} vision towers", f"{len(names)}, or none")
    made = [asdict(read_options(Tower, one, "towers")) for one in sizes] or [{} for _ in names]
    return [(name, {k: v for k, v in one.items() if v is not None}) for name, one in zip(names, made, strict=True)]


def _image_size(raw: dict[str, Any], settings: Settings, default: int, where: str) -> int:
    sizes = raw.get("image_sizes", [default] * 2)
    if not isinstance(sizes, list) or len(sizes) != 2 or sizes[0] != sizes[1] or type(sizes[0]) is not int:
        raise BurnishError(f"{where}: image_sizes are {str(sizes)[:60]}", "one size of both vision towers")
    patch = read_options(Tower, settings.towers[0], "towers").patch_size if settings.towers else 14
    if not patch <= sizes[0] <= MOST_EDGE or sizes[0] % patch:
        raise BurnishError(f"{where}: images of {sizes[0]} pixels", f"a multiple of the patches of {patch}")
    return sizes[0]


def _statistics(folder: Path, raw: dict[str, Any], settings: Settings, stats: dict[str, Any] | None,
                features: dict[str, Any] | None, source: str) -> tuple[dict[str, Any], Settings]:  # fmt: skip
    """`raw` with the norm_stats that count: those of the fine-tuning beside it, and the given ones."""
    known = raw.get("norm_stats")
    if (folder / STATISTICS).is_file():
        known = read_object(folder / STATISTICS, folder)
    if stats is None:
        return {**raw, "norm_stats": known}, settings
    wanted = BOUNDS[settings.normalization]
    width = {key: one.shape[0] for key, one in (features or {}).items() if key in (ACTION, STATE)}
    entry = stats_entry(stats, ACTION, STATE)
    for key, name in ((ACTION, "action"), (STATE, "proprio")) if settings.proprio else ((ACTION, "action"),):
        lacking = [one for one in wanted if one not in entry.get(name, {})]
        if lacking:
            raise BurnishError(f"no statistic '{lacking[0]}' of {key} in {source}",
                               f"what normalization {settings.normalization} needs")  # fmt: skip
        if len(entry[name][wanted[0]]) != width.get(key, len(entry[name][wanted[0]])):
            raise BurnishError(f"statistics of {key} in {source} have {len(entry[name][wanted[0]])} dimensions",
                               f"{width[key]}, as the features declare")  # fmt: skip
    known = {**(known if isinstance(known, dict) else {}), OWN_KEY: entry}
    return {**raw, "norm_stats": known}, replace(settings, unnorm_key=OWN_KEY)


def _pixels(folder: Path) -> tuple[list[list[float]], list[list[float]]]:
    """Means and deviations of pixels: the folder's `tvf_normalize_params` where it has them, as its own reader does."""
    path = folder / IMAGE_PROCESSOR
    if not path.is_file():
        return _MEANS, _STDS
    found = read_object(path, folder)
    means, stds = found.get("means", _MEANS), found.get("stds", _STDS)
    stored = found.get("tvf_normalize_params")
    if isinstance(stored, list) and all(isinstance(one, dict) for one in stored):
        means, stds = ([one.get(name) for one in stored] for name in ("mean", "std"))
    for name, values in (("means", means), ("stds", stds)):
        three = isinstance(values, list) and len(values) == 2 and all(
            isinstance(one, list) and len(one) == 3 and all(map(number, one)) for one in values)  # fmt: skip
        if not three or (name == "stds" and min(map(min, values)) <= 0):
            raise BurnishError(f"{path}: {name} are {str(values)[:60]}", "three numbers for each of two vision towers")
    return means, stds
