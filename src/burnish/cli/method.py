"""`burnish method`: what training takes of memory, and what the methods prepare before it."""

from pathlib import Path
from typing import Annotated, Literal

from burnish.cli.parser import Arg, Group, listed
from burnish.core.config import RecipeConfig
from burnish.core.errors import BurnishError
from burnish.methods.retrieve.options import RetrieveConfig

FIGURE = Arg(old=("--picture",), metavar="PNG")


def align_cache(recipe: str) -> None:
    """Compute the teacher features that a recipe needs, before training.

    Args:
        recipe: a training recipe; its align entry, or our default one, says what is needed

    Example:
        burnish method align cache align/base
    """
    from burnish.methods.align.targets import CachedTargets
    from burnish.train.setup import own_accelerate_state

    with own_accelerate_state():
        run, _ = _run(recipe, objective_set_up=True)
    targets = run.objectives["align"].targets
    if not isinstance(targets, CachedTargets):
        raise BurnishError(f"{recipe} says cache: off", "a recipe that keeps teacher features")
    cache = targets.cache
    print(f"{cache.folder}: {cache.num_bytes / 1e6:.1f} MB, {cache.bytes_per_sample:.0f} bytes a sample")


def align_select(
    recipe: str, *, count: Annotated[int, Arg(least=1)] = 3, batches: Annotated[int, Arg(least=1)] = 8,
    figure: Annotated[Path, FIGURE] = Path("cka.png"),
) -> None:  # fmt: skip
    """Compare layers and print the pairs of every strategy.

    Args:
        recipe: a training recipe; its align entry names the teacher
        count: pairs wanted
        batches: batches to measure on
        figure: where the CKA heatmap goes

    Example:
        burnish method align select align/base --count 3
    """
    from burnish.core.outputs import require_file
    from burnish.methods.align.analysis import all_selections, compare_layers
    from burnish.report.plots import draw_cka
    from burnish.train.setup import own_accelerate_state

    require_file(figure, "figure")
    with own_accelerate_state():
        run, objective = _run(recipe, objective_set_up=False)
        comparison = compare_layers(run, objective, batches)
    chosen = all_selections(comparison, count)
    for name, pairs in chosen.items():
        print(f"{name:12s} pairs: {[list(pair) for pair in pairs]}")
    draw_cka(comparison, chosen["cka"], figure)
    print(f"CKA of all layers: {figure}")


def _run(recipe_path: str, objective_set_up: bool):
    """A Run of a recipe with no objective but align (our default where it names none), or with none; and the Align."""
    from burnish.core.recipe import load_recipe
    from burnish.methods.align.objective import Align
    from burnish.train.run import Run

    recipe = load_recipe(recipe_path, ["--train.self_check=false"])
    entries = [dict(entry) for entry in recipe.objectives if entry["name"] == "align"] or [{"name": "align"}]
    options = {k: v for k, v in entries[0].items() if k != "name"}
    recipe.objectives = entries if objective_set_up else []
    return Run(recipe), Align(**options)


def anchor(
    policy: str, questions: Path, *, output: Annotated[Path, Arg(short="-o")] = Path("anchor.safetensors"),
    samples: Annotated[int, Arg(least=0)] = 3000, batch_size: Annotated[int, Arg(least=1)] = 64,
    tokens: Literal["apart", "pooled"] = "apart", answers: bool = False, device: str = "",
) -> None:  # fmt: skip
    """Keep mean and variance of the hidden states of a frozen policy, as the anchor of the objective `isolate`.

    A fifth of the questions, at most 256, is kept aside: the policy must agree with its own anchor on them.

    Args:
        policy: policy folder or name of a shipped base: the one that training starts from
        questions: question folder, see burnish data questions
        output: file to write
        samples: questions to run; 0 means all others
        batch_size: questions in a forward pass
        tokens: image and text tokens, each by itself or together
        answers: count the tokens of answers too
        device: torch device; default: a GPU where there is one

    Example:
        burnish method isolate anchor small data/questions -o anchor.safetensors
    """
    from burnish.core.outputs import require_file
    from burnish.core.provenance import weights_hash
    from burnish.data.questions import open_questions
    from burnish.methods.isolate.anchor import Provenance, build_from_questions
    from burnish.policies import load_policy
    from burnish.policies.load import choose_device
    from burnish.policies.vqa import PROMPT

    require_file(output, "anchor")
    open_questions(questions)  # what is wrong with them shows before a policy is loaded
    place = choose_device(device)
    model = load_policy(policy)
    base_hash = weights_hash(model)  # before the cast: a run takes it from the weights as they are stored
    model = model.float().to(place)
    about = Provenance(
        base_hash, model.num_layers, 0, questions.name, 0, template=PROMPT, answers=answers, tokens=tokens
    )
    made = build_from_questions(model, questions, samples or 1 << 40, batch_size, about, place, progress=True)
    made.save(output)
    groups = sorted({group for _, group in made.moments})
    print(f"{output}: {made.about.layers} layers of {made.about.width} channels, {made.about.samples} questions, "
          f"tokens {' and '.join(groups)}, base {base_hash}; on {made.about.held_out} others the anchor loss is "
          f"{made.about.gap:.3g} of its variance")  # fmt: skip


def cost(
    recipe: str, *overrides: Annotated[str, Arg(fields=RecipeConfig)],
    gpu: Annotated[float, Arg(least=0, metavar="GB")] = 0.0, json: bool = False,
) -> None:  # fmt: skip
    """Predict what training takes of memory at most, by part, before anything is loaded.

    Forward and backward pass are gone through on shapes alone. Without data set or policy folder the metadata of
    neither is known, and the published sizes stand in.

    Args:
        recipe: a training recipe
        gpu: memory of a graphics card; also says what to switch on for training to fit into it. Without it, the memory
            of a process on the CPU
        json: print one JSON object instead of a table

    Examples:
        burnish method cost real/pi05_lora --gpu 24
        burnish method cost tabletop/smolvla_small --train.batch_size=8
    """
    from json import dumps

    from burnish.core.recipe import load_recipe
    from burnish.train.cost import GB, advise, predict

    loaded = load_recipe(recipe, list(overrides))
    found = predict(loaded, gpu > 0)
    fits = gpu <= 0 or found.peak <= gpu * GB
    steps = [] if fits else list(advise(loaded, gpu * GB, True))
    if json:
        ways = [{"overrides": said, "gb": one.peak / GB} for said, one in steps]
        print(dumps({"parts": {name: size / GB for name, size in found.parts.items()}, "gb": found.peak / GB,
                     "trained": found.trained, "parameters": found.parameters, "assumed": found.assumed,
                     "ways": ways}))  # fmt: skip
        return
    for line in found.assumed:
        print(line)
    print(f"trained {found.trained / 1e6:,.1f} of {found.parameters / 1e6:,.1f} million numbers; "
          f"{found.batch_size} samples in a forward pass")  # fmt: skip
    for name, size in found.parts.items():
        print(f"  {name:14s} {size / GB:8.2f} GB")
    print(f"  {'peak':14s} {found.peak / GB:8.2f} GB" + (f" of {gpu:g}" if gpu > 0 else ""))
    for said, one in steps:
        print(f"{one.peak / GB:8.2f} GB with {' '.join(said)}")
    if steps and steps[-1][1].peak > gpu * GB:
        print(f"nothing that burnish has makes it fit into {gpu:g} GB")


def retrieve_train(
    root: Path, *overrides: Annotated[str, Arg(fields=RetrieveConfig)], output: Annotated[Path, Arg(short="-o")],
    encoder: str = "tower:small", preset: Literal["default", "paper", "raw"] = "default", cameras: str = "",
    every: Annotated[int, Arg(least=1, most=10**6)] = 1, episodes: Annotated[list[int], Arg(several=True)] = (),
    seed: int = 0,
) -> None:  # fmt: skip
    """Train a retrieval head on the features of a frozen encoder, which are computed once and stay beside the data.

    Args:
        root: LeRobotDataset folder
        output: folder of the head
        encoder: pixels, folder:PATH, tower:POLICY or backbone:POLICY, see burnish data index
        preset: default, paper (CrossVLA), or raw, which only standardises
        cameras: views, separated by commas; default: all
        every: of each episode every so many frames
        episodes: those to train on; default: all
        seed: of weights and batches

    Example:
        burnish method retrieve train data/lift --encoder tower:small -o runs/lift_head
    """
    from burnish.core.outputs import require_own
    from burnish.core.recipe import split_overrides
    from burnish.data.vectors import encode_dataset, make_encoder
    from burnish.methods.retrieve.head import KIND
    from burnish.methods.retrieve.options import make_config
    from burnish.methods.retrieve.train import train_and_save

    require_own(output, KIND)
    config = make_config(preset, dict(split_overrides(overrides)))
    features = encode_dataset(root, make_encoder(encoder), every=every, cameras=listed(cameras))
    found = train_and_save(features, config, output, episodes=episodes, seed=seed)
    figures = ", ".join(f"{name} {value:.3g}" for name, value in found.items() if isinstance(value, float))
    print(f"{output}: {found['frames']} frames, {figures}")


COMMANDS = Group(
    "What training takes of memory, and what methods prepare before it.",
    {
        "align": Group("Teacher features, and which layers to align.", {"cache": align_cache, "select": align_select}),
        "cost": cost,
        "isolate": Group("Statistics of a frozen policy, for gradient isolation.", {"anchor": anchor}),
        "retrieve": Group("Heads under which like frames lie near.", {"train": retrieve_train}),
    },
)
