"""What everything stands on: names, models, diagnostics, files, processes, GPUs, and how a command starts and ends."""
