import os

import pytest
import torch

PRIVATE = "_patch_lang", "_get_np_dtype"  # of Triton 3.7; without them the tests are slower


def make_interpreter_faster():
    """Two functions would take most of its time, so they do their work once."""
    import triton.language as tl
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, name) for name in PRIVATE):
        return
    patch_lang, get_np_dtype, np_dtypes = interpreter._patch_lang, interpreter._get_np_dtype, {}

    def patch_once(fn):
        """Before each call in a kernel all of triton.language is looked through and patched."""
        modules = [x for x in fn.__globals__.values() if x is tl or x is tl.core]
        if any(tl.core.is_builtin(x.load) for x in modules):
            return patch_lang(fn)

    def np_dtype_of(dtype):
        name = dtype.scalar.name
        if name not in np_dtypes:
            np_dtypes[name] = get_np_dtype(dtype)
        return np_dtypes[name]

    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, np_dtype_of


def make_tensors_faster():
    """Every operation makes types and tensors, of few dtypes and shapes."""
    from triton.language import core

    init_block, init_tensor = core.block_type.__init__, core.tensor.__init__
    blocks, shapes = {}, {}

    def block_type(self, element_ty, shape):
        self.numbers = tuple(getattr(n, "value", n) for n in shape)  # its own tuples compare slowly
        key = element_ty.name, self.numbers
        if key not in blocks:
            init_block(self, element_ty, shape)
            blocks[key] = self.shape, self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = blocks[key]

    def tensor(self, handle, type):
        shape = type.numbers if type.is_block() else ()
        if shape not in shapes:
            init_tensor(self, handle, type)
            shapes[shape] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[shape]

    core.block_type.__init__, core.tensor.__init__ = block_type, tensor


if os.environ.get("TRITON_INTERPRET") == "1":
    make_interpreter_faster()
    make_tensors_faster()


# `torch.device` as a context learns torch's constructors at its first use: were one patched then,
# models "on meta" would be on the CPU for the rest of the process
with torch.device("meta"):
    torch.empty(0)


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
