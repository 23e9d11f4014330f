"""`burnish tower`: a VLM around a real language model, and the text that shows what it may forget."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example:\n  burnish tower -o data/tower --facts recipes/isolate/facts.jsonl"
    parser.add_argument("-o", "--output", required=True, help="folder to write: vlm/, passages/, held_out.txt, facts/")
    parser.add_argument("--facts", default="", help="JSON lines with question and answer, to ask about a grey picture")
    parser.add_argument("--vision-from", default="small", help="policy whose vision tower is taken; '' makes a new one")


def main(args: argparse.Namespace) -> int:
    import json
    from pathlib import Path

    from burnish.core.errors import BurnishError
    from burnish.core.files import write_text
    from workshop.build_vlm import build_tower, installed_prose, write_text_questions

    out = Path(args.output)
    build_tower(out / "vlm", vision=_vision(args.vision_from))
    prose = sorted(installed_prose().items())
    # Packages, not passages, are divided: those of one package are alike.
    train, held_out = ([p for _, found in prose[first::2] for p in found] for first in (0, 1))
    if not train or not held_out:
        raise BurnishError("no English text in the descriptions of the installed packages", "some passages")
    write_text_questions(out / "passages", train)
    write_text(out / "held_out.txt", "\n".join(held_out) + "\n")
    counts = f"{len(train)} passages to train on, {len(held_out)} held out"
    if args.facts:
        try:
            facts = [json.loads(line) for line in Path(args.facts).read_text(encoding="utf-8").splitlines() if line]
            asked, answers = [f["question"] for f in facts], [f["answer"] for f in facts]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BurnishError(f"{args.facts} cannot be read ({error})", "lines with question and answer") from None
        write_text_questions(out / "facts", answers, asked)
        counts += f", {len(facts)} facts"
    print(f"{out}: {counts}")
    return 0


def _vision(path: str):
    """Config and weights of the vision tower of a policy, or None."""
    if not path:
        return None
    from burnish.policies import load_policy

    inner = load_policy(path).float().vlm
    return inner.config.vision_config.to_dict(), inner.model.vision_model.state_dict()
