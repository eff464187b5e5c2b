"""The tracepoints of a script, as text, by operation."""

from __future__ import annotations

from typing import Final, NamedTuple

from kvmmmu.errors import FormatError

__all__ = ["EVENTS", "OpEvents", "parse_events"]

#: Every event that a recording may hold; ``role_*`` repeat four of them with the raw role word.
EVENTS: Final = frozenset(
    "kvm_mmu_pagetable_walk kvm_mmu_paging_element kvm_mmu_set_accessed_bit kvm_mmu_set_dirty_bit kvm_mmu_walker_error "
    "kvm_mmu_get_page kvm_mmu_sync_page kvm_mmu_unsync_page kvm_mmu_prepare_zap_page mark_mmio_spte "
    "handle_mmio_page_fault check_mmio_spte fast_page_fault kvm_mmu_zap_all_fast kvm_mmu_set_spte "
    "kvm_mmu_spte_requested kvm_tdp_mmu_spte_changed kvm_mmu_split_huge_page kvm_page_fault vcpu_match_mmio kvm_mmio "
    "kvm_fast_mmio kvm_inj_exception kvm_emulate_insn kvm_unmap_hva_range kvm_set_spte_hva kvm_age_hva "
    "kvm_test_age_hva kvm_age_page kvm_exit kvm_cr kvm_msr role_get_page role_sync_page role_unsync_page "
    "role_prepare_zap_page".split()
)

LIVELOCK: Final = "## livelock, cut here"


class OpEvents(NamedTuple):
    """The lines of one operation (``op`` is its text), in order; each ``event: fields``.

    ``livelock``: it went round for ever, and only a beginning was kept.
    """

    op: str
    lines: tuple[str, ...]
    livelock: bool


def parse_events(raw: bytes, where: str) -> list[OpEvents]:
    """Split a recording at its ``## op N ...`` lines.

    Raises
    ------
    FormatError
        A line is no known event, or the operations are not numbered in order.
    """
    try:
        lines = raw.decode("ascii").splitlines()
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: not ASCII text ({error})") from None
    operations: list[OpEvents] = []
    current: list[str] = []
    name: str | None = None
    livelock = False
    for number, line in enumerate(lines, 1):
        if line.startswith("## op "):
            index, _, op = line[len("## op ") :].partition(" ")
            if name is not None:
                operations.append(OpEvents(name, tuple(current), livelock))
            if index != str(len(operations)):
                raise FormatError(f"{where}: line {number}: {line!r}: expected operation {len(operations)}")
            name, current, livelock = op, [], False
        elif line == LIVELOCK:
            livelock = True
        elif line.partition(":")[0] in EVENTS:
            current.append(line)
        else:
            raise FormatError(f"{where}: line {number}: {line!r} is no known event")
    if name is None:
        raise FormatError(f"{where}: no operation in it")
    operations.append(OpEvents(name, tuple(current), livelock))
    return operations
