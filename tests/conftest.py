"""What all tests share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small are slower on several threads, very much so beside other test processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
