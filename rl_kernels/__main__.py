"""The command line: ``python -m rl_kernels COMMAND``.

A command's module is imported when the command runs, so that ``--help`` is quick and one command's extras are not
needed by another.
"""

from __future__ import annotations

from importlib import import_module

import click

# name: (module:attribute of the click command, one line for --help)
COMMANDS = {
    "demo": (
        "rl_kernels.commands.demo:demo_command",
        "Train a small ResNet and ViT, whole and with blocks replaced.",
    ),
    "doctor": (
        "rl_kernels.commands.doctor:doctor_command",
        "Check this installation: versions, devices, backends.",
    ),
    "inspect": (
        "rl_kernels.commands.inspect:inspect_command",
        "Compile the GPU kernels without a GPU and look at their code.",
    ),
    "plan": (
        "rl_kernels.commands.plan:plan_command",
        "Show which blocks of a named model would be replaced.",
    ),
    "train": (
        "rl_kernels.commands.systems:train_command",
        "Train a paper's system: what a preset, a file and settings say.",
    ),
    "resume": (
        "rl_kernels.commands.systems:resume_command",
        "Go on with a run that was stopped or killed.",
    ),
    "eval": (
        "rl_kernels.commands.systems:eval_command",
        "Evaluate a run's checkpoint.",
    ),
    "compare": (
        "rl_kernels.commands.systems:compare_command",
        "Compare runs over seeds; or carry out an experiment.",
    ),
    "few-shot": (
        "rl_kernels.commands.few_shot:few_shot_command",
        "Learn tasks of few images, and compare ways to adapt to them.",
    ),
    "report": (
        "rl_kernels.commands.systems:report_command",
        "Write one HTML page about runs.",
    ),
    "qualify": (
        "rl_kernels.qualify.command:qualify_command",
        "Check and time every kernel here, and enable those that win.",
    ),
}


class LazyGroup(click.Group):
    """A click group that imports a command of :data:`COMMANDS` only when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands' names."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command, or None where there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name][0].split(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="rl_kernels", prog_name="rl_kernels")
def main() -> None:
    """Layers whose weights are mixed from their neighbours' while they are multiplied."""


if __name__ == "__main__":
    main(prog_name="python -m rl_kernels")
