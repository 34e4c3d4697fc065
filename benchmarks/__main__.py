"""The command line: ``python -m benchmarks COMMAND``."""

from __future__ import annotations

import click

from benchmarks.families import families_command
from benchmarks.plot import plot_command
from benchmarks.readme import readme_command
from benchmarks.run import run_command
from benchmarks.verify import verify_command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Every way to run a layer on a mixed weight, timed side by side."""


main.add_command(run_command)
main.add_command(plot_command)
main.add_command(verify_command)
main.add_command(readme_command)
main.add_command(families_command)

if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
