"""``python -m kernelgen.measure.tune``: works where only torch, triton, click, rich and PyYAML are installed."""

from kernelgen.measure.tune.command import tune

if __name__ == "__main__":
    tune(prog_name="kernelgen tune")
