"""What to watch while a policy is fine-tuned: how far its states have drifted, and how well it still reads text."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.core.options import option
from burnish.core.types import Batch
from burnish.methods.inputs import question_batches, read_passages, robot_batches
from burnish.methods.isolate.anchor import forward, token_distance, token_groups, w2_diagonal
from burnish.methods.objective import Run
from burnish.methods.start import evaluating
from burnish.policies.base import Policy

IMAGE = "observation.images.text"


@dataclass
class ProbeOptions:
    """What to watch beside the loss, see `Probe`."""

    every: int = option(
        0, "steps between measurements, a multiple of train.log_every; 0: before and at the end", least=0
    )
    questions: str = option(
        "", "held-out question folder; by default that of eval.questions, or that of training", path=True
    )
    text: str = option("", "held-out text file, UTF-8, one passage per line; empty leaves text_loss out", path=True)
    samples: int = option(128, "questions and robot frames each", least=1)


class Probe:
    """Figures about the backbone, against the weights that the run starts from, on inputs that never change.

    drift_questions, drift_robot: mean over layers of the squared distance of each token's state from the base's,
    relative to the variance of the base's states (0 is no drift, 2 is no more alike than two random tokens), and the
    same for each layer as drift_questions_0 and so on. w2_questions, w2_robot: mean over layers of the diagonal
    Wasserstein distance of the same states, which rotations may leave at 0. text_loss: nats per token, see
    `text_loss`, beside text_loss_base, that of the start.

    Args:
        run: its policy still holds the weights that it starts from.
        training_questions: where questions come from when neither the options nor the recipe's evaluation name any.
    """

    def __init__(self, run: Run, training_questions: str, options: ProbeOptions):
        self.policy, self.every = run.policy, options.every
        self.layers = list(range(run.policy.num_layers))
        self.texts = read_passages(Path(options.text)) if options.text else []
        self.base_text = text_loss(run.policy, self.texts) if options.text else 0.0
        samples = options.samples
        self.inputs = {"robot": list(robot_batches(run, samples))}
        if options.questions and not Path(options.questions).is_dir():
            raise BurnishError(f"isolate: no question folder at {options.questions}", "probe.questions",
                               "burnish data questions --help")  # fmt: skip
        root = options.questions or run.recipe.eval.questions.root or training_questions
        if root and Path(root).is_dir():
            size = min(32, run.recipe.train.batch_size, samples)
            self.inputs["questions"] = list(question_batches(Path(root), samples, size, 1, run.device))
        with evaluating(run.policy):
            self.base = {name: self._states(batches) for name, batches in self.inputs.items()}

    def measure(self, step: int, last: bool = True) -> dict[str, float]:
        """The figures after `step` steps, or nothing when it is not their turn."""
        if not last and not (self.every and step % self.every == 0):
            return {}
        figures: dict[str, float] = {}
        with evaluating(self.policy):
            for name, batches in self.inputs.items():
                figures |= self._drift(name, self._states(batches))
            if self.texts:
                figures |= {"text_loss": text_loss(self.policy, self.texts), "text_loss_base": self.base_text}
        return figures

    @torch.no_grad()
    def _states(self, batches: list[Batch]) -> list[Tensor]:
        """[N, D] of each layer: the states of all image and text tokens."""
        kept: list[list[Tensor]] = [[] for _ in self.layers]
        for batch in batches:
            captured, _ = forward(self.policy, batch, self.layers)
            mask = token_groups(captured, "pooled")["tokens"]
            for layer in self.layers:
                kept[layer].append(captured.hidden[layer][mask].float())
        return [torch.cat(rows) for rows in kept]

    def _drift(self, name: str, now: list[Tensor]) -> dict[str, float]:
        pairs = list(zip(now, self.base[name], strict=True))
        each = [float(token_distance(a, b)) for a, b in pairs]
        apart = [float(w2_diagonal(a, b.mean(0).double(), b.var(0, False).double())) for a, b in pairs]
        figures = {f"drift_{name}": sum(each) / len(each), f"w2_{name}": sum(apart) / len(apart)}
        return figures | {f"drift_{name}_{layer}": value for layer, value in enumerate(each)}


@torch.no_grad()
def text_loss(policy: Policy, texts: list[str], batch_size: int = 16) -> float:
    """Mean next-token loss, in nats per token, of plain text by the backbone that acts.

    The language verb needs an image and a question, so every passage is the answer to an empty question about a grey
    image. Compare the figure between policies, not with that of a text-only model.
    """
    size = policy.image_size
    total, tokens = 0.0, 0
    device = next(policy.parameters()).device
    with evaluating(policy):
        for start in range(0, len(texts), batch_size):
            some = texts[start : start + batch_size]
            grey = torch.full((len(some), 3, size, size), 0.5, device=device)
            loss = policy.language({IMAGE: grey, "question": [""] * len(some), "answer": some})
            total += float((loss.per_token * loss.mask).sum())
            tokens += int(loss.mask.sum())
    return total / max(tokens, 1)
