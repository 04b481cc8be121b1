"""Where in its epochs a resumed run goes on, read off the counters of Lightning's loops in a checkpoint.

Lightning 2.6 counts an epoch as processed only after the last batch's `on_train_batch_end`, where a checkpoint may be
written. Resumed from one it counts that epoch itself, but takes the next one for begun already and never counts its
begin. With `max_epochs`, a second resume in that next epoch then finds as many epochs processed as begun, and trains
the epoch from its first batch again. From a checkpoint that was written later, at the end of the epoch or of the
training, a run with `max_steps` trains one batch more than an epoch has. So the counters are settled before Lightning
reads them: a run goes on within an epoch, or between two, of which the first is over and the second not begun.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

Counters = dict[str, Any]


def settle_epoch(fit_loop: Counters) -> bool:
    """Settles the counters of a checkpoint in place; returns whether the run goes on between two epochs.

    An epoch that `max_steps` or `should_stop` ended before its last batch is not over: the run goes on within it.

    Args:
        fit_loop: `checkpoint["loops"]["fit_loop"]`: by loop, how many epochs and batches were begun and processed.
    """
    epochs, batches = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    begun, processed = epochs["current"]["started"], epochs["current"]["processed"]
    if not batches["is_last_batch"] and batches["current"]["processed"] > 0:
        _set(epochs, ("total", "current"), begun=begun, processed=begun - 1)
        return False
    if batches["is_last_batch"] and processed < begun:
        processed = begun
        fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] += 1  # after the hooks of the batch, as the epoch
    _set(epochs, ("total", "current"), begun=processed, processed=processed)
    seen = batches["total"]["processed"]
    _set(batches, ("total",), begun=seen, processed=seen)
    _set(batches, ("current",), begun=0, processed=0)
    batches["is_last_batch"] = False
    fit_loop["state_dict"].pop("combined_loader", None)  # the position in the epoch that is over
    return True


def _set(progress: Counters, parts: tuple[str, ...], *, begun: int, processed: int) -> None:
    for part in parts:
        progress[part] = {"ready": begun, "started": begun, "processed": processed, "completed": processed}


def reload_training_data(trainer: Trainer) -> None:
    """Lets a resumed Trainer make its training loader anew, in `on_fit_start` at the latest.

    Lightning gives the position of a checkpoint only to a loader that is made after the loops' states were loaded, and
    `estimated_stepping_batches` has made one for whoever counted the steps before.
    """
    if trainer.ckpt_path:
        trainer.fit_loop._combined_loader = None


def begin_epoch(trainer: Trainer) -> None:
    """Lets a run that goes on between two epochs begin the second as any other, in `on_train_start`.

    With `max_steps` Lightning takes every resume for one within an epoch.
    """
    trainer.fit_loop.epoch_loop.restarting = False
