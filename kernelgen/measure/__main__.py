"""``python -m kernelgen.measure``: works where only torch, triton, click and rich are installed."""

from kernelgen.measure.command import bench

if __name__ == "__main__":
    bench(prog_name="kernelgen bench")
