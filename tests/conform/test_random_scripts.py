"""Random scripts through every configuration: nothing breaks, and what may not matter does not."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvmmmu.conform.golden.configuration import Configuration, configure
from kvmmmu.conform.golden.guest import Outcomes
from kvmmmu.conform.golden.runner import Machine
from kvmmmu.golden import Archive, Script, parse_script, parse_setup
from random_scripts import MODES, write_script

DATA = Path(__file__).parents[1] / "data"
RUNS = {
    f"{path.parent.name}/{path.name.removesuffix('.tar.xz')}": path
    for folder in ("golden", "golden-intel")
    for path in sorted((DATA / folder).glob("*.tar.xz"))
    if path.name != "scripts.tar.xz"
}
SEEDS = [(2, False), (14, True)]
# What a run may end an operation with.  Jumps into data may meet an instruction that the runner refuses by name.
WORDS = {"ok", "exc", "rc", "mmio-r", "mmio-w", "internal", "exit", "skipped", "hang", "unsupported"}


def configuration(name: str) -> Configuration:
    return configure(parse_setup(Archive(RUNS[name]).setup(), name), name)


def script(seed: int, mode: str, wide: bool) -> Script:
    return parse_script(write_script(seed, mode, wide=wide), f"seed {seed}")


def outcomes(machine: Machine, every: int = 0) -> list[Outcomes]:
    """Run all operations, checking all invariants after every so many."""
    found = []
    for index in range(len(machine.script.ops)):
        found.append(machine.run(index)[0])
        if every and index % every == 0:
            machine.vm.check()
    return found


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("mode", MODES)
def test_every_invariant_holds_all_along_and_every_operation_ends_somewhere(name: str, mode: str) -> None:
    for seed, wide in SEEDS:
        machine = Machine(configuration(name), script(seed, mode, wide), events=wide)
        words = {word for out in outcomes(machine, every=9) for word, _ in out}
        machine.vm.check()
        machine.close()
        assert words <= WORDS


@pytest.mark.parametrize(
    ("left", "right"), [("golden/tdp0", "golden/tdp1"), ("golden-intel/ept1-tdp0", "golden-intel/ept1")]
)
@pytest.mark.parametrize("mode", MODES)
def test_a_guest_cannot_tell_the_two_direct_mmus_apart(left: str, right: str, mode: str) -> None:
    for seed, wide in SEEDS:
        wanted = script(seed, mode, wide)
        machines = [Machine(configuration(name), wanted, events=False) for name in (left, right)]
        # Dirty logs differ: the TDP MMU maps writable what was only read.
        seen = [[[o for o in out if "pages" not in o[1]] for out in outcomes(m)] for m in machines]
        assert seen[0] == seen[1]
        for number, memory in machines[0].host.backs.items():
            assert np.array_equal(memory, machines[1].host.backs[number])


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("golden/")])
@pytest.mark.parametrize("mode", MODES)
def test_an_encrypting_host_adds_its_c_bit_to_mappings_and_changes_nothing_else(name: str, mode: str) -> None:
    plain = configuration(name)
    host = replace(plain.host, maxphyaddr=48, phys_bits=43, c_bit=(bit := 47 if mode == "long" else 36))
    for seed, wide in SEEDS:
        wanted = script(seed, mode, wide)
        machines = [Machine(replace(plain, host=replace(host, sme=sme)), wanted, events=False) for sme in (False, True)]
        for index in range(len(wanted.ops)):
            left, right = (machine.run(index)[0] for machine in machines)
            assert left == right
            if index % 25:
                continue
            tables = [machine.vm.page_tables(machine.vcpu, all=True) for machine in machines]
            used = tables[0].sptes >> np.uint64(11) & np.uint64(1) == 1
            used |= (tables[0].records["special"] != 0)[:, None] & (tables[0].sptes != 0)
            marked = np.where(used, tables[0].sptes | np.uint64(1 << bit), tables[0].sptes)
            assert np.array_equal(tables[1].sptes, marked)
            machines[1].vm.check()
        assert dict(machines[0].vm.stats) == dict(machines[1].vm.stats)
        for number, memory in machines[0].host.backs.items():
            assert np.array_equal(memory, machines[1].host.backs[number])


def test_a_number_names_a_script_for_ever() -> None:
    assert write_script(3, "pae") == write_script(3, "pae")
    assert write_script(3, "pae") != write_script(4, "pae")
