"""`burnish weights convert`: OFT's pickled heads become safetensors, and nothing in a pickle is carried out."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from burnish.cli.main import main
from burnish.core.errors import BurnishError
from burnish.policies import load_policy
from burnish.weights.convert import convert

CAMERAS = ("top", "wrist")


@pytest.fixture
def published(tiny_openvla_oft, tmp_path):
    """As the authors publish: heads pickled, one of them by DistributedDataParallel; nothing of ours in config.json."""
    folder = Path(shutil.copytree(tiny_openvla_oft, tmp_path / "published"))
    head, proprio = (load_file(folder / f"{name}.safetensors") for name in ("action_head", "proprio_projector"))
    torch.save({f"module.{name}": tensor for name, tensor in head.items()}, folder / "action_head--50_checkpoint.pt")
    torch.save(proprio, folder / "proprio_projector--50_checkpoint.pt")
    shutil.copy(folder / "action_head.safetensors", tmp_path / "head.safetensors")
    for name in ("action_head", "proprio_projector"):
        (folder / f"{name}.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["burnish"] = {"towers": config["burnish"]["towers"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_converted_folder_is_the_policy(published, tiny_openvla_oft, tmp_path, capsys):
    with pytest.raises(BurnishError, match=r"pickled.*burnish weights convert"):
        load_policy(published)
    out = tmp_path / "out"
    assert (
        main(["weights", "convert", str(published), str(out), "--camera", "top", "--camera", "wrist", "--no-crop"]) == 0
    )
    assert "action_head (16 tensors), proprio_projector (4 tensors)" in capsys.readouterr().out
    ours, theirs = load_policy(out), load_policy(tiny_openvla_oft)
    for (name, a), (other, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert name == other and a.equal(b)
    assert (ours.name, ours.cameras, ours.chunk_size, ours.n_action_steps) == ("openvla_oft", CAMERAS, 8, 8)
    assert not ours.config.settings.center_crop and not list(out.glob("*.pt"))
    with pytest.raises(BurnishError, match="exists"):
        convert(published, out, cameras=CAMERAS)
    convert(published, out, cameras=["one"], force=True)
    assert load_policy(out).config.settings.center_crop and load_policy(out).cameras == ("one",)


class Opens:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def head_file(published):
    return next(published.glob("action_head*.pt"))


def repacked(path: Path, change) -> None:
    with zipfile.ZipFile(path) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    change(parts, path)


def packed(parts, path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def wide(path):
    """Tensors of a huge size on one stored number."""
    state = load_file(path.parent.with_name("head.safetensors"))
    torch.save({name: tensor[(0,) * tensor.ndim].expand(10_000_000) for name, tensor in state.items()}, path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path, ran: torch.save({"model.fc1.weight": Opens(ran)}, path), "cannot be read"),
        (lambda path, ran: torch.save([1, 2], path), "no table"),
        (lambda path, ran: torch.save({"other": torch.zeros(2)}, path), "missing|unknown"),
        (lambda path, ran: path.write_bytes(b"\x80\x02}q\x00."), "no archive"),
        (lambda path, ran: path.write_bytes(path.read_bytes()[:-100]), "no archive|cannot be read"),
        (lambda path, ran: repacked(path, packed), "packed"),
        (lambda path, ran: wide(path), "larger than itself"),
        (lambda path, ran: shutil.copy(path, path.with_name("action_head--60_checkpoint.pt")), "2 heads"),
        (lambda path, ran: path.unlink(), "no action_head"),
        (lambda path, ran: path.with_name("noisy_action_projector--50_checkpoint.pt").write_bytes(b""), "diffusion"),
        (lambda path, ran: path.with_name("vision_backbone--50_checkpoint.pt").write_bytes(b""), "FiLM"),
    ],
    ids=["code", "list", "names", "bare", "cut", "packed", "wide", "two", "none", "diffusion", "film"],
)
def test_what_is_no_head_is_one_line(published, tmp_path, spoil, message):
    ran = tmp_path / "ran"
    spoil(head_file(published), ran)
    with pytest.raises(BurnishError, match=message):
        convert(published, tmp_path / "out", cameras=CAMERAS)
    assert not ran.exists() and not (tmp_path / "out").exists()


def test_heads_that_are_not_finite_are_refused(published, tmp_path):
    path = head_file(published)
    state = load_file(published.with_name("head.safetensors"))
    state["model.fc1.bias"][0] = torch.nan
    torch.save(state, path)
    with pytest.raises(BurnishError, match="NaN"):
        convert(published, tmp_path / "out", cameras=CAMERAS)
