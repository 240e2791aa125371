"""``ramfs recover``."""

import click

from ramfs.cli._pulls import source_of, steer


@click.command("recover")
@click.argument("directory", metavar="DIR")
@click.option("--source", "uri", required=True, metavar="URI", help="Where the rest comes from, as in `ramfs pull`.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def recover(directory: str, uri: str, as_json: bool) -> None:
    """Take what DIR still lacks from another source: one that has the same files, of the same sizes.

    DIR is a directory that was pulled, a clone or snapshot of it, or a file in one of these. Nothing that is here is
    fetched again, and who waits for a page goes on. A file that was pulled alone may have another name there, which
    the URI then tells. If the source cannot be used all stays as it was. If DIR is unverified and this source has a
    manifest, all is compared with that from now on, also what came before.
    """
    uri = source_of(uri)
    steer(directory, {"uri": uri}, as_json=as_json, done=f"goes on from {uri}")
