"""``python -m kernelgen.demo``."""

from kernelgen.core import entry

if __name__ == "__main__":
    entry.run("kernelgen.demo.command", "main")
