"""Scenarios S1 to S7 and S16: MMIO faults that are cached, and the slot changes that must undo it.

Each is a story with a known end under a named profile; most run on every MMU that can tell it.
"""

from __future__ import annotations

from errno import EBUSY

import pytest

import kvmmmu as km
from kvmmmu.errors import MemslotError
from machine import FLAT, MMIO, Machine
from scene import FLAVOURS, FROM_CACHE, FROM_SPTE, HANG, IO, MAPPED, OK, SLOW, TDP, Flavour, Scene, page

flavours = pytest.mark.parametrize("flavour", FLAVOURS, ids=str)


# -- S1, S2: profile 6.1


@flavours
def test_s1_the_second_read_of_a_device_is_answered_by_the_vcpus_record(flavour: Flavour) -> None:
    s = Scene(flavour)
    generation = s.vm.memslots.generation()
    first = s.step()
    assert (first.outcome, first.result.exits, first.result.mmio) == (IO, 1, ((MMIO, 1),))
    assert first.counted == SLOW
    assert first.events == [s.marked(generation), s.matched()]
    assert s.mmio_spte() == (MMIO >> 12, s.kept, generation)
    spte = s.spte()
    second = s.step()
    assert (second.outcome, second.result.exits) == (IO, 1)
    assert second.counted == FROM_CACHE
    assert second.events == [s.matched()]
    assert s.spte() == spte


@pytest.mark.parametrize("flavour", [f for f in TDP if f.mmu == "ept"], ids=str)
def test_s1_under_ept_the_second_exit_is_a_misconfiguration_not_a_violation(flavour: Flavour) -> None:
    s = Scene(flavour)
    s.vm.events.enable("kvm_exit")
    assert [line.split()[1] for line in s.step().events] == ["EPT_VIOLATION"]
    assert [line.split()[1] for line in s.step().events] == ["EPT_MISCONFIG"]


@flavours
def test_s2_another_vcpu_is_answered_by_the_mmio_spte_that_the_first_one_left(flavour: Flavour) -> None:
    s = Scene(flavour)
    generation = s.vm.memslots.generation()
    s.step()
    spte = s.spte()
    s.another_vcpu()
    other = s.step()
    assert other.outcome is IO
    assert other.counted == FROM_SPTE
    assert other.events == [s.checked(generation, generation), s.handled(), s.matched()]
    assert s.spte() == spte
    assert s.step().counted == FROM_CACHE


# -- S3, S4: profile 6.1


@flavours
def test_s3_a_slot_created_over_the_device_makes_the_stale_spte_a_mapping(flavour: Flavour) -> None:
    s = Scene(flavour)
    before = s.vm.memslots.generation()
    s.step()
    ram = page(0x11)
    s.vm.memslots.create(gpa=MMIO, memory=ram)
    assert s.vm.memslots.generation() == before + 2
    read = s.step()
    assert (read.outcome, read.result.path, read.result.gpa) == (OK, km.Path.FAULT, MMIO)
    assert read.counted == MAPPED
    assert read.events[0] == s.checked(before + 2, before)
    assert [line.partition(":")[0] for line in read.events[1:]] == ["kvm_mmu_set_spte"]
    assert s.mmio_spte() is None
    assert s.vcpu.read(s.gva, 4) == b"\x11\x11\x11\x11"
    assert s.step().result.exits == 0


@flavours
def test_s4_after_an_unrelated_change_the_spte_is_written_anew_with_the_generation_of_now(flavour: Flavour) -> None:
    s = Scene(flavour)
    before = s.vm.memslots.generation()
    s.step()
    s.vm.memslots.create(gpa=MMIO + (1 << 24), memory=page())
    read = s.step()
    assert read.outcome is IO
    assert read.counted == SLOW
    assert read.events == [s.checked(before + 2, before), s.marked(before + 2), s.matched()]
    assert s.mmio_spte() == (MMIO >> 12, s.kept, before + 2)
    assert s.step().counted == FROM_CACHE


# -- S5, S6: profile 3.1 against 6.1


@flavours
def test_s5_by_the_rules_of_3_1_a_slot_made_anew_at_its_base_leaves_the_stale_mmio_spte(flavour: Flavour) -> None:
    s = Scene(Flavour(flavour.mmu, flavour.mode, False), behaviour="3.1")
    slot = s.vm.memslots.create(gpa=MMIO, memory=page(), slot=5)
    s.vm.memslots.delete(slot)
    assert s.step().outcome is IO
    stale, zapped = s.spte(), s.vm.stats["mmu_shadow_zapped"]
    assert stale
    s.vm.memslots.create(gpa=MMIO, memory=page(0x33), slot=5)
    assert s.vm.stats["mmu_shadow_zapped"] == zapped
    assert s.spte() == stale
    # The device is still there, for this vCPU by its record, for another by the spte.
    assert s.vcpu.access(s.gva).outcome is IO
    s.vcpu = s.vm.create_vcpu(s.vcpu.cpu)
    s.start()
    assert s.vcpu.access(s.gva).outcome is IO


@flavours
def test_s5_by_the_rules_of_6_1_the_same_slot_is_memory_at_once(flavour: Flavour) -> None:
    s = Scene(flavour)
    slot = s.vm.memslots.create(gpa=MMIO, memory=page(), slot=5)
    s.vm.memslots.delete(slot)
    assert s.step().outcome is IO
    s.vm.memslots.create(gpa=MMIO, memory=page(0x33), slot=5)
    assert s.step().outcome is OK
    assert s.vcpu.read(s.gva, 1) == b"\x33"


def test_s5_by_the_rules_of_3_1_a_slot_at_another_base_zaps_every_page() -> None:
    s = Scene(FLAVOURS[0], behaviour="3.1")
    s.step()
    zapped = s.vm.stats["mmu_shadow_zapped"]
    s.vm.memslots.create(gpa=MMIO, memory=page(0x33), slot=5)
    assert s.vm.stats["mmu_shadow_zapped"] - zapped >= 4  # the four levels of the scene's tables at least
    assert s.step().outcome is OK


@pytest.mark.parametrize("mmu", ["shadow", "ept", "npt"])
def test_s6_by_the_rules_of_3_1_a_new_slot_at_gfn_0_zaps_nothing(mmu: str) -> None:
    m = Machine(mmu, FLAT, behaviour="3.1")
    m.vm.memslots.delete(m.slot)
    # 0 marks an empty record: for the gpa half gfn 0 never matches, so each access asks the spte again.
    assert [m.vcpu.access(0).outcome for _ in range(2)] == [IO, IO]
    assert (m.vm.stats["mmio_slow"], m.vm.stats["mmio_cache_hit"]) == (1, 0)
    zapped = m.vm.stats["mmu_shadow_zapped"]
    m.vm.memslots.create(gpa=0, memory=page(0x44), slot=9)  # an id never used counts as having stood at 0
    assert m.vm.stats["mmu_shadow_zapped"] == zapped
    # The spte still sends the access to the emulator, which looks at memory because no record names gfn 0.
    for _ in range(2):
        result = m.vcpu.access(0)
        assert (result.outcome, result.path, result.gpa) == (OK, km.Path.EMULATED, 0)
    assert m.vm.stats["mmio_slow"] == 1


@pytest.mark.parametrize("mmu", ["shadow", "ept", "npt"])
def test_s6_by_the_rules_of_6_1_the_slot_at_gfn_0_is_mapped(mmu: str) -> None:
    m = Machine(mmu, FLAT)
    m.vm.memslots.delete(m.slot)
    assert m.access(0).outcome is IO
    m.vm.memslots.create(gpa=0, memory=page(0x44), slot=9)
    result = m.access(0)
    assert (result.outcome, result.path) == (OK, km.Path.FAULT)
    assert m.access(0).exits == 0


# -- S7: profile 6.1


@flavours
def test_s7_two_to_the_18_swaps_of_the_slots_zap_everything_exactly_once(flavour: Flavour) -> None:
    s = Scene(flavour)
    far = 1 << 34
    slot = s.vm.memslots.create(gpa=far, memory=page())
    start, valid, zaps = s.vm.memslots.generation(), s.vm._core.mmu_valid_gen, []
    s.step()
    stale = s.mmio_spte()
    assert stale is not None and stale.gen == start
    for swap in range(1, (1 << 18) + 1):
        s.vm._core.set_region(slot.id, swap & 1, far, None, None, 0, 0)  # the log of a page of no interest: on, off
        if s.vm._core.mmu_valid_gen != valid:
            valid = s.vm._core.mmu_valid_gen
            zaps.append(s.vm.memslots.generation())
    # The field has 19 bits; address space 0 counts in steps of two, so it wraps once in 2^18 swaps.
    assert zaps == [1 << 19]
    assert s.vm.memslots.generation() == start + (1 << 19)
    # The number in the old spte would be right again: it had to go.
    assert s.spte() == 0
    read = s.step()
    assert (read.outcome, read.counted["mmio_slow"], read.counted.get("mmio_spte_hit", 0)) == (IO, 1, 0)
    assert s.mmio_spte() == stale
    lines = [line for line in read.events if line.startswith("check_mmio_spte")]
    assert not lines


@pytest.mark.parametrize("flavour", [FLAVOURS[0], TDP[0]], ids=str)
def test_s7_the_generation_of_smm_is_odd_and_wraps_by_itself(flavour: Flavour) -> None:
    s = Scene(flavour)
    memory, far = page(), 1 << 34
    slot = s.vm.memslots.create(gpa=far, memory=memory, as_id=1)
    first = s.vm.memslots.generation(1)
    assert first % 2 == 1
    valid, zaps = s.vm._core.mmu_valid_gen, []
    for swap in range(1, (1 << 18) + 1):
        s.vm._core.set_region(1 << 16 | slot.id, swap & 1, far, None, None, 0, 0)
        if s.vm._core.mmu_valid_gen != valid:
            valid = s.vm._core.mmu_valid_gen
            zaps.append(s.vm.memslots.generation(1))
    assert zaps == [(1 << 19) + 1]
    s.vm.check()


# -- S16: profile 6.1; the window is held open


@flavours
def test_s16_while_the_slot_is_being_deleted_faults_repeat_and_then_it_is_a_device(flavour: Flavour) -> None:
    s = Scene(flavour)
    slot = s.vm.memslots.create(gpa=MMIO, memory=page(0x55))
    assert s.step().outcome is OK
    before = s.vm.memslots.generation()
    with s.vm.memslots.deleting(slot):
        assert s.vm.memslots.generation() == before + 2  # published as INVALID
        assert s.spte() == 0
        # Other memory is there as ever.
        assert s.access(s.mode.user + 16 * 4096 if s.mode.levels else 0x2000).outcome is OK
        stuck = s.step()
        assert stuck.outcome is HANG
        assert stuck.counted == {"pf_taken": stuck.result.exits}  # neither fixed, nor emulated, nor remembered
        assert stuck.of("mark_mmio_spte", "vcpu_match_mmio", "kvm_mmu_set_spte") == []
        assert s.spte() == 0
    assert s.vm.memslots.generation() == before + 4
    read = s.step()
    assert (read.outcome, read.counted) == (IO, SLOW)
    assert read.events == [s.marked(before + 4), s.matched()]
    assert s.mmio_spte() == (MMIO >> 12, s.kept, before + 4)
    assert s.step().counted == FROM_CACHE


@flavours
def test_s16_what_is_cached_of_another_device_in_that_window_is_stale_after_it(flavour: Flavour) -> None:
    s = Scene(flavour)
    slot = s.vm.memslots.create(gpa=MMIO + (1 << 24), memory=page())
    with s.vm.memslots.deleting(slot):
        assert s.step().outcome is IO
        during = s.mmio_spte()
        assert during is not None and s.step().counted == FROM_CACHE
    assert s.step().counted == SLOW
    after = s.mmio_spte()
    assert after is not None and after.gen == during.gen + 2


def test_s16_the_slots_do_not_change_while_a_deletion_is_held_open() -> None:
    s = Scene(FLAVOURS[0])
    slot = s.vm.memslots.create(gpa=MMIO, memory=page())
    with s.vm.memslots.deleting(slot):
        with pytest.raises(MemslotError, match="is being deleted") as refused:
            s.vm.memslots.create(gpa=0x2000_0000, memory=page())
        assert refused.value.errno == EBUSY
        assert s.vm.memslots.at(MMIO) is not None  # its id is taken until the end
    assert s.vm.memslots.at(MMIO) is None
    s.vm.memslots.create(gpa=MMIO, memory=page(0x66))
    assert s.step().outcome is OK
    with s.vm.memslots.deleting(s.slot):
        s.vm.close()  # a VM that closes half-way forgets the slot all the same
