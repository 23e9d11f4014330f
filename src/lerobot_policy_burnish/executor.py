"""`BURNISH_RUNTIME=exact|fused|auto`: LeRobot's own commands sample from SmolVLA, pi0 and pi05 through the executor.

    BURNISH_RUNTIME=exact lerobot-eval --policy.path=FOLDER ...

Nothing else changes. The first call of every shape is also run by LeRobot's own code and compared; where the tier does
not keep its promise, LeRobot's own code goes on, after one line of warning. `auto` takes the fused tier where it does,
else the exact one.
"""

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

from burnish.core.errors import BurnishError, first_line

VARIABLE = "BURNISH_RUNTIME"
MODES = {"exact": ("exact",), "fused": ("fused",), "auto": ("fused", "exact")}
KINDS = ("smolvla", "pi0", "pi05")
_HOOKED: list[tuple[Any, str, Any]] = []
"""(class, attribute, what stood there), for `disable`."""
_logger = logging.getLogger("burnish")


class Executors:
    """The executor of one model: made at its first call, asked for every new shape whether it may be trusted."""

    def __init__(self, kind: str, model: Any, tiers: tuple[str, ...]):
        from burnish.policies.parts import flow_parts
        from burnish.runtime.executor import Sampler

        self.samplers = [Sampler(flow_parts(kind, model), tier) for tier in tiers]
        self.checked: set[Any] = set()

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of a model gets an executor of its own."""

    def __reduce__(self) -> Any:
        return type(None), ()

    def __call__(self, inputs: list[Any], noise: Any) -> Any:
        """Actions [B, T, A_model]; None where no tier (any more) keeps what it promises."""
        from burnish.runtime.executor import shapes

        images, masks, *rest = inputs
        key = shapes([*images, *masks, *rest, noise])
        while self.samplers and key not in self.checked:
            try:
                self.samplers[0].require(inputs, noise)
                self.checked.add(key)
            except (BurnishError, RuntimeError) as error:
                tier = self.samplers.pop(0).tier
                self.checked.clear()
                after = self.samplers[0].tier if self.samplers else "LeRobot's own sampler"
                _logger.warning("%s: %s; going on with %s", VARIABLE, first_line(error, 200) or tier, after)
        return self.samplers[0](inputs, noise) if self.samplers else None


def enable(mode: str) -> None:
    """Let every policy of KINDS that is made from here on, in this process, sample through the executor.

    Raises:
        BurnishError: a mode that is none of MODES.
    """
    from lerobot.policies.pretrained import PreTrainedPolicy

    if mode not in MODES:
        raise BurnishError(f"{VARIABLE}={mode[:40]}", f"one of {', '.join(MODES)}", f"unset {VARIABLE}")
    original = PreTrainedPolicy.__dict__["__init_subclass__"]

    def defined(cls: Any, **options: Any) -> None:
        original.__func__(cls, **options)
        _watch(cls, MODES[mode])

    for known in PreTrainedPolicy.__subclasses__():
        _watch(known, MODES[mode])
    _replace(PreTrainedPolicy, "__init_subclass__", classmethod(defined))


def disable() -> None:
    """Put everything back."""
    while _HOOKED:
        owner, name, before = _HOOKED.pop()
        setattr(owner, name, before)


def _replace(owner: Any, name: str, new: Any) -> None:
    _HOOKED.append((owner, name, owner.__dict__[name]))
    setattr(owner, name, new)


def _watch(policy_class: Any, tiers: tuple[str, ...]) -> None:
    """Hook the model's class as soon as a policy is made: it may stand behind the policy's in its file."""
    if policy_class.name not in KINDS or "__init__" not in vars(policy_class):
        return
    original = policy_class.__init__

    @functools.wraps(original)
    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if not self.config.compile_model and not any(owner is type(self.model) for owner, _, _ in _HOOKED):
            _replace(type(self.model), "sample_actions", _sampling(policy_class.name, type(self.model), tiers))

    _replace(policy_class, "__init__", made)


def _sampling(kind: str, model_class: Any, tiers: tuple[str, ...]) -> Callable[..., Any]:
    """In the place of the model's `sample_actions`; the executor hangs on the model itself."""
    original, taken = model_class.sample_actions, 4 if kind == "pi05" else 5

    @functools.wraps(original)
    def sample_actions(self: Any, *inputs: Any, noise: Any = None, **options: Any) -> Any:
        other = any(value is not None for value in options.values()) or "denoise_step" in vars(self)
        if other or self.rtc_processor is not None or len(inputs) != taken:  # guided, or in other steps: LeRobot's
            return original(self, *inputs, noise=noise, **options)
        if noise is None:
            rows = inputs[2].shape[0]
            shape = (rows, self.config.chunk_size, self.config.max_action_dim)
            noise = self.sample_noise(shape, inputs[2].device)
        if vars(self).get("_burnish_executors") is None:
            self._burnish_executors = Executors(kind, self, tiers)
        found = self._burnish_executors(list(inputs), noise)
        return original(self, *inputs, noise=noise) if found is None else found

    return sample_actions


if mode := os.environ.get(VARIABLE):
    enable(mode)
