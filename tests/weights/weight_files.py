"""Checkpoints of a few thousand numbers in the shapes of real ones."""

import json
import struct
from pathlib import Path

import numpy as np

SHAPES = {
    "model.vlm.lm_head.weight": (37, 16),
    "model.vlm.vision_model.patch_embedding.weight": (8, 3, 4, 4),
    "model.vlm.text_model.layers.0.q_proj.weight": (33, 40),
    "model.vlm.text_model.layers.0.norm.weight": (40,),
    "model.vlm.text_model.layers.1.down_proj.weight": (40, 1000),
    "model.lm_expert.layers.0.k_proj.weight": (7, 12),
    "model.action_in_proj.weight": (12, 8),
    "model.action_out_proj.bias": (8,),
    "model.scalar": (),
    "model.empty": (0, 4),
}


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16 bits, ties to even."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def write_file(path: Path, tensors: dict[str, tuple[str, np.ndarray]], metadata: dict | None = None) -> None:
    """A safetensors file by hand, so that the tests do not lean on the code they test."""
    header, offset, data = {"__metadata__": metadata or {"format": "pt"}}, 0, b""
    for name, (dtype, array) in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offset, offset + len(raw)]}
        offset, data = offset + len(raw), data + raw
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_file(path: Path) -> dict[str, np.ndarray]:
    """Stored bits by name."""
    kinds = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64, "F64": np.float64}
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(content[8 + length :][slice(*e["data_offsets"])], kinds[e["dtype"]]).reshape(e["shape"])
        for name, e in header.items()
    }


class FolderMaker:
    """Writes checkpoint folders below `root` and remembers their float32 values."""

    def __init__(self, root: Path):
        self.root, self.joints = root, 7
        self.values: dict[str, dict[str, np.ndarray]] = {}

    def __call__(self, name: str, seed: int, of: str = "", dtype: str = "F32", shapes=None, shards=1, spread=0.004):
        rng = np.random.default_rng(seed)
        made = {}
        for key, shape in (shapes or SHAPES).items():
            start = self.values[of][key] if of else 0.0
            made[key] = (start + rng.normal(scale=spread if of else 0.02, size=shape)).astype(np.float32)
            if dtype == "BF16":
                made[key] = from_bf16(to_bf16(made[key]))
            elif dtype == "F16":
                made[key] = made[key].astype(np.float16).astype(np.float32)
        self.values[name] = made
        return self.save(name, made, dtype, shards)

    def save(self, name: str, values: dict[str, np.ndarray], dtype: str = "F32", shards: int = 1) -> Path:
        folder = self.root / name
        pack = {"F32": lambda v: v, "BF16": to_bf16, "F16": lambda v: v.astype(np.float16)}[dtype]
        tensors = {key: (dtype, pack(value)) for key, value in values.items()}
        tensors["model.position_ids"] = ("I64", np.arange(5))
        folder.mkdir(parents=True, exist_ok=True)
        config = {"type": "smolvla", "vlm_model_name": str(folder) + "/vlm"}
        config |= {"input_features": {"observation.state": {"shape": [self.joints]}}}
        config |= {"output_features": {"action": {"shape": [self.joints]}}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "vlm").mkdir(exist_ok=True)
        (folder / "vlm" / "tokenizer.json").write_text("{}")
        if shards == 1:
            write_file(folder / "model.safetensors", tensors)
            return folder
        names, weight_map = list(tensors), {}
        for k in range(shards):
            file = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
            own = {n: tensors[n] for n in names[k::shards]}
            write_file(folder / file, own)
            weight_map |= dict.fromkeys(own, file)
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder


def weights(folder: Path) -> dict[str, np.ndarray]:
    """Stored bits of all tensors of a folder, shards joined."""
    found = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found |= read_file(file)
    return found


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and a[key].tobytes() == b[key].tobytes(), key
