"""``python -m kernelgen.bench``: works where only torch, triton, click and rich are installed."""

from kernelgen.bench.command import bench

if __name__ == "__main__":
    bench(prog_name="kernelgen bench")
