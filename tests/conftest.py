"""What all tests share."""

import pytest
import torch
from runs import CURVES, assets, faces, without_curves  # noqa: F401  (fixtures)

import loop


@pytest.fixture(autouse=True, scope="session")
def small():
    """Networks this small are slower on several threads, very much so beside other test processes. For the session: a
    fixture of a module runs before one of a test, and another number of threads sums in another order."""
    torch.set_num_threads(1)
    without_curves()


@pytest.fixture(autouse=True)
def still_one_thread():
    """A command may have taken more."""
    torch.set_num_threads(1)


@pytest.fixture
def curves(monkeypatch):
    """All the same, for the test that wants them."""
    monkeypatch.setattr(loop, "plot_curves", CURVES[0])
    monkeypatch.setattr(loop, "tensorboard_events", CURVES[1])


@pytest.fixture
def solves(monkeypatch) -> list:
    """The sizes of the systems solved since."""
    seen = []
    inverse = torch.linalg.inv_ex
    monkeypatch.setattr(torch.linalg, "inv_ex", lambda a: seen.append(len(a)) or inverse(a))
    return seen
