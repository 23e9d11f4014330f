"""Simulators behind one protocol; importing this registers them by name without importing any simulator."""

from collections.abc import Callable
from importlib import import_module

from burnish.envs.base import ENVS, Env, EnvFamily
from burnish.envs.rendering import choose_gl_backend

choose_gl_backend()


def _late(module: str) -> EnvFamily:
    def tasks(selector: str) -> list[str]:
        return import_module(module).tasks(selector)

    def make(selector: str, image_size: int) -> Env:
        return import_module(module).make(selector, image_size)

    return EnvFamily(tasks, make)


_MODULES: dict[str, str] = {
    "tabletop": "burnish.envs.tabletop",
    "metaworld": "burnish.envs.metaworld",
    "libero": "burnish.envs.libero",
}
register: Callable = ENVS.register
for _name, _module in _MODULES.items():
    register(_name)(_late(_module))
