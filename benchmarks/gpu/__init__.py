"""Checks pruning and recovery on a GPU against the CPU, with tokens per second and peak memory.

    make gpu                                    # the embedded model and Python's documentation: needs no network
    python -m benchmarks.gpu --pretrained FOLDER --train_files TEXT --val_files TEXT
    python -m benchmarks.gpu --table            # writes the table of docs/devices.md from the results

Run it in the root of the repository. Every case runs in a process of its own; one that fails is reported at the end, by
an exit status of 1, and does not stop the others. The results are in benchmarks/measured/gpu-NAME.jsonl, where NAME is
that of the device; a second start runs only the cases that are missing or failed.
"""
