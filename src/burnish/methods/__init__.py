"""Training methods. Importing this package is cheap: the objectives are imported when a run asks for them."""

from importlib import import_module

OBJECTIVE_MODULES = (
    "burnish.methods.align.objective",
    "burnish.methods.capability.objective",
    "burnish.methods.decode.distill",
    "burnish.methods.isolate.objective",
    "burnish.methods.prefer.objective",
)  # fmt: skip
"""Modules that register an objective. A command such as `burnish capability` must not pay for all of them."""


def register_shipped() -> None:
    """Import every module above, which files its objective in `burnish.train.objective.OBJECTIVES`."""
    for module in OBJECTIVE_MODULES:
        import_module(module)
