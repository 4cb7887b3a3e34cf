"""What all tests share."""

import pytest
import torch
from runs import CURVES, assets, faces, without_curves  # noqa: F401  (fixtures)

import loop
from blocks import PixelUnshuffleBlock
from models import BUILT_IN
from networks import pointwise


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


@pytest.fixture
def small_32(monkeypatch):
    """In place of the published chain for 32x32, which solves 2048 x 2048 systems: seconds that show nothing more."""

    def chain(d, block):
        return [
            PixelUnshuffleBlock(4),
            block(48, 2, st=pointwise(46, 2, 128), r=pointwise(2, 46, 128)),
            PixelUnshuffleBlock(8),
            block(128, d, st=pointwise(128 - d, d, 128), r=pointwise(d, 128 - d, 128)),
        ]

    monkeypatch.setitem(BUILT_IN, 32, chain)
