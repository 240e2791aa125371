"""The command line: one file a command, each parses, calls and prints."""

import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, Final

import click

import ramfs
from ramfs.errors import EXIT_CODES, MountError, RamfsError

#: Commands and the modules they are in, imported when asked for: numpy and libfuse are not needed to unmount.
_COMMANDS: Final = (
    "mount", "umount", "upgrade", "snapshot", "clone", "capture", "flatten", "pull", "recover", "pause", "resume",
    "status", "top", "du", "diff", "log", "send", "receive", "layout", "map", "fsck",
)  # fmt: skip

#: Where the function has another name than the command, as Python has a function of that name.
_FUNCTIONS: Final = {"map": "map_"}

_EPILOG: Final = "\b\nExit codes:\n" + "\n".join(f"  {code}  {meaning}" for code, meaning in EXIT_CODES)


class _Commands(click.Group):
    """The group of all commands, in the order of use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"ramfs.cli.{cmd_name}")
        command: click.Command = getattr(module, _FUNCTIONS.get(cmd_name, cmd_name))
        return command


@click.group(cls=_Commands, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(ramfs.__version__, prog_name="ramfs")
def cli() -> None:
    """Keep the RAM of virtual machines as files; clone a guest by copying its directory.

    `ramfs STORE MOUNTPOINT [-o OPTIONS]` mounts too: that is how mount(8) calls a helper.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code. Errors are one line on standard error."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if len(words) >= 2 and words[0] not in _COMMANDS and not words[0].startswith("-") and "/" in words[0] + words[1]:
        words.insert(0, "mount")
    try:
        result: Any = cli.main(words, prog_name="ramfs", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as exc:
        exc.show()
        return 2
    except click.ClickException as exc:
        command = f"ramfs {words[0]}" if words and words[0] in _COMMANDS else "ramfs"
        message = exc.format_message().rstrip(".")
        click.echo(f"ramfs: {message}; see `{command} --help`", err=True)
        return exc.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("ramfs: interrupted", err=True)
        return 130
    except RamfsError as exc:
        click.echo(f"ramfs: {exc}", err=True)
        return exc.exit_code
    except BrokenPipeError:  # `ramfs status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as exc:
        name = f"{os.fsdecode(exc.filename)}: " if exc.filename is not None else ""
        if exc.errno == errno.ENOTCONN:
            click.echo(f"ramfs: {name}the daemon of this mount has died: `ramfs umount` and mount it again", err=True)
            return MountError.exit_code
        click.echo(f"ramfs: {name}{exc.strerror or exc}", err=True)
        return 1
    return result if isinstance(result, int) else 0
