"""An optimizer step of transformers' Trainer on packed documents, and the same in a bare loop.

Letters as in model_step.py; the B T tokens are `DOCUMENTS`, as long as each other. Both sides run
forward, loss, backward, clipping to a norm of 1 and SGD without momentum, whose states would else
not fit, with a rate of 0: the same work, and every step starts from the same weights.
"""

import tempfile
import threading
import weakref
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs import Inputs, Shape
from benchmarks.model_step import COMPARED, on_weights, our_config
from benchmarks.providers import Call

DOCUMENTS = 8
CLIP = 1.0  # Trainer's own default


def as_rows(shape: Shape) -> Shape:
    """The documents as rows of a batch, which cost the same."""
    return shape | {"B": DOCUMENTS, "T": shape["B"] * shape["T"] // DOCUMENTS}


def documents(x: Inputs) -> list[dict[str, list[int]]]:
    return [{"input_ids": ids.tolist()} for ids in x["ids"].flatten().tensor_split(DOCUMENTS)]


def collator() -> Any:
    return import_module("transformers").DataCollatorWithFlattening(return_flash_attn_kwargs=True)


def gradients(model: Any) -> tuple[Tensor, ...]:
    return tuple(model.get_parameter(name).grad for name in COMPARED)


def bare(x: Inputs) -> Call:
    """The loss of a step, and some gradients after clipping."""
    model = on_weights(our_config(x), x).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    batch = collator()(documents(x))
    batch = {k: t.to(x["ids"].device) if isinstance(t, Tensor) else t for k, t in batch.items()}

    def call():
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        found = gradients(model)
        optimizer.zero_grad()
        return loss.detach(), *found

    return call


class Stepper:
    """A training in a thread of its own, which runs a step whenever it is told to.

    `step` and `wait` are called where a step starts: in between lie all that Trainer does for one,
    its logs and the next batch.
    """

    def __init__(self) -> None:
        self.go, self.ready = threading.Semaphore(0), threading.Semaphore(0)
        self.stopped, self.error = False, None

    def start(self, train: Any) -> None:
        self.thread = threading.Thread(target=self._run, args=(train,), daemon=True)
        self.thread.start()
        self._await()

    def _run(self, train: Any) -> None:
        try:
            train()
        except BaseException as error:
            self.error = error
        self.ready.release()

    def _await(self) -> None:
        self.ready.acquire()
        if self.error is not None:
            raise self.error

    def wait(self) -> None:
        """In the thread: the step before is done, the next one not asked for."""
        self.ready.release()
        self.go.acquire()
        if self.stopped:
            raise SystemExit

    def step(self) -> None:
        """From outside: one step."""
        self.go.release()
        self._await()

    def stop(self) -> None:
        self.stopped = True
        self.go.release()
        self.thread.join()


def _trainer(x: Inputs, autocast: bool) -> Call:
    transformers = import_module("transformers")
    model, rows, stepper, seen = on_weights(our_config(x), x), documents(x), Stepper(), {}

    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[dict[str, list[int]]]:
            while True:
                yield from rows

    class Callback(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs) -> None:
            stepper.wait()

        def on_optimizer_step(self, *args, model, **kwargs) -> None:
            seen["gradients"] = gradients(model)

    class Trainer(transformers.Trainer):
        def training_step(self, *args, **kwargs) -> Tensor:
            seen["loss"] = super().training_step(*args, **kwargs)
            return seen["loss"]

    def train() -> None:
        with tempfile.TemporaryDirectory() as folder:
            arguments = transformers.TrainingArguments(
                folder,
                max_steps=10**9,
                per_device_train_batch_size=DOCUMENTS,
                optim="sgd",
                learning_rate=0.0,
                max_grad_norm=CLIP,
                bf16=autocast,
                logging_steps=10,
                save_strategy="no",
                report_to=[],
                accelerator_config={"dispatch_batches": False},  # which cuts cu_seqlens off
                disable_tqdm=True,
                use_cpu=x["ids"].device.type == "cpu",
            )
            if arguments.n_gpu > 1:
                arguments._n_gpu = 1  # else DataParallel over all GPUs there are
            trainer = Trainer(model, arguments, collator(), Rows(), callbacks=[Callback()])
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()

    stepper.start(train)

    def call():
        stepper.step()
        return seen.pop("loss"), *seen.pop("gradients")

    weakref.finalize(call, stepper.stop)
    return call


def trainer(x: Inputs) -> Call:
    return _trainer(x, autocast=False)


def autocast_trainer(x: Inputs) -> Call:
    """With `bf16=True`, as most have it: autocast, here over weights in bf16."""
    return _trainer(x, autocast=True)
