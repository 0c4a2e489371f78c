"""The command `jpeft`."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import util

from jpeft.cli._errors import UserError, check_choice


_HELP = """usage: jpeft COMMAND [OPTIONS]

Parameter-efficient fine-tuning for JAX and Flax.

commands:
  finetune   fine-tune a pretrained model to write, or to classify texts, and leave an adapter
  generate   let a model, with an adapter or without, go on with a text
  chat       talk with a model
  plan       tell whether fine-tuning a model fits on a slice of a TPU pod, without one

`jpeft COMMAND --help` shows a command's options. Without any, `jpeft finetune` runs a demonstration.
"""
_EXTRA = ("tyro", "rich", "matplotlib", "safetensors", "tokenizers", "jinja2")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`, by default that of the process, and return its exit code.

    2 tells of an input that cannot be worked with, 130 of a Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_HELP)
        return 0 if argv else 2
    commands: dict[str, Callable[[Sequence[str]], int]] = {
        "finetune": _finetune,
        "generate": _generate,
        "chat": _chat,
        "plan": _plan,
    }
    try:
        check_choice("command", argv[0], commands)
        if missing := [name for name in _EXTRA if util.find_spec(name) is None]:
            raise UserError(f'{", ".join(missing)} is not installed: pip install "jpeft[cli]"')
        return commands[argv[0]](argv[1:])
    except UserError as error:
        print(f"jpeft: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jpeft: interrupted; what was saved stays", file=sys.stderr)
        return 130


def _finetune(argv: Sequence[str]) -> int:
    import tyro
    from rich.console import Console

    from jpeft.cli._arguments import Arguments
    from jpeft.cli._run import check_same, saved_arguments
    from jpeft.cli._train import Interrupted
    from jpeft.cli.finetune import finetune

    parse = partial(tyro.cli, Arguments, prog="jpeft finetune", args=argv)
    arguments = parse()
    if arguments.resume:
        saved = saved_arguments(arguments)
        arguments = parse(default=saved)
        check_same(arguments, saved)
    console = Console(width=None if sys.stdout.isatty() else 120, markup=False, highlight=False)
    try:
        finetune(arguments, console)
    except Interrupted as stop:
        console.print(f"{stop}; to go on: jpeft finetune --resume --output {stop.directory}")
        return 130
    return 0


def _generate(argv: Sequence[str]) -> int:
    import tyro

    from jpeft.cli.generate import Arguments, generate

    generate(tyro.cli(Arguments, prog="jpeft generate", args=argv))
    return 0


def _chat(argv: Sequence[str]) -> int:
    import tyro

    from jpeft.cli.chat import Arguments, chat

    chat(tyro.cli(Arguments, prog="jpeft chat", args=argv))
    return 0


def _plan(argv: Sequence[str]) -> int:
    import tyro
    from rich.console import Console

    from jpeft.cli.plan import Arguments, run

    console = Console(width=None if sys.stdout.isatty() else 120, markup=False, highlight=False)
    return run(tyro.cli(Arguments, prog="jpeft plan", args=argv), console)
