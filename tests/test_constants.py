"""The constants Python sees are those of bits.h, all of them."""

import re
from pathlib import Path

import pytest

from kvmmmu import constants

MASK = (1 << 64) - 1


def header_constants(root: Path) -> dict[str, int]:
    """Every object-like macro of bits.h, evaluated by rules of its own."""
    text = (root / "kvmmmu/include/kvmmmu/bits.h").read_text()
    text = re.sub(r"/\*[\s\S]*?\*/", "", text).replace("\\\n", " ")
    known = {
        "UINT64_C": lambda x: x,
        "UINT32_C": lambda x: x,
        "KVMMMU_BIT": lambda n: 1 << n,
        "KVMMMU_BITS": lambda high, low: sum(1 << n for n in range(low, high + 1)),
    }
    values: dict[str, int] = {}
    for name, expression in re.findall(r"^#define (KVMMMU_\w+)[ \t]+(\S.*)$", text, re.M):
        values[name] = eval(expression, {"__builtins__": {}}, {**known, **values}) & MASK
    return {name.removeprefix("KVMMMU_"): value for name, value in values.items()}


def test_every_constant_of_the_header_reaches_python_with_its_value(root: Path) -> None:
    header = header_constants(root)
    assert len(header) > 100
    assert {name: constants.TABLE.get(name) for name in header} == header


def test_python_has_no_constant_of_its_own(root: Path) -> None:
    small = {"ACC_X": 1, "ACC_W": 2, "ACC_U": 4, "ACC_ALL": 7}
    rest = {name: value for name, value in constants.TABLE.items() if name not in header_constants(root)}
    assert rest == small


def test_a_constant_is_an_attribute() -> None:
    assert constants.PFERR_RSVD == 8
    assert "PFERR_RSVD" in dir(constants)
    assert "PFERR_RSVD" in constants.names()
    with pytest.raises(AttributeError, match="PFERR_NONE"):
        _ = constants.PFERR_NONE


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        constants.TABLE["PFERR_RSVD"] = 1  # type: ignore[index]
