"""Single calls from Python, net of the loop round them, beside the cheapest call there is."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import kvmmmu as km

_spec = importlib.util.spec_from_file_location("refs", Path(__file__).with_name("refs.py"))
assert _spec is not None and _spec.loader is not None
refs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(refs)

ROOT, RAM = 0x1000, 8 << 20
GVA, GPA = 0x5123, 0x405123
# In a loop of its own a method is bound once.
CALLS = {
    "walk": "walk(gva)",
    "walk, bound anew": "paging.walk(gva)",
    "walk_for": "walk_for(gva, 'w', cpl=3)",
    "translate_one": "translate_one(gva)",
    "translate_one, bound anew": "paging.translate_one(gva)",
    "access": "access(gva, 'w', cpl=0)",
    "access, bound anew": "vcpu.access(gva, 'w', cpl=0)",
    "access, defaults": "access(gva)",
    "access, TLB": "access_tlb(gva, 'w', cpl=0)",
    "access, EPT": "access_ept(gva, 'w', cpl=0)",
    "access, NPT": "access_npt(gva, 'w', cpl=0)",
}


@pytest.fixture(scope="module")
def names() -> dict[str, object]:
    """One page of a guest, in plain memory and in a VM where every fault has been taken."""
    memory = refs.aligned(RAM)
    refs.map_pages(memory.view(np.uint64), ROOT, 0x2000, [(page, 0x400000 + page) for page in range(0, 64 << 12, 4096)])
    paging = km.Paging(**refs.LONG_MODE, cr3=ROOT, cpu=km.GuestCpu(maxphyaddr=46), memory=memory)
    vms = [km.VM(mmu) for mmu in ("shadow", "ept", "npt")]
    for vm in vms:
        vm.memslots.create(gpa=0, memory=memory)
    vcpu, ept, npt = (vm.create_vcpu() for vm in vms)
    cached = vms[0].create_vcpu(tlb=km.Tlb())
    assert paging.walk(GVA) == paging.translate_one(GVA).gpa == GPA
    for each in (vcpu, cached, ept, npt):
        each.set_sregs(**refs.LONG_MODE, cr3=ROOT)
        each.access(GVA, "w", cpl=0)
        again = each.access(GVA, "w", cpl=0)
        assert (again.ok, again.exits, again.gpa) == (True, 0, GPA)
    bound = {
        "walk": paging.walk,
        "walk_for": paging.walk_for,
        "translate_one": paging.translate_one,
        "access": vcpu.access,
        "access_tlb": cached.access,
        "access_ept": ept.access,
        "access_npt": npt.access,
    }
    return {"paging": paging, "vcpu": vcpu, "gva": GVA, "text": "walk", **bound}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.benchmark(group="one call from Python, net of the loop")
def bench_single(against: Callable[..., None], names: dict[str, object], call: str) -> None:
    against(CALLS[call], items=1, net=True, names=names, len="len(text)")
