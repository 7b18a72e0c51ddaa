"""What kernels that begin early ask of the driver."""

import ctypes
from types import SimpleNamespace

import pytest

from kimi_kernels import overlap


class Kernel:
    """What a launch returns."""

    name, function = "some_kernel", 0x1234

    def __init__(self, backend, arch):
        self.metadata = SimpleNamespace(target=SimpleNamespace(backend=backend, arch=arch))


class Driver:
    def __init__(self, error=0):
        self.error, self.calls = error, []

    def cuFuncSetAttribute(self, function, attribute, value):
        self.calls.append((function.value, attribute, value))
        return self.error


@pytest.mark.parametrize(
    "backend, arch, calls",
    [("cuda", 90, 1), ("cuda", 120, 1), ("cuda", 80, 0), ("hip", "gfx942", 0)],
    ids=str,
)
def test_the_driver_is_asked_once(backend, arch, calls, monkeypatch):
    driver, kernel = Driver(), Kernel(backend, arch)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    for _ in range(2):
        overlap.prefer_shared(kernel)
        overlap.prefer_shared(None)
    assert driver.calls == [(0x1234, overlap.CARVEOUT, 100)] * calls


def test_an_error_of_the_driver(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(error=400))
    with pytest.raises(RuntimeError, match=r"^CUDA error 400 where some_kernel asks"):
        overlap.prefer_shared(Kernel("cuda", 90))
