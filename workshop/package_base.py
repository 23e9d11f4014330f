"""`python -m workshop package-base`: store a policy in half precision as a base that comes with the package."""

import argparse
import json
from pathlib import Path

import torch

from burnish.core.errors import BurnishError
from burnish.core.files import new_folder
from burnish.core.reading import read_object
from burnish.policies import load_policy
from burnish.policies.folder import point_at
from burnish.policies.keys import VLM_FOLDER

LIMIT_MB = 20
CHECKOUT = Path(__file__).resolve().parents[1]


def package_base(policy: Path | str, name: str, facts: dict | None = None, checkout: Path = CHECKOUT) -> Path:
    """Write `policy` as src/burnish/assets/<name>/ of a checkout, in half precision and without absolute paths.

    Args:
        policy: a LeRobot policy folder.
        name: what `load_policy` will know it by.
        facts: what was measured of it, stored as `base.json` beside the weights.
        checkout: root of the repository; an installed package is never written to.

    Raises:
        BurnishError: no checkout, or the folder would be larger than 20 MB.
    """
    assets = checkout / "src" / "burnish" / "assets"
    if not (checkout / "pyproject.toml").is_file() or not assets.is_dir():
        raise BurnishError(f"{checkout} is no checkout of burnish", "one with pyproject.toml and src/burnish/assets",
                           "git clone the repository and run it there")  # fmt: skip
    if not name.isidentifier():
        raise BurnishError(f"name '{name}' of a base", "letters, digits and underscores")
    with new_folder(assets / name) as folder:
        load_policy(policy).save(folder, dtype=torch.float16)
        point_at(folder, VLM_FOLDER)
        (folder / "base.json").write_text(json.dumps(facts or {}, indent=1) + "\n")
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6
        if size > LIMIT_MB:
            raise BurnishError(f"{policy} takes {size:.1f} MB in half precision", f"at most {LIMIT_MB} MB")
    return assets / name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "example:\n  python -m workshop package-base runs/base/small/policy small --facts runs/base/small/run.json"
    )
    parser.add_argument("policy", help="policy folder")
    parser.add_argument("name", help="name of the base")
    parser.add_argument("--facts", default="", help="JSON file of what was measured of it")


def main(args: argparse.Namespace) -> int:
    facts = read_object(Path(args.facts)) if args.facts else None
    print(f"packaged: {package_base(args.policy, args.name, facts)}")
    return 0
