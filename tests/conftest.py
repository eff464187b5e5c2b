"""Fixtures of the whole suite."""

from pathlib import Path

import hypothesis
import pytest

# Examples are judged by what they show: how long one takes is the machine's business.
hypothesis.settings.register_profile("kvmmmu", deadline=None)
hypothesis.settings.load_profile("kvmmmu")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout the tests stand in."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The recorded truth beside the checkout; what needs it is skipped, with a message, where it is absent."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip(f"no recorded truth at {path}: the slices in tests/data are checked instead")
    return path
