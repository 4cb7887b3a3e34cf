"""What all tests share."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Networks this small are slower on several threads, very much so beside other test processes. For the session: a
    fixture of a module runs before one of a test, and another number of threads sums in another order."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def still_one_thread():
    """A command may have taken more."""
    torch.set_num_threads(1)
