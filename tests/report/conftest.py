"""Work folders that tests of the page share; what changes one copies it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mode_gguf.workfolder import WorkFolder
from tests.report.folders import write_folder


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> WorkFolder:
    """A whole work folder with a type per tensor; read only."""
    return write_folder(tmp_path_factory.mktemp("report") / "work")


@pytest.fixture(scope="session")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> WorkFolder:
    """One with a type per expert; read only."""
    return write_folder(tmp_path_factory.mktemp("report") / "grouped", per_expert=True)


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[WorkFolder], WorkFolder]:
    """copied(folder): one to do with as a test likes."""

    def copied(folder: WorkFolder) -> WorkFolder:
        return WorkFolder(Path(shutil.copytree(folder.path, tmp_path / folder.path.name)), folder.name)

    return copied
