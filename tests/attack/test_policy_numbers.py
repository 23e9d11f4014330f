"""Any value of any JSON of a policy folder replaced by any other: the policy loads, or one error says what is wrong."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from burnish.core.errors import BurnishError
from burnish.policies import load_policy
from burnish.policies.sizes import check_policy_numbers

JUNK = (None, True, -1, 0, 10**9, 1.5, float("nan"), "", "x", "../x", "owner/name", [], [1], {}, {"a": 1})
FILES = {
    "smolvla": ("config.json", "policy_preprocessor.json", "policy_postprocessor.json", "vlm/config.json",
                "vlm/processor_config.json", "vlm/tokenizer_config.json"),
    "pi0": ("config.json", "policy_preprocessor.json", "tiny.json", "tokenizer/tokenizer_config.json"),
    "burnish_discrete": ("config.json", "vlm/config.json"),
}  # fmt: skip
ROUNDS = int(os.environ.get("BURNISH_FUZZ", "6"))


def places(value, path=()):
    """Paths of all values in nested JSON."""
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from places(part, (*path, key))


def replaced(content, path, value):
    if not path:
        return value
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return content


@pytest.fixture(params=FILES)
def policy_folder(request, tmp_path):
    if request.param == "burnish_discrete":
        from workshop.tiny import make_tiny

        return request.param, make_tiny("burnish_discrete", tmp_path / "policy", cameras=("top", "wrist"))
    source = request.getfixturevalue(f"tiny_{request.param}")
    return request.param, Path(shutil.copytree(source, tmp_path / "policy"))


def test_any_value_may_be_anything(policy_folder):
    kind, folder = policy_folder
    for name in FILES[kind]:
        whole = (folder / name).read_text()
        chosen = random.Random(f"{kind} {name}")
        paths = list(places(json.loads(whole)))
        for _ in range(ROUNDS):
            path, junk = chosen.choice(paths), chosen.choice(JUNK)
            (folder / name).write_text(json.dumps(replaced(json.loads(whole), path, junk)))
            try:
                load_policy(folder)
            except BurnishError as error:
                assert "\n" not in str(error), (name, path, junk)
            except Exception as error:
                raise AssertionError(f"{name} {path} = {junk!r}: {type(error).__name__} {error}") from error
        (folder / name).write_text(whole)


def test_the_default_that_lerobot_writes_for_diffusion_is_read():
    check_policy_numbers({"type": "diffusion", "num_inference_steps": None}, "config.json")
    with pytest.raises(BurnishError, match="num_inference_steps is None"):
        check_policy_numbers({"type": "pi0", "num_inference_steps": None}, "config.json")
