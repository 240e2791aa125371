"""``ramfs fsck``."""

import json

import click

from ramfs.errors import RamfsError
from ramfs.store.check import KINDS, Finding
from ramfs.store.repair import check_store

# Exit codes of fsck(8).
CLEAN, CORRECTED, UNCORRECTED, FAILED, USAGE = 0, 1, 4, 8, 16


class _Fsck(click.Command):
    """A command whose wrong usage has the exit code that fsck(8) gives it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as exc:
            exc.exit_code = USAGE  # type: ignore[misc]
            raise


def _as_dict(finding: Finding, state: str) -> dict[str, object]:
    kind = KINDS[finding.kind]
    return {
        "kind": finding.kind,
        "where": finding.where,
        "meaning": kind.meaning,
        "detail": finding.detail,
        "damage": kind.damage,
        "repairable": finding.fix is not None,
        "state": state,
    }


def _line(finding: Finding, state: str) -> str:
    text = f"{'damage' if finding.damage else 'note'}: {finding.kind}: {finding}"
    if state == "repaired":
        return f"{text}; repaired: {KINDS[finding.kind].repair}"
    if not finding.damage:
        return text
    return f"{text}; {'--repair can mend it' if finding.fix is not None else '--repair cannot mend it'}"


@click.command("fsck", cls=_Fsck)
@click.argument("store", type=click.Path())
@click.option("--repair", is_flag=True, help="Mend what can be mended; pages that are lost give EIO afterwards.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
def fsck(store: str, repair: bool, as_json: bool) -> int:
    """Check STORE, which must not be mounted, and name every damage.

    Writes nothing without --repair. A store that was not closed, because its daemon was killed or the
    machine went down, is not damaged: it is checked as the next mount will find it.

    \b
    Exit codes, as those of fsck(8):
      0  clean
      1  damage was found and mended
      4  damage is left
      8  the check could not be made
      16 the command line is wrong
    """  # noqa: D301 - click takes the backspace for "do not wrap"
    try:
        report = check_store(store, repair=repair)
    except (RamfsError, OSError) as exc:
        if as_json:
            click.echo(json.dumps({"store": store, "error": str(exc)}, indent=2))
        click.echo(f"ramfs: {exc}", err=True)
        return FAILED
    mended = any(finding.damage for finding in report.repaired)
    code = UNCORRECTED if report.damaged else CORRECTED if mended else CLEAN
    states = [(finding, "repaired") for finding in report.repaired]
    states += [(finding, "found") for finding in report.findings]
    if as_json:
        findings = [_as_dict(finding, state) for finding, state in states]
        click.echo(json.dumps({"store": store, "exit": code, "notes": report.notes, "findings": findings}, indent=2))
        return code
    for note in report.notes:
        click.echo(f"note: {note}")
    for finding, state in states:
        click.echo(_line(finding, state))
    words = {CLEAN: "clean", CORRECTED: "mended", UNCORRECTED: "damaged"}
    click.echo(f"{store}: {words[code]}")
    return code
