"""An arriving layer from its beginning, when images name what is not here, to its end as a layer like any other."""

import os
from collections.abc import Mapping

import numpy as np
import trio

from ramfs.arrival.known import Known
from ramfs.errors import StoreDamaged
from ramfs.image.table import CHUNK, Entries, Mask, runs_of
from ramfs.pager import ENTRIES_AT_ONCE, Pager
from ramfs.store.files import sync_directory
from ramfs.store.images import Image
from ramfs.store.layers import Layer
from ramfs.store.presence import ABSENT, ZEROS, Presence
from ramfs.units import LOST, ZERO, ImageId, LayerId, pages


def begin(pager: Pager, image: Image, size: int, known: Known | None) -> tuple[Layer | None, int]:
    """Let an image, empty until now, have ``size`` bytes that are still elsewhere. Call in a transaction.

    Returns the layer that they arrive in, None if by what is ``known`` nothing has to arrive; and how many pages
    were named that are here.
    """
    count = pages(size)
    image.table.resize(count)
    layer, taken = None, 0
    if known is None:
        layer = pager.layers.create_arriving(size)
        pager.images.name_layers(image, {layer.id})
        for low in range(0, count, ENTRIES_AT_ONCE):
            pager.set_entries(image, low, min(low + ENTRIES_AT_ONCE, count), np.uint32(layer.id))
    else:
        entries = _entries_held(pager, known)
        taken = int(np.count_nonzero(entries))
        wanted = known.wanted | known.held & (entries == ZERO)
        named = {LayerId(number) for number in np.unique(entries).tolist()} - {ZERO}
        entries[known.lost] = LOST
        if wanted.any():
            layer = pager.layers.create_arriving(size, known.digests)
            named.add(layer.id)
            entries[wanted] = layer.id
            assert layer.presence is not None
            layer.presence.set(0, np.where(wanted, np.uint8(ABSENT), np.uint8(ZEROS)))
        pager.images.name_layers(image, named)
        for first, stop in _used_chunks(entries):
            pager.set_entries(image, first, stop, entries[first:stop])
    if layer is not None:
        pager.images.unsynced.add(layer.id)  # its files are new
    image.size = size
    image.touch()
    return layer, taken


def _entries_held(pager: Pager, known: Known) -> Entries:
    """Table entries for the pages that are held, zero for those that are so no more and for all others."""
    entries = np.zeros(len(known.held), np.uint32)
    local = known.local
    if local is None or not pager.images.exists(local.id):
        return entries  # deleted meanwhile
    where = np.flatnonzero(known.held)
    found = local.table.entries[where]
    for number in np.unique(found).tolist():
        layer = pager.layers.by_id.get(number)
        if layer is None:
            found[found == number] = ZERO
        elif layer.presence is not None:
            of_it = np.flatnonzero(found == number)
            found[of_it[layer.presence.states[where[of_it] + layer.shift] == ABSENT]] = ZERO
    entries[where] = found
    return entries


async def promise(pager: Pager, found: list[tuple[Layer, Known]]) -> dict[LayerId, Mask]:
    """Let arriving layers have digests, which all that came has, too; those that arrive still. Raises OSError.

    Absent pages are named where they are held, or zeros, or lost, in all images. Returns which need not come for that.
    """
    layers = pager.layers

    def settle() -> None:
        for layer, known in found:
            os.rename(known.digests, layers.path(layer.id, "xxh3"))
        sync_directory(layers.directory)  # before the catalog says that they are there

    await trio.to_thread.run_sync(settle)
    arriving = [(layer, known, _entries_held(pager, known)) for layer, known in found if layer.id in layers.arriving]
    with pager.store.catalog.transaction():
        for layer, _, entries in arriving:
            layers.promise(layer)
            named = {LayerId(number) for number in np.unique(entries).tolist()} - {ZERO}
            for number in pager.images.naming(layers.names_of(layer)):
                image = pager.images.acquire(number)
                pager.images.name_layers(image, named)
                pager.images.release(image)
    return {layer.id: _name_elsewhere(pager, layer, known, entries) for layer, known, entries in arriving}


def _name_elsewhere(pager: Pager, layer: Layer, known: Known, entries: Entries) -> Mask:
    """Let no table name a page that is absent, and zeros, lost or by ``entries`` elsewhere; which those are."""
    assert layer.presence is not None
    entries[known.lost] = LOST
    for number in pager.images.naming(pager.layers.names_of(layer)):
        image = pager.images.acquire(number)
        try:
            _swing(pager, image, layer, entries)
        finally:
            pager.images.release(image)
    absent = layer.presence.states == ABSENT
    if pager.layers.names_of(layer).keys() != {layer.id}:
        entries[entries != LOST] = ZERO  # some images name these still, shifted
    gone = absent & ((entries != ZERO) | ~(known.wanted | known.held))
    for first, stop in runs_of(gone):
        layer.presence.set(first, np.full(stop - first, ZEROS, np.uint8))
    pager.images.unsynced.add(layer.id)
    return np.asarray(gone, np.bool_)


def _swing(pager: Pager, image: Image, layer: Layer, entries: Entries) -> None:
    """Let an image name by ``entries``, where these are not zero, what it lacks of an arriving layer."""
    assert layer.presence is not None
    for name, shift in pager.layers.names_of(layer).items():
        for first, stop in image.table.regions(stop=image.pages):
            for low in range(first, stop, ENTRIES_AT_ONCE):
                before = image.table.entries[low : min(low + ENTRIES_AT_ONCE, stop)]
                at = np.arange(low, low + len(before)) + shift
                within = (at >= 0) & (at < len(entries))
                at[~within] = 0
                after = np.where(within & (before == name) & (layer.presence.states[at] == ABSENT), entries[at], ZERO)
                if shift:
                    after[after != LOST] = ZERO  # a page is at the same place in every layer
                if after.any():
                    image.synced_name = image.synced_name and not image.frozen  # it is synced in place
                    pager.set_entries(image, low, low + len(before), np.where(after == ZERO, before, after))


def lacking(pager: Pager, image: Image) -> set[LayerId]:
    """The arriving layers that have pages of an image which are not here."""
    found: set[LayerId] = set()
    for number in image.layers & pager.layers.arriving:
        layer = pager.layers[number]
        if layer.presence is None or layer.base in found:
            continue
        for first, stop in image.table.regions(stop=image.pages):
            states = layer.presence.at(first + layer.shift, stop + layer.shift)
            if ((image.table.entries[first:stop] == number) & (states == ABSENT)).any():
                found.add(layer.base)
                break
    return found


async def complete(pager: Pager, layer: Layer) -> bool:
    """If all that tables name of an arriving layer is here, it is a sealed one like any other from now on.

    First no table names any more what was found to be zeros: it has no page for that. False if something is
    absent. Raises OSError.
    """
    presence, images, catalog = layer.presence, pager.images, pager.store.catalog
    if presence is None or layer.id not in pager.layers.arriving:
        return False
    while True:
        sharings = images.sharings
        names = pager.layers.names_of(layer)
        for number in images.naming(names):
            if not await _unname_zeros(pager, number, names, presence):
                return False
        await pager.sync_layers([layer.id])
        if layer.id not in pager.layers.arriving:  # deleted meanwhile
            return False
        if images.sharings == sharings:  # else a table may have got an entry after it was looked at
            break
    with catalog.transaction():
        pager.layers.complete(layer)
    pager.layers.forget_presence(layer, presence)
    images.replaced.add(layer.id)  # what came for nothing, since it was overwritten meanwhile
    await trio.to_thread.run_sync(catalog.sync)
    pager.layers.unlink_presence(layer.id)
    return True


async def _unname_zeros(pager: Pager, number: ImageId, names: Mapping[LayerId, int], presence: Presence) -> bool:
    """Name zero what is zeros, durably too. False if the image names something that is absent."""
    try:
        image = pager.images.acquire(number)
    except StoreDamaged:  # deleted meanwhile; or fsck's to tell
        return True
    try:
        for first, stop in image.table.regions(stop=image.pages):
            for low in range(first, stop, ENTRIES_AT_ONCE):
                if not pager.images.exists(number):
                    return True
                entries = image.table.entries[low : min(low + ENTRIES_AT_ONCE, stop)]
                for name, shift in names.items():
                    states = presence.at(low + shift, low + shift + len(entries))
                    named = entries == name
                    if (named & (states == ABSENT)).any():
                        return False
                    for a, b in runs_of(named & (states == ZEROS)):
                        image.synced_name = image.synced_name and not image.frozen  # it is synced in place
                        pager.set_entries(image, low + a, low + b, np.uint32(0))
                await trio.lowlevel.checkpoint()
        await pager.sync([image])
    finally:
        pager.images.release(image)
    return True


def _used_chunks(entries: Entries) -> list[tuple[int, int]]:
    """The runs of whole chunks of a table that have something in them: the others stay holes of its file."""
    padded = np.zeros(-(-len(entries) // CHUNK) * CHUNK, np.bool_)
    padded[: len(entries)] = entries != ZERO
    used: Mask = np.asarray(padded.reshape(-1, CHUNK).any(axis=1), np.bool_)
    return [(a * CHUNK, min(b * CHUNK, len(entries))) for a, b in runs_of(used)]
