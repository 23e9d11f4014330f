"""burnish: post-training for vision-language-action policies. Public names load on first use."""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "BurnishError": "burnish.core.errors",
    "make_env": "burnish.envs.base",
    "expand": "burnish.envs.base",
    "load_policy": "burnish.policies",
    "make_demos": "burnish.data.demos",
    "make_questions": "burnish.data.questions",
    "inspect_dataset": "burnish.data.inspect",
    "load_recipe": "burnish.core.recipe",
    "train": "burnish.train",
    "evaluate": "burnish.evaluate",
    "compare": "burnish.evaluate.compare",
    "retention": "burnish.evaluate.retention",
    "run_recipe": "burnish.experiments.pipeline",
    "load_study": "burnish.experiments.study",
    "run_study": "burnish.experiments.study",
    "write_report": "burnish.report.page",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'burnish' has no attribute '{name}'")
    module = import_module(_PUBLIC[name])
    return module if module.__name__ == f"burnish.{name}" else getattr(module, name)  # a package may be a verb


def __dir__() -> list[str]:
    return __all__
