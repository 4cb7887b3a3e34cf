"""What all tests share."""

from contextlib import nullcontext

import pytest
import torch
from runs import assets, faces  # noqa: F401  (fixtures)

import loop

DRAWN = loop.plot_curves, loop.tensorboard_events


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Networks this small are slower on several threads, very much so beside other test processes. For the session: a
    fixture of a module runs before one of a test, and another number of threads sums in another order."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def still_one_thread():
    """A command may have taken more."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def no_curves():
    """The picture of the curves takes longer than the trainings here, and so does TensorBoard's import."""
    loop.plot_curves = lambda table, picture: picture.touch()
    loop.tensorboard_events = lambda folder, begin: nullcontext(lambda figures, step: None)


@pytest.fixture
def curves(monkeypatch):
    """All the same, for the test that wants them."""
    monkeypatch.setattr(loop, "plot_curves", DRAWN[0])
    monkeypatch.setattr(loop, "tensorboard_events", DRAWN[1])


@pytest.fixture
def solves(monkeypatch) -> list:
    """The sizes of the systems solved since."""
    seen = []
    inverse = torch.linalg.inv_ex
    monkeypatch.setattr(torch.linalg, "inv_ex", lambda a: seen.append(len(a)) or inverse(a))
    return seen
