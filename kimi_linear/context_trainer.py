"""transformers' Trainer with context parallelism."""

from typing import Any

import torch.distributed as dist
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, IterableDatasetShard
from torch.utils.data import DataLoader
from transformers import Trainer

from kimi_linear.context import shard_sequence


class ContextParallelTrainer(Trainer):
    """A Trainer whose processes share their batches: each runs its span of the tokens.

        torchrun --nproc-per-node 8 ...
        ContextParallelTrainer(model, args, train_dataset=documents, ...).train()

    `context_ranks` consecutive processes load the same batch and split it by `shard_sequence`; DDP
    or FSDP brings the gradients of all processes together. A step sees `world / context_ranks`
    times the batches of one process, and trains as that many processes with whole batches would.
    accelerate's own `cp_size` is another scheme, for models with nothing but full attention.

    Args:
        context_ranks: processes that share a batch; by default all.

    Raises:
        ValueError: `context_ranks` does not divide the number of processes; a loss of one's own; a
            dataset that only the main process reads; an evaluation that needs more than the loss,
            since no process has the logits of whole rows.
    """

    def __init__(self, *args: Any, context_ranks: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        world = self.args.world_size
        n = self.context_ranks = world if context_ranks is None else context_ranks
        if n < 1 or world % n:
            raise ValueError(f"context_ranks is {n}, want a divisor of the {world} processes")
        if n > 1 and not (self.label_smoother is None and self.compute_loss_func is None):
            raise ValueError("label_smoothing_factor or compute_loss_func: want the model's loss")
        self.context_group: Any = dist.new_subgroups(n)[0] if n > 1 else None

    def compute_loss(self, model, inputs, *args, **kwargs):
        """Trainer's, of this process's span."""
        # A batch is counted n times in num_items_in_batch, and its loss n times in the mean over
        # the processes that Trainer takes.
        if self.context_group is not None:
            inputs = shard_sequence(inputs, self.context_group)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if self.context_group is not None and not prediction_loss_only:
            raise ValueError("prediction_loss_only is False, but a process has logits of its span")
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def get_total_train_batch_size(self, args) -> int:
        return super().get_total_train_batch_size(args) // self.context_ranks

    def get_train_dataloader(self) -> DataLoader:
        return self._same_batches(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        return self._same_batches(super().get_eval_dataloader(eval_dataset))

    def _same_batches(self, loader: DataLoader) -> DataLoader:
        """Let the processes of a group load what one process would."""
        if isinstance(loader, DataLoaderDispatcher):
            raise ValueError(
                "accelerator_config has dispatch_batches, want False: every process reads its batch"
            )
        for part in (loader.batch_sampler, loader.dataset):
            if isinstance(part, BatchSamplerShard | IterableDatasetShard):
                part.num_processes = self.args.world_size // self.context_ranks
                part.process_index = self.args.process_index // self.context_ranks
        return loader
