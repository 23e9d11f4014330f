"""Batches for the loop, prepared ahead of the step by threads."""

from pathlib import Path

from burnish.core.types import Batch
from burnish.data.loader import LanguageData, Prefetch, RobotData, pin, to_device
from burnish.methods.objective import Run


class Streams:
    """The robot stream and, where the language loss has weight, the language stream, prepared ahead of the step."""

    def __init__(self, run: Run):
        recipe, first, every = run.recipe, run.number_of(0), run.accelerator.num_processes
        self.device, self.data = run.device, run.data
        sources: list[RobotData | LanguageData] = [run.data]
        if recipe.language.weight > 0:
            sources.append(
                LanguageData(Path(recipe.language.root), recipe.language.batch_size, recipe.train.seed,
                             turns=recipe.language.turns)
            )  # fmt: skip
        self.sources = sources
        # Ranks take turns at the batches of one order, so that it is the same for any number of them.
        self.k, self._number = 0, lambda k: first + k * every
        run.data.start_decoders()
        self.queues = [Prefetch(self._maker(source), 0, recipe.data.workers) for source in sources]

    def _maker(self, source: RobotData | LanguageData):
        # On the CPU the images become floats in the thread; on a GPU they travel as bytes and become floats there.
        if self.device.type == "cpu":
            return lambda k: source.finish(source.raw(self._number(k)), self._number(k))
        if self.device.type == "cuda":
            return lambda k: pin(source.raw(self._number(k)))
        return lambda k: source.raw(self._number(k))

    def next(self) -> tuple[Batch, Batch | None]:
        """The next robot batch and language batch (None without that stream), on the device."""
        batches = [next(queue) for queue in self.queues]
        if self.device.type != "cpu":
            number = self._number(self.k)
            batches = [s.finish(to_device(b, self.device), number) for s, b in zip(self.sources, batches, strict=True)]
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
