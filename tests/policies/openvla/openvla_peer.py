"""The released code of OpenVLA and OpenVLA-OFT on the folders of `test_openvla_parity.py`: makes numbers-*.safetensors.

Run by hand. Nothing of burnish is imported, and the test needs nothing of this:

    python tests/policies/openvla/test_openvla_parity.py /tmp/parity      # writes the folders openvla and openvla_oft
    python3.12 -m venv peer && peer/bin/pip install torch torchvision timm==0.9.16 transformers==4.40.1 'numpy<2.3'
    peer/bin/python tests/policies/openvla/openvla_peer.py openvla /tmp/parity/openvla CODE numbers-openvla.safetensors
    peer/bin/python tests/policies/openvla/openvla_peer.py oft /tmp/parity/openvla_oft CODE numbers-oft.safetensors
    python3.12 -m venv tf && tf/bin/pip install tensorflow-cpu torch
    tf/bin/python tests/policies/openvla/openvla_peer.py images - - numbers-images.safetensors

CODE has prismatic/ of github.com/openvla/openvla at c8f03f4, or of github.com/moojink/openvla-oft at 213c5ff with
modeling_llama.py of github.com/moojink/transformers-openvla-oft at bc339d9 beside it: the files that are imported
below, in packages with empty __init__.py (theirs import data pipelines).
"""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import openvla_inputs as inputs
import torch


def released(code: str, fork: bool):
    """The modules of the released code; the fork of transformers differs in one file."""
    sys.path.insert(0, code)
    if fork:
        name = "transformers.models.llama.modeling_llama"
        spec = importlib.util.spec_from_file_location(name, Path(code) / "modeling_llama.py")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for part in ("diffusers", "diffusers.schedulers", "diffusers.schedulers.scheduling_ddim"):
            sys.modules[part] = types.ModuleType(part)
        sys.modules["diffusers.schedulers.scheduling_ddim"].DDIMScheduler = object
    import timm
    from prismatic.extern.hf import modeling_prismatic, processing_prismatic

    return modeling_prismatic, processing_prismatic, timm


def load(folder: str, code: str, fork: bool):
    """The released model and processor on a folder; timm makes small towers."""
    from transformers import LlamaTokenizerFast

    modeling, processing, timm = released(code, fork)
    config = modeling.OpenVLAConfig.from_pretrained(folder)
    towers, make = iter(config.burnish["towers"]), timm.create_model
    timm.create_model = lambda *args, **named: make(*args, **named, **{"mlp_ratio": 2.0, **next(towers)})
    model = modeling.OpenVLAForActionPrediction._from_config(
        config, attn_implementation="sdpa", torch_dtype=torch.float32
    )
    from safetensors.torch import load_file

    missing = model.load_state_dict(load_file(Path(folder) / "model.safetensors"), strict=False)
    assert not missing.missing_keys and not missing.unexpected_keys, missing
    processor = processing.PrismaticProcessor.__new__(processing.PrismaticProcessor)
    processor.tokenizer = LlamaTokenizerFast.from_pretrained(folder)
    processor.image_processor = processing.PrismaticImageProcessor.from_pretrained(folder)
    return model.eval(), processor


def observation(processor, number: int, size=(28, 28)):
    from PIL import Image

    task = inputs.TASKS[number].lower()
    text = processor.tokenizer(f"In: What action should the robot take to {task}?\nOut:", return_tensors="pt")
    pixels = processor.image_processor(Image.fromarray(inputs.image(number, *size).numpy()), return_tensors="pt")
    return text, pixels["pixel_values"]


def sequences(processor, actions, chunk: bool):
    """ids and labels as `RLDSBatchTransform` makes them, padded on the right as the collator does."""
    from prismatic.vla.action_tokenizer import ActionTokenizer

    write, rows = ActionTokenizer(processor.tokenizer), []
    for number, task in enumerate(inputs.TASKS):
        first, *others = actions[number].numpy()
        text = write(first) + ("".join(write(np.stack(others))) if chunk else "")
        prompt = f"In: What action should the robot take to {task.lower()}?\nOut: {text}</s>"
        ids = torch.tensor(processor.tokenizer(prompt, add_special_tokens=True).input_ids)
        labels = ids.clone()
        labels[: -((actions[number].numel() if chunk else 7) + 1)] = -100
        rows.append((ids, labels))
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([row[0] for row in rows], batch_first=True, padding_value=inputs.VOCABULARY)
    return ids, pad([row[1] for row in rows], batch_first=True, padding_value=-100)


@torch.no_grad()
def openvla(folder: str, code: str) -> dict[str, torch.Tensor]:
    model, processor = load(folder, code, fork=False)
    ids, labels = sequences(processor, inputs.numbers(0, 2, 1, 7).clamp(-1, 1), chunk=False)
    pixels = torch.cat([observation(processor, number)[1] for number in range(2)])
    mask = ids.ne(inputs.VOCABULARY)
    out = model(input_ids=ids, attention_mask=mask, pixel_values=pixels, labels=labels, output_hidden_states=True)
    patches = out.logits.shape[1] - ids.shape[1]
    found = {"ids": ids, "labels": labels, "loss": out.loss[None], "pixels": pixels}
    rows = [out.logits[b, patches:][labels[b].roll(-1, 0) != -100] for b in range(2)]
    found["logits"], found["normaliser"] = torch.stack(rows)[..., -320::5], torch.stack(rows).logsumexp(-1)
    for number in range(2):
        text, pixels = observation(processor, number, inputs.SIZES[1])
        found[f"pixels{number}"] = pixels
        kept = model.generate
        model.generate = lambda *args, **named: found.setdefault(f"tokens{number}", kept(*args, **named))  # noqa: B023
        action = model.predict_action(input_ids=text.input_ids, attention_mask=text.attention_mask, pixel_values=pixels,
                                      unnorm_key="data", do_sample=False)  # fmt: skip
        model.generate = kept
        found[f"tokens{number}"] = found[f"tokens{number}"][0, -7:]
        found[f"action{number}"] = torch.tensor(action)
    return found


@torch.no_grad()
def oft(folder: str, code: str) -> dict[str, torch.Tensor]:
    model, processor = load(folder, code, fork=True)
    from prismatic.models.action_heads import L1RegressionActionHead
    from prismatic.models.projectors import ProprioProjector
    from prismatic.training.train_utils import get_current_action_mask, get_next_actions_mask
    from safetensors.torch import load_file

    width = model.llm_dim
    head, projector = L1RegressionActionHead(width, width, 7), ProprioProjector(width, inputs.STATE_DIM)
    head.load_state_dict(load_file(Path(folder) / "action_head.safetensors"))
    projector.load_state_dict(load_file(Path(folder) / "proprio_projector.safetensors"))
    model.vision_backbone.set_num_images_in_input(2)
    views = [torch.cat([observation(processor, n)[1], views_of(processor, n + 2)], 1) for n in range(2)]
    state, actions = inputs.numbers(5, 2, inputs.STATE_DIM), inputs.numbers(0, 2, 8, 7)
    ids, labels = sequences(processor, actions, chunk=True)
    out = model(input_ids=ids, attention_mask=ids.ne(inputs.VOCABULARY), pixel_values=torch.cat(views), labels=labels,
                output_hidden_states=True, proprio=state, proprio_projector=projector)  # fmt: skip
    patches = model.vision_backbone.get_num_patches() * 2 + 1
    wanted = labels[:, 1:]
    mask = get_current_action_mask(wanted) | get_next_actions_mask(wanted)
    hidden = out.hidden_states[-1][:, patches:-1][mask].reshape(2, 56, -1)
    predicted = head.predict_action(hidden)
    found = {"ids": ids, "hidden": hidden, "predicted": predicted, "loss": (predicted - actions).abs().mean()[None]}
    for number in range(2):
        text, _ = observation(processor, number)
        action, _ = model.predict_action(
            input_ids=text.input_ids, attention_mask=text.attention_mask, pixel_values=views[number], unnorm_key="data",
            proprio=state[number].numpy(), proprio_projector=projector, action_head=head,
        )  # fmt: skip
        found[f"action{number}"] = torch.tensor(action)
    return found


def views_of(processor, number: int) -> torch.Tensor:
    from PIL import Image

    one = Image.fromarray(inputs.image(number, 28, 28).numpy())
    return processor.image_processor(one, return_tensors="pt")["pixel_values"]


def images() -> dict[str, torch.Tensor]:
    """What the evaluation scripts do with TensorFlow: lanczos3, and the middle 90 per cent."""
    import tensorflow as tf

    found = {}
    for size in ((28, 28), (40, 52), (20, 24), (224, 224)):
        picture = inputs.image(3, *size).numpy()
        edge = 224 if size[0] == 224 else 28
        resized = tf.image.resize(picture, (edge, edge), method="lanczos3", antialias=True)
        resized = tf.cast(tf.clip_by_value(tf.round(resized), 0, 255), tf.uint8)
        share = tf.reshape(tf.clip_by_value(tf.sqrt(0.9), 0, 1), (1,))
        offset = (1 - share) / 2
        box = tf.stack([offset, offset, offset + share, offset + share], axis=1)
        whole = tf.image.convert_image_dtype(resized, tf.float32)[None]
        cropped = tf.image.crop_and_resize(whole, box, tf.range(1), (edge, edge))[0]
        cropped = tf.image.convert_image_dtype(tf.clip_by_value(cropped, 0, 1), tf.uint8, saturate=True)
        name = "x".join(map(str, size))
        found |= {f"resized{name}": torch.from_numpy(resized.numpy())} if edge == 28 else {}
        found[f"cropped{name}"] = torch.from_numpy(cropped.numpy())[:: edge // 28, :: edge // 28]
    return found


if __name__ == "__main__":
    from safetensors.torch import save_file

    kind, folder, code, output = sys.argv[1:]
    sys.argv = sys.argv[:1]  # the released constants look for robots' names in it
    made = images() if kind == "images" else {"openvla": openvla, "oft": oft}[kind](folder, code)
    save_file({name: tensor.contiguous() for name, tensor in made.items()}, output)
    print(output, {name: tuple(tensor.shape) for name, tensor in made.items()})
