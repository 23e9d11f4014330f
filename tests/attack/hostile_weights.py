"""Small checkpoints and adapters, whole or broken, of which the attacks on weights are made."""

import json
import struct

import numpy as np

A = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
B = np.random.default_rng(1).normal(size=(5,)).astype(np.float32)
CONFIG = {"input_features": {"observation.state": {"shape": [7]}}, "output_features": {"action": {"shape": [7]}}}


def raw(path, header, data=b"", length=None):
    """A safetensors file of any bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(shape, begin=0, end=None, dtype="F32"):
    return {
        "dtype": dtype,
        "shape": shape,
        "data_offsets": [begin, begin + 4 * int(np.prod(shape)) if end is None else end],
    }


def write(path, tensors):
    header, data = {}, b""
    for name, value in tensors.items():
        header[name] = entry(list(value.shape), len(data))
        data += value.tobytes()
    raw(path, header, data)


def checkpoint(folder, shift=0.0):
    write(folder / "model.safetensors", {"a.weight": A + np.float32(shift), "b.bias": B + np.float32(shift)})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def adapter(folder, settings=None, tensors=None):
    up, down = np.ones((6, 2), np.float32), np.ones((2, 8), np.float32)
    own = {"base_model.model.a.lora_A.weight": down, "base_model.model.a.lora_B.weight": up, **(tensors or {})}
    write(folder / "adapter_model.safetensors", own)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **(settings or {})}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
