import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.language as tl
    from triton.runtime import interpreter

    patch_lang = interpreter._patch_lang

    def patch_once(fn):
        """What the interpreter does before each call in a kernel, if it has not been done.

        It looks through all of triton.language, which takes longer than most of the functions.
        """
        modules = [x for x in fn.__globals__.values() if x is tl or x is tl.core]
        if any(tl.core.is_builtin(x.load) for x in modules):
            return patch_lang(fn)

    interpreter._patch_lang = patch_once


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch):
    """Fill torch.empty* with NaN, so a kernel that leaves an output unwritten cannot pass."""
    makers = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided")]
    for owner, name in [*makers, (torch.Tensor, "new_empty")]:
        make = getattr(owner, name)

        def poisoned(*args, _make=make, **kwargs):
            t = _make(*args, **kwargs)
            with torch.no_grad():
                return t.fill_(float("nan")) if t.is_floating_point() else t

        monkeypatch.setattr(owner, name, poisoned)
