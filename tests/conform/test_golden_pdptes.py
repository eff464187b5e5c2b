"""KVM_SET_SREGS under PAE paging: PDPTEs in memory that cannot be loaded change nothing and refuse nothing."""

import json
from pathlib import Path

import pytest

from kvmmmu.conform.golden.configuration import configure
from kvmmmu.conform.golden.runner import Machine
from kvmmmu.golden import Archive, parse_script, parse_setup
from random_scripts import SHAPES, write_script


@pytest.mark.parametrize("name", ["golden/shadow", "golden-intel/ept0", "golden-intel/ept1"])
def test_a_change_of_privilege_keeps_the_pdptes_that_were_loaded(name: str) -> None:
    top = SHAPES["pae"].window + 0x10000
    raw = json.loads(write_script(1, "pae"))
    gva, size = SHAPES["pae"].sysgva + 0x1008, 4
    raw["ops"] = [["r", size, gva, 3], ["w", 8, top, 0x13067, 0], ["r", size, gva, 0], ["r", size, gva, 3]]
    setup = Archive(Path(__file__).parents[1] / "data" / f"{name}.tar.xz").setup()
    configuration = configure(parse_setup(setup, name), name)
    machine = Machine(configuration, parse_script(json.dumps(raw).encode(), "pae"), events=False)
    before = machine.vcpu.regs.pdptes
    assert [machine.run(i)[0][0][0] for i in range(4)] == ["ok"] * 4
    assert machine.vcpu.regs.pdptes == before
    assert machine.host.read(0x10000, 4) == (0x13067).to_bytes(4, "little")
