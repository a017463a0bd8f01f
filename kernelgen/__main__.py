"""``python -m kernelgen``, and the ``kernelgen`` command."""

from kernelgen.core import entry


def main() -> None:
    """Run the command line."""
    entry.run("kernelgen.cli", "commands")


if __name__ == "__main__":
    main()
