"""`burnish data`: demonstrations, questions, preference pairs, and a look at any data set."""

from pathlib import Path
from typing import Annotated, Any, Literal

from burnish.cli.parser import Arg, Group, listed
from burnish.core.errors import BurnishError
from burnish.core.reading import parse_yaml


def demos(
    env: str, episodes: int, root: Path, *, image_size: int = 96, cameras: str = "", seed: int = 0, workers: int = 0,
    geometry: bool = False, misses: float = 0.0, engine: str = "processes", num_gpus: float | None = None,
) -> None:  # fmt: skip
    """Record expert demonstrations as a LeRobot data set.

    Only solved episodes enter it. Killed or interrupted, the same command continues.

    Args:
        env: environment id: tabletop:lift, metaworld:mt10, libero:spatial, libero:goal/3, ...
        episodes: demonstrations in all, shared by the tasks
        root: folder of the data set to make
        image_size: height and width in pixels
        cameras: views to record, separated by commas; default: the first one
        seed: first initial state
        workers: simulator processes; 0 means one for each core
        geometry: also keep depth and object masks of every frame
        misses: share of them that grasp beside the object and lift nothing, for studies of what to do about such data
        engine: where simulators run: processes of this machine, ray, or ray:HOST:PORT, a cluster that runs
        num_gpus: GPUs of the Ray cluster for each simulator; default: none

    Example:
        burnish data demos tabletop:lift 200 data/lift --cameras front,wrist
    """
    from burnish.data.demos import make_demos

    print(make_demos(env, episodes, root, image_size=image_size, cameras=listed(cameras), seed=seed, workers=workers,
                     geometry=geometry, misses=misses, engine=engine, num_gpus=num_gpus))  # fmt: skip


def questions(
    env: str = "", scenes: int = 0, root: Path | None = None, *,
    from_: Annotated[Path | None, Arg(metavar="JSONL")] = None, images: Path | None = None, image_size: int = 96,
    camera: str = "", per_scene: int = 0, kinds: str = "", seed: int = 0, workers: int = 0,
) -> None:  # fmt: skip
    """Make scene questions with answers from the simulator's state, or import pairs that are there.

    With --from the pairs are yours: one line {"image": "a.jpg", "question": "...", "answer": "..."} each.

    Args:
        env: environment id; "tabletop" takes turns over its families; left out with --from
        scenes: number of images
        root: folder to make
        from_: JSON lines of questions and answers about pictures
        images: folder of those pictures; default: that of the JSON lines
        image_size: height and width in pixels
        camera: default: the environment's first one
        per_scene: questions kept for each image; 0 keeps all
        kinds: ask only these, separated by commas, e.g. left_of,exists; default: all
        seed: first initial state
        workers: processes; 0 means one for each core

    Examples:
        burnish data questions tabletop 2000 data/questions --seed 2000000
        burnish data questions --from vqa/pairs.jsonl --root data/vqa --image-size 224
    """
    from burnish.data.question_import import import_questions
    from burnish.data.questions import make_questions, open_questions

    if root is None or not (env or from_):
        raise BurnishError("questions without a folder or without a source", "--root, and an environment or --from",
                           "burnish data questions --help")  # fmt: skip
    if from_:
        if env or scenes or camera or per_scene or kinds or seed:
            raise BurnishError("--from beside an environment, scenes, a camera, kinds or a seed", "one of both")
        made = import_questions(from_, root, images=images, image_size=image_size)
    else:
        made = make_questions(env, scenes, root, image_size=image_size, camera=camera, per_scene=per_scene,
                              kinds=listed(kinds), seed=seed, workers=workers)  # fmt: skip
    found = open_questions(made)
    print(f"{len(found.entries)} questions about {len(found.images)} images in {made}")


def pairs(
    policy: str = "", env: str = "", *, root: Path, states: int = 100, rollouts: int = 4, first_state: int = 500_000,
    seed: int = 0, image_size: int = 0, action_noise: float = 0.0, expert: bool = False, limit: int = 0,
    ties: Literal["skip", "faster"] = "skip", offsets: Annotated[list[int], Arg(several=True, old=("--leads",))] = (0,),
    workers: int = 0, device: str = "", labels: Path | None = None, success: str = "", takeover: str = "",
    proposal: str = "", state_tolerance: Annotated[list[float], Arg(several=True, least=0)] = (0.0,),
    image_tolerance: Annotated[float, Arg(least=0)] = 2.0,
    columns: Annotated[str, Arg(old=("--data.columns",), metavar="MAP")] = "",
) -> None:  # fmt: skip
    """Make preference pairs from rollouts of a policy, or import what is known about recorded episodes.

    Killed or interrupted, the same command continues. With --labels, --success or --takeover the data set --root is
    there already, and only an index is written beside it. Labels are JSON lines: {"chosen": [episode, frame],
    "rejected": [episode, frame]}; {"chosen": [episode, frame], "rejected": {"action": [[...], ...]}} for actions that
    were proposed and not recorded; {"episode": 3, "success": true} for losses that need no pairs.

    Args:
        policy: LeRobot policy folder; left out with --labels
        env: environment id, e.g. tabletop:lift
        root: pair folder to make, or the data set that the labels are about
        states: initial states for each task
        rollouts: rollouts for each of them
        first_state: first initial state, counted from behind fixed ones, which are for evaluation
        seed: seed of the policy's noise
        image_size: side of the recorded images; 0 means the policy's
        action_noise: noise on a branch's first chunk, share of half the range
        expert: where all rollouts failed, let the expert complete one
        ties: what to do with two successes
        offsets: frames before the branch point at which chunks start
        limit: at most so many pairs for each initial state; 0 means all
        workers: simulator processes; 0 means one for each core
        device: torch device of the policy; default: a GPU where there is one
        labels: JSON lines of labels on the data set --root
        success: column that is true where an episode has succeeded, e.g. next.success
        takeover: column that is true while a human acts in place of the policy, e.g. intervention
        proposal: column of the actions that the policy proposed meanwhile; rejected where the human takes over
        state_tolerance: how far the starts of a labelled pair may differ; one number, or one for each dimension
        image_tolerance: how far their pictures may: mean difference of a view, of 255
        columns: features of the data set under other names, e.g. {action: [action.arm, action.gripper]}

    Examples:
        burnish data pairs runs/lift/policy tabletop:lift --states 200 --rollouts 4 --root data/pairs/lift
        burnish data pairs --labels labels.jsonl --root data/my_robot --state-tolerance 0.02
        burnish data pairs --takeover intervention --proposal policy_action --root data/my_robot
    """
    from burnish.data.pairs_import import import_pairs
    from burnish.evaluate.pairs import collect

    if labels or success or takeover or proposal:
        if policy or env:
            raise BurnishError("a policy to roll out, and labels to import", "one of them")
        found = import_pairs(root, labels, success=success, takeover=takeover, proposal=proposal,
                             columns=_columns(columns), state_tolerance=state_tolerance,
                             image_tolerance=image_tolerance)  # fmt: skip
        print(f"{found[0]} pairs and outcomes of {found[1]} episodes in {root}")
    elif not policy or not env:
        raise BurnishError("pairs without a policy or without an environment",
                           "both, or --labels, --success or --takeover")  # fmt: skip
    else:
        print(collect(policy, env, root, states=states, rollouts=rollouts, first_state=first_state, seed=seed,
                      image_size=image_size, action_noise=action_noise, expert=expert, ties=ties, offsets=offsets,
                      limit=limit, workers=workers, device=device))  # fmt: skip


def _columns(text: str) -> dict[str, Any]:
    found = parse_yaml(text, "--columns") or {}
    if not isinstance(found, dict):
        raise BurnishError(f"--columns {text[:100]}", "a map such as {action: actions}")
    return found


def inspect(
    dataset: list[Path], *, html: Annotated[Path | None, Arg(metavar="FILE")] = None, quick: bool = False,
    curate: Annotated[str, Arg(metavar="ENCODER")] = "", json: bool = False,
) -> int:  # fmt: skip
    """Say what a practitioner must know about a data set; of several also what stands between them and one training.

    Exit status: 0 when no error was found, 1 when one was, 2 when the data set cannot be read at all.

    Args:
        dataset: LeRobotDataset folders, v2.0 to v3.0
        html: also write a page with thumbnails; of one data set
        quick: do not read every video to its end
        curate: also look for near-duplicate episodes, outliers and idle stretches, and how few episodes cover the data
            set, by vectors of an encoder (pixels, tower:small, ...; see burnish data index) or those of an index folder
        json: print one JSON object for each data set, and nothing else

    Examples:
        burnish data inspect data/lift --html inspect.html
        burnish data inspect data/lift --curate pixels --html inspect.html
        burnish data inspect data/new data/old      for --data.root=data/new --data.mix='[{root: data/old}]'
    """
    from json import dumps

    from burnish.core.outputs import require_file
    from burnish.data.dataset import open_dataset
    from burnish.data.inspect import inspect_dataset
    from burnish.data.mix import together
    from burnish.report.inspection import as_html, as_text
    from burnish.report.page import write_page

    if html and len(dataset) > 1:
        raise BurnishError("--html with several data sets", "one data set, or no page")
    if json and curate:
        raise BurnishError("--json with --curate", "one of them")
    if html:
        require_file(html, "page")
    all_ok, sections = True, ""
    for root in dataset:
        found = inspect_dataset(root, quick=quick)
        print(dumps(found.to_dict()) if json else as_text(found) + "\n" * (len(dataset) > 1))
        all_ok &= found.ok
        if curate:
            from burnish.report.inspection import curate_dataset

            lines, sections = curate_dataset(root, curate)
            print("\n".join(["", *lines]))
    if html:
        write_page(html, as_html(found, sections))
        if not json:
            print(f"\n{html}")
    if len(dataset) > 1 and not json:
        between = together([open_dataset(root) for root in dataset])
        print("together: " + (f"{len(between)} problems" if between else "nothing stands in the way of one training"))
        for problem in between:
            print(f"  {problem.kind:<8} {problem.where}: {problem.sentence}")
            all_ok &= problem.kind != "error"
    return 0 if all_ok else 1


def index(
    root: Path, *, output: Annotated[Path, Arg(short="-o")], encoder: str = "tower:small", head: Path | None = None,
    cameras: str = "", every: Annotated[int, Arg(least=1, most=10**6)] = 1,
) -> None:  # fmt: skip
    """Encode a data set once, so that it can be searched.

    An encoder is pixels, folder:PATH (a transformers vision folder: DINOv2, SigLIP, CLIP), tower:POLICY (the vision
    tower of a policy or shipped base) or backbone:POLICY (the states of its language model); folder and backbone take
    a layer, backbone:small@3. Its features stay beside the data set.

    Args:
        root: LeRobotDataset folder
        output: folder of the index
        encoder: see above
        head: retrieval head for that encoder, see burnish method retrieve train; default: the features themselves
        cameras: views, separated by commas; default: all
        every: of each episode every so many frames

    Example:
        burnish data index data/lift --encoder tower:small -o runs/lift_index
    """
    from burnish.methods.retrieve.ask import make_index

    count, views, width = make_index(
        root, encoder, output, head=head, every=every, cameras=listed(cameras)
    ).values.shape
    print(f"{output}: {count} frames, {views} views, vectors of {width}")


def search(
    index: Path, *, episode: int = -1, frame: Annotated[int, Arg(least=0)] = 0, camera: str = "",
    text: str = "", top: Annotated[int, Arg(least=1, most=1000)] = 10, json: bool = False,
) -> None:  # fmt: skip
    """Find the frames of an index that lie nearest to one of its own or to an instruction.

    Of a frame of its own the frames of the same episode are left out.

    Args:
        index: folder that burnish data index wrote
        episode: of the frame that is asked with
        frame: its number in the episode
        camera: its view; default: the first one
        text: instruction to ask with instead; needs a head that was trained with sentences
        top: neighbours
        json: print one JSON object for each neighbour

    Examples:
        burnish data search runs/lift_index --episode 3 --frame 10
        burnish data search runs/lift_index --text "lift the red cube"
    """
    from json import dumps

    from burnish.data.search import Index
    from burnish.methods.retrieve.ask import ask_frame, ask_sentence

    if (episode >= 0) == bool(text):
        raise BurnishError("two questions, or none", "one of --episode and --text")
    opened = Index.open(index)
    table, names = opened.vectors, opened.vectors.about["cameras"]
    if camera and camera not in names:
        raise BurnishError(f"the index has no camera {camera!r}", f"one of {', '.join(names)}")
    if text:
        scores, places = ask_sentence(opened, text, min(top, len(opened.keys)))
    else:
        scores, places = ask_frame(opened, episode, frame, names.index(camera) if camera else 0, top)
    for score, place in zip(scores[0].tolist(), places[0].tolist(), strict=True):
        _, number, at, task, _ = table.frames[place // opened.views].tolist()
        found = {"cosine": round(score, 4), "episode": number, "frame": at, "camera": names[place % opened.views],
                 "instruction": table.instruction(task)}  # fmt: skip
        line = f"{score:7.4f}  episode {number:<6} frame {at:<6} {found['camera']:<12} {found['instruction']}"
        print(dumps(found) if json else line)


def select(
    index: Path, count: int, *, like: Path | None = None, random: Annotated[int | None, Arg(least=0)] = None,
    output: Annotated[Path, Arg(short="-o")] = Path("picked.json"),
) -> None:  # fmt: skip
    """Choose episodes of an index: those nearest to another data set, or those that cover the data set best.

    The file holds a list that `data.episodes` of a recipe takes; `episodes` of an entry of `data.mix` takes the file.

    Args:
        index: folder that burnish data index wrote
        count: episodes to choose
        like: index of the few episodes that others are to be found for, of the same encoder and head
        random: choose at random instead, by this seed: what the others are to be compared with
        output: where the list goes

    Examples:
        burnish data select runs/mixed_index 50 --like runs/target_index -o picked.json
        burnish train --policy.path=small --data.root=data/mixed --data.episodes="$(cat picked.json)"
    """
    from json import dumps

    import numpy as np

    from burnish.core.files import write_text
    from burnish.core.outputs import require_outside
    from burnish.core.reading import read_json
    from burnish.data.search import Index, centres, nearest_episodes
    from burnish.data.vectors import load_vectors

    require_outside(output)
    before = read_json(output) if output.exists() else []
    if not isinstance(before, list) or not all(type(one) is int for one in before):
        raise BurnishError(f"{output} holds something else, which this would overwrite", "an earlier list")
    if like and random is not None:
        raise BurnishError("--like and --random", "one of them")
    opened = Index.open(index)
    there = np.unique(opened.vectors.frames["episode"])
    if not 1 <= count <= len(there):
        raise BurnishError(f"{count} episodes of {len(there)}", f"1 to {len(there)}")
    if random is not None:
        chosen = np.random.default_rng(random).permutation(there)[:count].tolist()
    elif like is None:
        chosen, radii = centres(opened.vectors, count)
        print(f"{len(chosen)} episodes; no other is farther than {radii[-1]:.4f} from one of them")
    else:
        found = nearest_episodes(opened, load_vectors(like), count)
        chosen = [episode for episode, _ in found]
        print(f"{len(chosen)} episodes, mean cosine {found[0][1]:.3f} to {found[-1][1]:.3f}")
    write_text(output, dumps(sorted(chosen)) + "\n")
    print(f'{output}; --data.root={opened.vectors.about["root"]} --data.episodes="$(cat {output})"')


COMMANDS = Group(
    "Make data sets, questions and preference pairs; inspect and search data sets.",
    {"demos": demos, "questions": questions, "pairs": pairs, "inspect": inspect, "index": index, "search": search,
     "select": select},
)  # fmt: skip
