"""What pyproject.toml cannot say: optimum's shared namespace in the wheel, and links in the source distribution."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist

LINKED = ("runtime", "export", "calibration", "evaluation")


class SourceDistribution(sdist):
    """Keep the links of `bridge_stg/` as links, so that the archive is the checkout."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Copy the files, then put a link where a linked folder was copied a second time."""
        super().make_release_tree(base_dir, files)
        for name in LINKED:
            folder = Path(base_dir, "bridge_stg", name)
            shutil.rmtree(folder)
            folder.symlink_to(Path("..", name), target_is_directory=True)


setup(
    # optimum-cli finds other packages' commands in this namespace, which has no __init__.py.
    packages=[*find_packages(include=["bridge_stg", "bridge_stg.*"]), "optimum.commands.register"],
    package_dir={"optimum.commands.register": "bridge_stg/optimum_commands"},
    cmdclass={"sdist": SourceDistribution},
)
