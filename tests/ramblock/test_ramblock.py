"""RAM blocks' names: QEMU's own ones, hostile ones, and round trips of any."""

import errno

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ramfs.errors import BadName, NameTooLong
from ramfs.ramblock import (
    Block,
    BlockName,
    GuestAddress,
    QemuName,
    block_file_name,
    file_name_of,
    find_block_file,
    parse_file_name,
    qemu_name,
    temporary_name,
)


def block(name: bytes, gpa: int = 0) -> Block:
    return Block(name=BlockName(name), gpa=GuestAddress(gpa))


# Names that QEMU 7.2 gives, and what stands for them in a file name and in QEMU's temporary one.
QEMU_NAMES = [
    (b"pc.ram", b"pc.ram", b"pc.ram"),
    (b"0000:00:02.0/vga.vram", b"0000:00:02.0%2Fvga.vram", b"0000:00:02.0_vga.vram"),
    (b"/rom@etc/acpi/tables", b"%2From@etc%2Facpi%2Ftables", b"_rom@etc_acpi_tables"),
    (b"mem0", b"mem0", b"mem0"),
    (b"/objects/mem0", b"%2Fobjects%2Fmem0", b"_objects_mem0"),
    (b"ram.100%", b"ram.100%25", b"ram.100%"),
]


@pytest.mark.parametrize(("name", "encoded", "temporary"), QEMU_NAMES)
@pytest.mark.parametrize(
    ("gpa", "address"),
    [
        (0, b"0x0"),
        (0x100000, b"0x100000"),
        (0xFD000000, b"0xfd000000"),
        ((1 << 64) - 1, b"0xffffffffffffffff"),
    ],
)
def test_block_names_of_qemu(name: bytes, encoded: bytes, temporary: bytes, gpa: int, address: bytes) -> None:
    file_name = encoded + b"@" + address
    assert file_name_of(block(name, gpa)) == file_name
    assert parse_file_name(file_name) == block(name, gpa)
    assert temporary_name(b"qemu_back_mem." + temporary + b".k3Jd0Q") == temporary
    assert qemu_name(BlockName(name)) == temporary
    assert find_block_file([b"state", file_name], QemuName(temporary)) == file_name


def test_a_new_block_file_begins_at_address_0() -> None:
    assert block_file_name(b"pc.ram") == b"pc.ram@0x0"
    assert block_file_name(b"a%b") == b"a%25b@0x0"


@pytest.mark.parametrize(
    "name",
    [
        b"@",
        b"@0x0",
        b"a@0x0",
        b".",
        b"..",
        b"\n",
        b"a\nb",
        b" ",
        b"\xff\xfe",
        b"\xc3",
        b"%",
        b"%2F",
        b"%25",
        b"%%2F/",
        b"-",
    ],
)
def test_hostile_block_names_that_have_a_file(name: bytes) -> None:
    file_name = block_file_name(name)
    assert b"/" not in file_name
    assert parse_file_name(file_name) == block(name)


@pytest.mark.parametrize("name", [b"", b"\0", b"a\0b"])
def test_block_names_that_cannot_have_a_file(name: bytes) -> None:
    with pytest.raises(BadName) as caught:
        block_file_name(name)
    assert caught.value.errno == errno.EINVAL
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("gpa", [-1, 1 << 64])
def test_addresses_that_do_not_exist(gpa: int) -> None:
    with pytest.raises(BadName, match="below 2\\^64"):
        file_name_of(block(b"pc.ram", gpa))


@pytest.mark.parametrize(("name", "fits"), [(b"x" * 251, True), (b"x" * 252, False), (b"x" * 255, False)])
def test_the_file_name_ends_at_255_bytes(name: bytes, fits: bool) -> None:
    if fits:
        assert parse_file_name(block_file_name(name)) == block(name)
    else:
        with pytest.raises(NameTooLong, match="Linux allows 255"):
            block_file_name(name)


def test_a_name_that_encoding_makes_too_long() -> None:
    assert len(block_file_name(b"/" * 83)) == 253
    with pytest.raises(NameTooLong) as caught:
        block_file_name(b"/" * 84)
    assert caught.value.errno == errno.ENAMETOOLONG
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    "file_name",
    [
        b"",
        b".",
        b"..",
        b"@",
        b"@0x0",
        b"pc.ram",
        b"pc.ram@",
        b"pc.ram@0",
        b"pc.ram@0x",
        b"pc.ram@x0",
        b"pc.ram@0X0",
        b"pc.ram@0xA",
        b"pc.ram@0x00",
        b"pc.ram@0x01",
        b"pc.ram@0x-1",
        b"pc.ram@0x1_0",
        b"pc.ram@0x0\n",
        b"pc.ram@0x0 ",
        b"pc.ram@0x10000000000000000",
        b"pc.ram@0x0@",
        b"a%@0x0",
        b"a%2@0x0",
        b"a%2f@0x0",
        b"a%zz@0x0",
        b"a%41@0x0",
        b"%%25@0x0",
        b"a/b@0x0",
        b"a\0b@0x0",
        b"a%00@0x0",
        b"\xff@0x\xff",
    ],
)
def test_file_names_that_are_not_of_a_block(file_name: bytes) -> None:
    with pytest.raises(BadName) as caught:
        parse_file_name(file_name)
    assert caught.value.errno == errno.EINVAL
    assert str(caught.value).isprintable()


def test_a_file_name_of_more_than_255_bytes() -> None:
    with pytest.raises(NameTooLong):
        parse_file_name(b"x" * 252 + b"@0x0")


@pytest.mark.parametrize(
    ("file_name", "name"),
    [
        (b"qemu_back_mem.pc.ram.AbC123", b"pc.ram"),
        (b"qemu_back_mem.pc.ram.abcdef.AbC123", b"pc.ram.abcdef"),
        (b"qemu_back_mem.a.AbC123", b"a"),
        (b"qemu_back_mem...AbC123", b"."),
        (b"qemu_back_mem.....AbC123", b"..."),
        (b"qemu_back_mem.a\nb.AbC123", b"a\nb"),
        (b"qemu_back_mem.\xff.AbC123", b"\xff"),
        (b"qemu_back_mem.@.AbC123", b"@"),
        (b"qemu_back_mem." + b"x" * 234 + b".AbC123", b"x" * 234),
        # Not what QEMU's mkstemp makes:
        (b"", None),
        (b"qemu_back_mem", None),
        (b"qemu_back_mem..AbC123", None),
        (b"qemu_back_mem.AbC123", None),
        (b"qemu_back_mem.pc.ram.AbC12", None),
        (b"qemu_back_mem.pc.ram.AbC1234", None),
        (b"qemu_back_mem.pc.ram.AbC12_", None),
        (b"qemu_back_mem.pc.ram.AbC12\n", None),
        (b"qemu_back_mem.pc.ram.AbC123\n", None),
        (b"qemu_back_mem.pc.ram.AbC12\xe9", None),
        (b"qemu_back_mem.pc.ramXAbC123", None),
        (b"Qemu_back_mem.pc.ram.AbC123", None),
        (b"xqemu_back_mem.pc.ram.AbC123", None),
        (b"qemu_back_mem.a/b.AbC123", None),
        (b"qemu_back_mem.a\0b.AbC123", None),
        (b"qemu_back_mem." + b"x" * 235 + b".AbC123", None),
    ],
)
def test_temporary_names(file_name: bytes, name: bytes | None) -> None:
    assert temporary_name(file_name) == name


def test_a_temporary_name_whose_block_file_has_too_long_a_name() -> None:
    name = temporary_name(b"qemu_back_mem." + b"%" * 100 + b".AbC123")
    assert name is not None
    with pytest.raises(NameTooLong):
        block_file_name(name)


def test_the_block_file_of_a_name_among_others() -> None:
    names = [b"state", b"pc.ram", b"pc.ram@0xZ", b"pc.rom@0x0", b"qemu_back_mem.pc.ram.AbC123"]
    assert find_block_file(names, QemuName(b"pc.ram")) is None
    assert find_block_file([], QemuName(b"pc.ram")) is None
    assert find_block_file([*names, b"pc.ram@0x100000"], QemuName(b"pc.ram")) == b"pc.ram@0x100000"


@given(st.permutations([b"a%2Fb@0x0", b"a_b@0x1000", b"a_b@0x2000", b"a_b@0x10000"]))
def test_of_several_block_files_the_choice_is_always_the_same(names: list[bytes]) -> None:
    assert find_block_file(names, QemuName(b"a_b")) == b"a_b@0x1000"
    names.remove(b"a_b@0x1000")
    assert find_block_file(names, QemuName(b"a_b")) == b"a_b@0x2000"
    assert find_block_file([b"a%2Fb@0x0"], QemuName(b"a_b")) == b"a%2Fb@0x0"


# Bytes that matter to the forms come up far more often than chance has it.
NASTY = st.lists(
    st.one_of(
        st.sampled_from([b"/", b"%", b"%2F", b"%25", b"@", b"@0x0", b".", b"_", b"\n", b"0x", b"qemu_back_mem."]),
        st.binary(min_size=1, max_size=4),
    ),
    max_size=12,
).map(b"".join)
GPA = st.integers(0, (1 << 64) - 1)


@given(NASTY.filter(lambda name: name and b"\0" not in name), GPA)
@example(b"%2F", 0)
@example(b"%252F", 0)
def test_a_block_comes_back_from_its_file_name(name: bytes, gpa: int) -> None:
    try:
        file_name = file_name_of(block(name, gpa))
    except NameTooLong:
        assert len(name) * 3 + 19 > 255
        return
    assert 0 < len(file_name) <= 255
    assert b"/" not in file_name
    assert parse_file_name(file_name) == block(name, gpa)
    assert temporary_name(file_name) is None
    assert find_block_file([file_name], qemu_name(BlockName(name))) == file_name


@given(st.one_of(NASTY, st.tuples(NASTY, GPA).map(lambda pair: pair[0] + b"@%#x" % pair[1])))
def test_a_file_name_is_of_one_block_or_refused(file_name: bytes) -> None:
    try:
        parsed = parse_file_name(file_name)
    except BadName:
        return
    assert file_name_of(parsed) == file_name


@given(
    NASTY.filter(lambda name: name and b"/" not in name and b"\0" not in name and len(name) <= 234),
    st.text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", min_size=6, max_size=6),
)
def test_a_temporary_name_tells_its_block(name: bytes, random: str) -> None:
    assert temporary_name(b"qemu_back_mem." + name + b"." + random.encode()) == name
