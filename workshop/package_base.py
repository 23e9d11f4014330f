"""`burnish ship`: store a policy in half precision as a base that comes with the package."""

import argparse
import json
from pathlib import Path

from burnish.core.errors import BurnishError

LIMIT_MB = 20


def ship(policy: Path | str, name: str, facts: dict | None = None) -> Path:
    """Write `policy` as `assets/<name>/` of the package, in half precision and without absolute paths.

    Args:
        policy: a LeRobot policy folder.
        name: what `load_policy` will know it by.
        facts: what was measured of it, stored as `base.json` beside the weights.

    Raises:
        BurnishError: the folder would be larger than 20 MB.
    """
    import torch

    from burnish.core.files import remove_folder
    from burnish.policies import load_policy
    from burnish.policies.folder import point_at
    from burnish.policies.keys import VLM_FOLDER
    from burnish.policies.load import ASSETS

    target = ASSETS / name
    partial = target.with_name(f".{name}.partial")
    remove_folder(partial)
    load_policy(policy).save(partial, dtype=torch.float16)
    point_at(partial, VLM_FOLDER)
    (partial / "base.json").write_text(json.dumps(facts or {}, indent=1) + "\n")
    size = sum(f.stat().st_size for f in partial.rglob("*") if f.is_file()) / 1e6
    if size > LIMIT_MB:
        remove_folder(partial)
        raise BurnishError(f"{policy} takes {size:.1f} MB in half precision", f"at most {LIMIT_MB} MB")
    remove_folder(target)
    partial.rename(target)
    return target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example:\n  burnish ship runs/base/small/policy small --facts results/base/small.json"
    parser.add_argument("policy", help="policy folder")
    parser.add_argument("name", help="name of the base")
    parser.add_argument("--facts", default="", help="JSON file of what was measured of it")


def main(args: argparse.Namespace) -> int:
    facts = json.loads(Path(args.facts).read_text()) if args.facts else None
    print(f"shipped: {ship(args.policy, args.name, facts)}")
    return 0
