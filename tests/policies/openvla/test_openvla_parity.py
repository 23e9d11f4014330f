"""OpenVLA and OpenVLA-OFT against numbers of the released code on the same weights; see openvla_peer.py.

The weights are closed forms of the tensors' names, so only what came out is stored.
"""

import sys
from pathlib import Path

import openvla_inputs as inputs
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from burnish.policies import load_policy
from burnish.policies.openvla import files, images
from workshop.tiny_openvla import make_openvla

CAMERAS = tuple(f"observation.images.{name}" for name in inputs.OWN["cameras"])
HERE = Path(__file__).parent


def make(kind: str, folder: Path) -> Path:
    """A folder of that type with weights in closed form, statistics "data", and Llama's 32,000 tokens."""
    stats = {"data": {"action": inputs.norm_stats(7, True), "proprio": inputs.norm_stats(inputs.STATE_DIM, False)}}
    own = inputs.OWN if kind == "openvla_oft" else {**inputs.OWN, "cameras": ["main"], "chunk_size": 1}
    make_openvla(kind, folder, None, None, own, 0, norm_stats=stats, vocabulary=inputs.VOCABULARY, empty=inputs.EMPTY)
    policy = load_policy(folder)
    with torch.no_grad():
        for name, parameter in policy.policy.named_parameters():
            parameter.copy_(inputs.weight(name, tuple(parameter.shape)))
    policy.save(folder)
    return folder


def numbers(kind: str) -> dict[str, torch.Tensor]:
    return load_file(HERE / f"numbers-{kind}.safetensors")


@pytest.fixture(scope="module")
def openvla(tmp_path_factory):
    return load_policy(make("openvla", tmp_path_factory.mktemp("parity") / "openvla"))


@pytest.fixture(scope="module")
def oft(tmp_path_factory):
    return load_policy(make("openvla_oft", tmp_path_factory.mktemp("parity") / "oft"))


def shares(*images: torch.Tensor) -> torch.Tensor:
    return torch.stack(images).permute(0, 3, 1, 2) / 255


def batch_of(policy, numbers_of=(0, 1), size=(28, 28)):
    views = {key: shares(*(inputs.image(n + 2 * i, *size) for n in numbers_of)) for i, key in enumerate(CAMERAS)}
    found = {key: view for key, view in views.items() if key in policy.camera_keys}
    return {**found, "task": [inputs.TASKS[n] for n in numbers_of]}


def raw_actions(policy, normalised: torch.Tensor) -> torch.Tensor:
    return policy.postprocessor(normalised)


def near(found, expected):
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-5)


def test_openvla_reads_and_trains_as_released(openvla):
    released, normalised = numbers("openvla"), inputs.numbers(0, 2, 1, 7).clamp(-1, 1)
    batch = {**batch_of(openvla), "action": raw_actions(openvla, normalised)}
    ids, mask = files.encode(openvla.tokenizer, batch["task"])
    for row in range(2):
        told = released["ids"][row][released["ids"][row] != inputs.VOCABULARY].tolist()
        written = openvla.config.space.encode(openvla.preprocessor(batch["action"]))[row].tolist()
        assert told == [1, *ids[row][mask[row]].tolist(), *written, 2]
    with torch.no_grad():
        prepared = openvla._prepare(batch, batch["action"])
        near(openvla.prepare_images(prepared)[0][0], released["pixels"])
        written = openvla.config.space.encode(prepared["action"])[:, None]
        logits = openvla.policy.chunk_logits(openvla._embed(prepared), written, stop=True)[:, 0]
        near(logits[..., -320::5], released["logits"])
        near(logits.logsumexp(-1), released["normaliser"])
        near(openvla.loss(batch).total[None], released["loss"])


def test_openvla_acts_as_released(openvla):
    released = numbers("openvla")
    policy = openvla
    policy.config.settings.resize = "bicubic"
    try:
        for number in range(2):
            batch = batch_of(policy, (number,), inputs.SIZES[1])
            near(policy.prepare_images(batch)[0][0], released[f"pixels{number}"])
            ids = policy._decoder(policy._embed(policy._prepare(batch, None))).ids if policy._decoder else None
            near(policy.act(batch).actions[0, 0], released[f"action{number}"])
            ids = policy._decoder(policy._embed(policy._prepare(batch, None))).ids if ids is None else ids
            assert ids[0].tolist() == released[f"tokens{number}"].tolist()
    finally:
        policy.config.settings.resize = "lanczos3"


def test_oft_trains_and_acts_as_released(oft):
    released, normalised = numbers("oft"), inputs.numbers(0, 2, 8, 7)
    state = oft.config.space.state
    raw = (inputs.numbers(5, 2, inputs.STATE_DIM).double() + 1) / 2 * (state[1] - state[0] + 1e-8) + state[0]
    batch = {**batch_of(oft), "observation.state": raw.float(), "action": raw_actions(oft, normalised)}
    with torch.no_grad():
        prepared = oft._prepare(batch, batch["action"])
        near(prepared["observation.state"], inputs.numbers(5, 2, inputs.STATE_DIM))
        prompt = oft._embed(prepared)
        near(oft.policy.actions(prompt, 2), released["predicted"])
        near(oft.loss(batch).total[None], released["loss"])
        found = oft.act(batch).actions
    for number in range(2):
        near(found[number], released[f"action{number}"])


@pytest.mark.parametrize("size", [(28, 28), (40, 52), (20, 24), (224, 224)])
def test_images_are_resized_and_cropped_as_by_tensorflow(size):
    released, name = numbers("images"), "x".join(map(str, size))
    edge = 224 if size[0] == 224 else 28
    pixels = images.resized(images.pixels_of(shares(inputs.image(3, *size))), edge, "lanczos3")
    if edge == 28:  # the larger picture is stored cropped alone
        expected = released[f"resized{name}"].float()
        wrong = pixels[0].permute(1, 2, 0) - expected
        assert wrong.abs().max() <= 1 and (wrong != 0).sum() <= 1  # 140.5 of one pixel, which may go either way
        pixels = expected.permute(2, 0, 1)[None]
    cropped = images.centre_crop(pixels)[0].permute(1, 2, 0)
    assert cropped[:: edge // 28, :: edge // 28].equal(released[f"cropped{name}"].float())


@pytest.mark.parametrize("size", [(40, 52), (20, 24), (28, 90)])
def test_bicubic_is_pillows_to_the_bit(size):
    picture = inputs.image(1, *size)
    expected = Image.fromarray(picture.numpy()).resize((28, 28), Image.Resampling.BICUBIC)
    found = images.resized(images.pixels_of(shares(picture)), 28, "bicubic")[0].permute(1, 2, 0)
    assert found.equal(torch.tensor(list(expected.tobytes())).view(28, 28, 3).float())


if __name__ == "__main__":
    for kind in ("openvla", "openvla_oft"):
        print(make(kind, Path(sys.argv[1]) / kind))
