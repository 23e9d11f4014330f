"""A recipe: one YAML file that says what data is made, what is trained and how it is measured.

The same file drives `burnish train --config FILE` (the training part), `burnish eval` and `burnish run FILE`
(everything, then the report). Any field can be given on the command line as --section.field=value.
"""

from dataclasses import dataclass, field
from typing import Any

from burnish.core.options import option

EXECUTOR_TIERS = ("exact", "fused", "compiled", "bf16")
"""Ways to run a flow-matching policy, see `runtime.executor.TIERS`."""


@dataclass
class DemosConfig:
    env: str = option("", "environment id, e.g. tabletop:lift; empty when the data set already exists")
    episodes: int = option(100, "demonstrations in all, shared by the tasks", least=1, most=10**7)
    image_size: int = option(96, "height and width of the views in pixels", least=8, most=4096)
    cameras: list[str] = option([], "cameras to record; empty means the environment's default one")
    seed: int = option(0, "first initial state; evaluation must use others, see eval.first_state", least=0, most=2**31)
    workers: int = option(0, "simulator processes; 0 means one for each core", least=0, most=1024)


@dataclass
class QuestionsConfig:
    """Held-out scene questions for retention; made by `burnish run` where the folder is missing."""

    root: str = option("", "question folder; empty means retention is not measured", path=True)
    env: str = option("", "environment id; empty means the one of `demos`")
    scenes: int = option(200, "number of images", least=1, most=10**7)
    per_scene: int = option(5, "questions kept for each image; 0 means all", least=0, most=1000)
    kinds: list[str] = option([], "kinds of questions that are asked; empty means all")
    limit: int = option(1000, "questions measured; 0 means all", least=0, most=10**9)
    seed: int = option(5_000_000, "first initial state", least=0, most=2**31)


@dataclass
class PolicyConfig:
    path: str = option("", 'a LeRobot policy folder to start from, or a name of a shipped base ("small")', path=True)
    type: str = option("smolvla", "policy type when `path` is empty")
    overrides: dict[str, Any] = option({}, "fields of the LeRobot policy config to change, e.g. {n_action_steps: 8}")


@dataclass
class MixConfig:
    """An entry of `data.mix`: a data set that is trained on beside `data.root`."""

    root: str = option("", "LeRobotDataset folder", path=True)
    weight: float = option(1.0, "samples drawn from it for each one of data.root", above=0, most=1e6)
    episodes: list[int] | str = option([], "those to use, or a file of `burnish data select`; empty: all", path=True)
    columns: dict[str, Any] = option({}, "its features under the names of data.root; null: it has no such camera")


@dataclass
class DataConfig:
    root: str = option("", "LeRobotDataset folder; `burnish run` makes an absent one; empty: data/<name>", path=True)
    episodes: list[int] = option([], "episodes to use; empty means all")
    held_out: list[int] = option([], "episodes of data.root kept from training, to measure the policy on offline")
    cameras: list[str] = option([], "cameras to train on, in the policy's order; empty means all of the data set")
    workers: int = option(1, "threads that prepare batches ahead (and as many processes to decode)", least=1, most=256)
    columns: dict[str, Any] = option({}, "features under other names, e.g. {action: [action.arm, action.gripper]}")
    cache_dir: str = option("", "where decoded frames are kept; empty means .frames in the data set", path=True)
    cache_gb: float = option(32.0, "room they may take; beyond it frames are decoded when needed", least=0)
    augment: bool = option(True, "random shift and colour jitter of the training images")
    image_size: int = option(0, "longest edge of training images; 0 means what the policy sees", least=0, most=8192)
    mix: list[dict[str, Any]] = option(
        [], "further data sets, each {root, weight, episodes, columns}; weight: samples for each one of data.root"
    )
    statistics: str = option(
        "joint", "of several data sets: of all that is drawn, those of data.root, or each its own; policy: those that "
        "the policy came with", choices=("joint", "first", "own", "policy"),
    )  # fmt: skip


@dataclass
class LanguageConfig:
    root: str = option("", "question folder (see `burnish data questions`); empty means no language stream", path=True)
    batch_size: int = option(32, "images in a language batch", least=1, most=65536)
    turns: int = option(1, "questions asked about each of them, in one sequence", least=1, most=1024)
    weight: float = option(0.0, "weight of the language loss; with 0 the questions are only used to measure", least=0)


@dataclass
class PeftConfig:
    method: str = option("none", "none, lora or dora", choices=("none", "lora", "dora"))
    rank: int = option(16, "width of the added matrices", least=1, most=65536)
    alpha: int = option(32, "their product is scaled by alpha / rank", least=1, most=2**20)
    target_modules: str = option("", "regular expression over modules; empty means attention, MLP, action projections")


@dataclass
class MemoryConfig:
    """What makes training smaller; `burnish method cost RECIPE --gpu GB` says what a recipe needs of it."""

    checkpointing: bool = option(False, "compute activations again in the backward pass instead of keeping them")
    frozen_dtype: str = option(
        "float32", "of matrices that are not trained; bf16 goes with train.precision bf16", choices=("float32", "bf16")
    )
    optimizer: str = option(
        "adamw", "adamw, or adamw8bit: AdamW with its state in 8 bits (burnish[low-memory])",
        choices=("adamw", "adamw8bit"),
    )  # fmt: skip
    fit_gb: float = option(
        0.0, "take batches in as few equal pieces as are predicted to fit into so many GB; 0: whole", least=0
    )


@dataclass
class TrainConfig:
    steps: int = option(1000, "optimiser steps", least=1, most=10**9)
    imitation_weight: float = option(1.0, "weight of the imitation loss; with 0 the objectives alone train", least=0)
    batch_size: int = option(32, "samples in a forward pass of one process", least=1, most=2**20)
    grad_accumulation: int = option(1, "forward passes in a step", least=1, most=2**16)
    shard: bool = option(False, "with several processes: each keeps a part of weights, gradients, moments (FSDP2)")
    lr: float = option(1e-4, "peak learning rate of AdamW", least=0)
    weight_decay: float = option(1e-4, "of AdamW", least=0)
    betas: list[float] = option([0.9, 0.95], "of AdamW")
    warmup_steps: int = option(100, "steps of linear warm-up", least=0, most=10**9)
    min_lr_ratio: float = option(0.05, "the cosine schedule ends at this share of `lr`", least=0, most=1)
    max_grad_norm: float = option(10.0, "gradients are clipped to this norm", least=0)
    ema_decay: float = option(0.0, "0 means no moving average; otherwise it is what is exported", least=0, below=1)
    precision: str = option("no", "no (float32), bf16 or fp16; weights stay float32", choices=("no", "bf16", "fp16"))
    seed: int = option(0, "of everything that is random in training")
    freeze: list[str] = option([], "regular expressions over parameter names; a match is not trained")
    train_only: list[str] = option([], "when given, only parameters matching one of these are trained")
    log_every: int = option(10, "steps between rows of metrics.jsonl", least=1)
    save_every: int = option(500, "steps between checkpoints", least=1)
    keep_checkpoints: int | None = option(
        None, "checkpoints that stay after the end; empty means 1, and none for the runs of a study", least=0, most=2
    )
    retention_every: int = option(0, "steps between answers to questions; 0 only before and after", least=0)
    max_minutes: float = option(0.0, "stop after so many minutes even if steps are left; 0 means no limit", least=0)
    rtc_training_max_delay: int = option(
        0, "flow-matching policies: learn to go on from up to so many steps that are executed meanwhile", least=0
    )
    self_check: bool = option(True, "look for unequal processes, clipped actions and an implausible loss at the start")
    trackers: list[str] = option([], "accelerate trackers: tensorboard, wandb, trackio")
    peft: PeftConfig = field(default_factory=PeftConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)


@dataclass
class DelayConfig:
    """A policy that answers late, and what is done about it (see `burnish.evaluate.delay`)."""

    steps: int = option(0, "control steps between an observation and the chunk for it", least=0, most=1000)
    mode: str = option(
        "sync", "what is done meanwhile: sync (stand still), or go on with the old chunk, then with a new one that is "
        "naive, ensemble (their mean), bid (nearest of 8), inpaint, guided, trained or tokens (made to go on from it)",
        choices=("sync", "naive", "ensemble", "bid", "inpaint", "guided", "trained", "tokens"),
    )  # fmt: skip
    jacobian: str = option("auto", "of guided: vjp, identity; auto: the policy's", choices=("auto", "vjp", "identity"))
    schedule: str = option("exp", "how the pull falls: exp, linear, or hard", choices=("exp", "linear", "hard"))
    clip: float = option(0.0, "greatest pull; 0 means the policy's number of flow steps", least=0, most=1e6)
    carry: int = option(0, "of tokens: replans for which those behind the executed steps are kept", least=0, most=1000)
    measured: str = option("", "instead of steps: p50, p95 or p99 of a latency that was measured, as p95:FILE")

    @classmethod
    def of(cls, delay: str, *others: Any) -> "DelayConfig":
        """As a command line has it: steps, or `measured`; and the other fields in their order."""
        counted = delay.isdecimal() and len(delay) < 5
        made = cls(int(delay) if counted else 0, *others)
        made.measured = "" if counted else delay
        return made

    @property
    def plain(self) -> bool:
        """Whether it is no delay at all."""
        return self.mode == "sync" and not self.steps and not self.measured


@dataclass
class CacheConfig:
    """What a policy need not compute again (see `burnish.runtime.caches`)."""

    mode: str = option(
        "none", "exact: find again what was computed from the same pictures and text, which changes nothing; images: "
        "act on pictures of earlier calls, with the present state; prefix: on their state too (for comparison alone)",
        choices=("none", "exact", "images", "prefix"),
    )  # fmt: skip
    max_age: int = option(4, "of images: calls for which pictures are used again", least=1, most=1000)
    similarity: float = option(
        0.0, "only where the cosine with them, 8x8 pixels each, is at least this", least=0, most=1
    )
    guard: bool = option(
        True, "compare the first four such calls, then every fourth, with the true one; stop where they differ"
    )
    measured: str = option(
        "", "of the guard: file of `burnish policy verify runtime`, for the policy's spread", path=True
    )

    @classmethod
    def of(cls, text: str) -> "CacheConfig":
        """As a command line has it: a mode, or the file of "images"."""
        return cls("images", measured=text) if text.endswith(".json") else cls(text or "none")


@dataclass
class EvalConfig:
    env: str = option("", "environment id; empty means the one of `demos`")
    episodes: int = option(100, "episodes for each task", least=1, most=10**6)
    first_state: int = option(1_000_000, "first initial state, where they are unlimited", least=0, most=2**31)
    seed: int = option(0, "seed of the policy's noise")
    workers: int = option(0, "simulator processes; 0 means one for each core", least=0, most=1024)
    batch_size: int = option(0, "episodes in flight; 0 means four for each worker", least=0, most=65536)
    max_steps: int = option(0, "episode limit; 0 means the environment's own", least=0, most=10**6)
    every: int = option(0, "offline: control steps between predictions; 0: a quarter of a second", least=0, most=4096)
    questions: QuestionsConfig = field(default_factory=QuestionsConfig)
    instruction_swap: bool = option(True, "also run with the instruction of another object, where there is one")
    random_object_expert: bool = option(False, "also run the expert that picks its object at random (tabletop only)")
    base: bool = option(True, "also evaluate the policy that training started from, on the same initial states")
    cameras: list[str] = option([], "the environment's cameras in the policy's order; empty means the same names")
    device: str = option("", "torch device of the policy; empty means a GPU where there is one")
    sampler: str = option("", "of a flow-matching policy, e.g. ab2:4, or auto; empty means its config's Euler steps")
    tier: str = option("", "run the policy by the executor; empty: as LeRobot does", choices=("", *EXECUTOR_TIERS))
    delay: DelayConfig = field(default_factory=DelayConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    watchdog: str = option("", "index of the training set: records say how far from it the policy was", path=True)


@dataclass
class RecipeConfig:
    name: str = option("run", "name of the run, its folder and its result")
    output: str = option("", "run folder; empty means runs/<name>", path=True)
    demos: DemosConfig = field(default_factory=DemosConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    data: DataConfig = field(default_factory=DataConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    objectives: list[dict[str, Any]] = option([], "methods of this run, each {name: <registered>, ...its own options}")
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
