"""Packages that are also verbs.

`from burnish import train` names a package and a function. Python's import system puts the package under that name
as soon as anything inside it is imported, whatever the parent defines, so the package itself answers the call.
"""

import inspect
import sys
from importlib import import_module
from types import ModuleType


def make_callable(package: str, module: str, function: str) -> None:
    """Let calls of the imported `package` go to `module.function`, which is imported at the first call."""

    class Verb(ModuleType):
        def __call__(self, *args, **kwargs):
            return getattr(import_module(module), function)(*args, **kwargs)

        @property
        def __signature__(self) -> inspect.Signature:
            return inspect.signature(getattr(import_module(module), function))

    sys.modules[package].__class__ = Verb
