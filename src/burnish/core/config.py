"""A recipe: one YAML file that says what data is made, what is trained and how it is measured.

The same file drives `burnish train --config FILE` (the training part), `burnish eval` and `burnish run FILE`
(everything, then the report). Any field can be given on the command line as --section.field=value.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class DemosConfig:
    env: str = ""
    """Environment id, e.g. tabletop:lift; empty when the data set already exists."""
    episodes: int = 100
    image_size: int = 96
    cameras: list[str] = field(default_factory=list)
    """Cameras to record; empty means the environment's default one."""
    seed: int = 0
    """First initial state; training and evaluation must not overlap, see EvalConfig.first_state."""
    workers: int = 0
    """Simulator processes; 0 means one for each core."""


@dataclass
class QuestionsConfig:
    """Held-out scene questions for retention; made by `burnish run` where the folder is missing."""

    root: str = ""
    """Question folder; empty means retention is not measured."""
    env: str = ""
    """Environment id; empty means the one of `demos`."""
    scenes: int = 200
    per_scene: int = 5
    """Questions kept for each image."""
    limit: int = 1000
    """Questions measured."""
    seed: int = 5_000_000
    """First initial state."""


@dataclass
class PolicyConfig:
    path: str = ""
    """A LeRobot policy folder to start from, or a name of a shipped base ("small")."""
    type: str = "smolvla"
    """Policy type when `path` is empty."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of the LeRobot policy config to change, e.g. {n_action_steps: 8}."""


@dataclass
class DataConfig:
    root: str = ""
    """LeRobotDataset folder; empty means data/<name>. Where it is absent, `burnish run` makes it as `demos` says."""
    episodes: list[int] = field(default_factory=list)
    """Episodes to use; empty means all."""
    cameras: list[str] = field(default_factory=list)
    """Cameras to train on; empty means all of the data set."""
    workers: int = 1
    """Threads that prepare batches ahead of the step."""
    cache_dir: str = ""
    """Where decoded frames are kept; empty means beside the data set."""
    augment: bool = True
    """Random shift and colour jitter of the training images."""
    image_size: int = 0
    """Longest edge of the training images in pixels; 0 keeps the data set's own size."""


@dataclass
class LanguageConfig:
    root: str = ""
    """Question folder (see `burnish questions`); empty means no language stream."""
    batch_size: int = 32
    """Images in a language batch."""
    turns: int = 1
    """Questions asked about each of them, in one sequence."""
    weight: float = 0.0
    """Weight of the language loss; 0 switches the stream off (questions are then only used to measure)."""


@dataclass
class PeftConfig:
    method: str = "none"
    """none, lora or dora."""
    rank: int = 16
    alpha: int = 32
    target_modules: str = ""
    """Regular expression over module names; empty means attention, MLP and action projections."""


@dataclass
class TrainConfig:
    steps: int = 1000
    imitation_weight: float = 1.0
    """Weight of the imitation loss on the data set; 0 leaves that forward out, so that objectives alone train."""
    batch_size: int = 32
    grad_accumulation: int = 1
    lr: float = 1e-4
    weight_decay: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    warmup_steps: int = 100
    min_lr_ratio: float = 0.05
    """The cosine schedule ends at this share of `lr`."""
    max_grad_norm: float = 10.0
    ema_decay: float = 0.0
    """0 switches the moving average off; otherwise the averaged weights are the ones exported."""
    precision: str = "no"
    """no (float32), bf16 or fp16 compute; weights stay float32."""
    seed: int = 0
    freeze: list[str] = field(default_factory=list)
    """Regular expressions over parameter names; a match is not trained."""
    train_only: list[str] = field(default_factory=list)
    """When given, only parameters matching one of these are trained."""
    log_every: int = 10
    save_every: int = 500
    retention_every: int = 0
    """Measure question loss and accuracy every so many steps; 0 only before and after."""
    max_minutes: float = 0.0
    """Stop after this many minutes of training even if steps are left; 0 means no limit."""
    self_check: bool = True
    trackers: list[str] = field(default_factory=list)
    """accelerate trackers: tensorboard, wandb, trackio."""
    peft: PeftConfig = field(default_factory=PeftConfig)


@dataclass
class EvalConfig:
    env: str = ""
    """Environment id; empty means the one of `demos`."""
    episodes: int = 100
    """Episodes for each task."""
    first_state: int = 1_000_000
    """First initial state where the environment has unlimited ones; training uses small numbers."""
    seed: int = 0
    """Seed of the policy's noise."""
    workers: int = 0
    batch_size: int = 0
    """Episodes in flight; 0 means four for each worker."""
    max_steps: int = 0
    """Episode limit; 0 means the environment's own."""
    questions: QuestionsConfig = field(default_factory=QuestionsConfig)
    instruction_swap: bool = True
    """Also run with the instruction of another object (where the environment offers one)."""
    random_object_expert: bool = False
    """Also run the expert that picks its object at random (tabletop only)."""
    base: bool = True
    """Also evaluate the policy that training started from, on the same initial states."""
    cameras: list[str] = field(default_factory=list)
    """The environment's cameras in the policy's order; empty means those of the same names."""
    device: str = ""
    """Torch device of the policy; empty means a GPU where there is one."""


@dataclass
class RecipeConfig:
    name: str = "run"
    output: str = ""
    """Run folder; empty means runs/<name>."""
    demos: DemosConfig = field(default_factory=DemosConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    data: DataConfig = field(default_factory=DataConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    objectives: list[dict[str, Any]] = field(default_factory=list)
    """Methods of this run, each {name: <registered name>, ...its own options}."""
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
