"""Batches for the loop, prepared ahead of the step by threads."""

from pathlib import Path

from burnish.core.types import Batch
from burnish.data.loader import LanguageData, Prefetch, RobotData, pin, to_device
from burnish.methods.objective import Run


class Streams:
    """The robot stream and, where the language loss has weight, the language stream, prepared ahead of the step."""

    def __init__(self, run: Run):
        recipe, accelerator = run.recipe, run.accelerator
        start = run.step * recipe.train.grad_accumulation
        self.device, self.data = run.device, run.data
        sources: list[RobotData | LanguageData] = [run.data]
        if recipe.language.weight > 0:
            sources.append(
                LanguageData(Path(recipe.language.root), recipe.language.batch_size, recipe.train.seed,
                             accelerator.process_index, accelerator.num_processes, recipe.language.turns)
            )  # fmt: skip
        self.sources = sources
        self.k = start
        run.data.start_decoders()
        self.queues = [Prefetch(self._maker(source), start, recipe.data.workers) for source in sources]

    def _maker(self, source: RobotData | LanguageData):
        # On the CPU the images become floats in the thread; on a GPU they travel as bytes and become floats there.
        if self.device.type == "cpu":
            return lambda k: source.finish(source.raw(k), k)
        if self.device.type == "cuda":
            return lambda k: pin(source.raw(k))
        return source.raw

    def next(self) -> tuple[Batch, Batch | None]:
        """The next robot batch and language batch (None without that stream), on the device."""
        batches = [next(queue) for queue in self.queues]
        if self.device.type != "cpu":
            batches = [s.finish(to_device(b, self.device), self.k) for s, b in zip(self.sources, batches, strict=True)]
        self.k += 1
        return batches[0], batches[1] if len(batches) > 1 else None

    @property
    def waited(self) -> float:
        """Seconds that the step has stood still for data."""
        return sum(queue.waited for queue in self.queues)

    def close(self) -> None:
        for queue in self.queues:
            queue.close()
        self.data.close()
