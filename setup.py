"""Puts the announcement of the LeRobot plug-in into wheels; everything else is in pyproject.toml.

LeRobot finds plug-ins by the names of installed distributions. In an editable installation it finds
src/lerobot_policy_burnish.egg-info by itself, because src is on the path.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ANNOUNCEMENT = "lerobot_policy_burnish.egg-info"


class BuildWithAnnouncement(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / ANNOUNCEMENT
            self.mkpath(str(target))
            self.copy_file(str(Path("src") / ANNOUNCEMENT / "PKG-INFO"), str(target / "PKG-INFO"))


setup(cmdclass={"build_py": BuildWithAnnouncement})
