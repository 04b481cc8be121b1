"""The position within the epochs at which a resumed run continues, from the counters of Lightning's loops.

Lightning 2.6 counts an epoch as processed only after the last batch's `on_train_batch_end`, in which a checkpoint may
be saved. Two errors follow when a run is resumed. From such a checkpoint Lightning finishes counting the epoch, but
takes the next one for started and never counts its start; with `max_epochs`, a second resume within that next epoch
reads as many epochs processed as started, and trains the epoch from its first batch again. From a checkpoint that was
saved later, at the end of the epoch or of the training, a run with `max_steps` trains one batch more than the epoch
has. Hence the counters are corrected before Lightning reads them: a run continues either within an epoch, or between
two, the first processed and the second not started.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

Counters = dict[str, Any]


def settle_epoch(fit_loop: Counters) -> bool:
    """Corrects the counters of a checkpoint in place; returns whether the run continues between two epochs.

    An epoch that `max_steps` or `should_stop` ended before its last batch is not over, and the run continues within it.

    Args:
        fit_loop: `checkpoint["loops"]["fit_loop"]`, the numbers of epochs and batches started and processed, by loop.
    """
    epochs, batches = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    started, processed = epochs["current"]["started"], epochs["current"]["processed"]
    if not batches["is_last_batch"] and batches["current"]["processed"] > 0:
        _set(epochs, ("total", "current"), started=started, processed=started - 1)
        return False
    if batches["is_last_batch"] and processed < started:
        processed = started
        # Lightning increments this, too, only after the batch's hooks
        fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
    _set(epochs, ("total", "current"), started=processed, processed=processed)
    batches_processed = batches["total"]["processed"]
    _set(batches, ("total",), started=batches_processed, processed=batches_processed)
    _set(batches, ("current",), started=0, processed=0)
    batches["is_last_batch"] = False
    fit_loop["state_dict"].pop("combined_loader", None)  # the loader's position in the epoch that is over
    return True


def _set(progress: Counters, scopes: tuple[str, ...], *, started: int, processed: int) -> None:
    for scope in scopes:
        progress[scope] = {"ready": started, "started": started, "processed": processed, "completed": processed}


def reload_training_data(trainer: Trainer) -> None:
    """Makes a resumed Trainer build its training loader again; call it in `on_fit_start` at the latest.

    Lightning restores the position of a checkpoint only in a loader that is built after the loops' states were loaded,
    and reading `estimated_stepping_batches` earlier, as optimizers do, has built one.
    """
    if trainer.ckpt_path:
        trainer.fit_loop._combined_loader = None


def begin_epoch(trainer: Trainer) -> None:
    """Makes a run that continues between two epochs start the second as a new one; call it in `on_train_start`.

    With `max_steps` Lightning treats every resume as one within an epoch.
    """
    trainer.fit_loop.epoch_loop.restarting = False
