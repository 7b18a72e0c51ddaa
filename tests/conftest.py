"""What every test runs under. The environment is set before triton or transformers load."""

import fcntl
import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when it is imported

workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if workers > 1:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random numbers, in any order and on any worker."""
    torch.manual_seed(0)


def give_memory_back():
    """To the other workers on a GPU: torch keeps what a test has freed."""
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def keep_little_memory():
    yield
    if torch.cuda.is_available() and torch.cuda.memory_reserved() > 2**31:
        give_memory_back()


@pytest.fixture
def much_memory(tmp_path_factory):
    """For a test that fills tens of GB of a GPU: one at a time, over all workers."""
    with open(tmp_path_factory.getbasetemp().parent / "much_memory.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        give_memory_back()
        yield
        give_memory_back()
