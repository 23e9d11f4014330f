"""Simulators behind one protocol (base.py). No simulator is imported before one of its tasks is asked for."""

from burnish.envs.rendering import choose_gl_backend

choose_gl_backend()
