"""What a walk does to memory, in which order it looks, and where it ends."""

import threading

import numpy as np
import pytest

from kvmmmu.cpu import GuestCpu
from kvmmmu.errors import ArgumentError
from kvmmmu.paging import EptTables, NptTables, Paging
from kvmmmu.walks import Fault

P, W, U, A, D, PS, NX = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63
PG_PE, WP = 0x8000_0001, 1 << 16
PSE, PAE, LA57, SMEP = 1 << 4, 1 << 5, 1 << 12, 1 << 20
LONG, NXE = 0x500, 0x800


def pages(n):
    return np.zeros((n, 512), np.uint64)


def four_levels(leaf, *, upper=P | W | U):
    """Tables in pages 1 to 4 that map gva 0 by one entry."""
    memory = pages(8)
    for table in (1, 2, 3):
        memory[table, 0] = (table + 1) << 12 | upper
    memory[4, 0] = leaf
    return memory


def long_mode(memory, **kwargs):
    return Paging(PG_PE | WP, 0x1000, PAE, LONG | NXE, memory=memory, **kwargs)


def test_a_read_sets_accessed_at_every_level_and_dirty_nowhere():
    memory = four_levels(0x5000 | P | W | U)
    assert long_mode(memory).walk_for(0x123, "r", set_ad=True) == 0x5123
    assert [int(memory[t, 0]) & (A | D) for t in (1, 2, 3, 4)] == [A, A, A, A]


def test_a_write_sets_dirty_in_the_leaf_alone():
    memory = four_levels(0x5000 | P | W | U)
    long_mode(memory).walk_for(0, "w", set_ad=True)
    assert [int(memory[t, 0]) & (A | D) for t in (1, 2, 3, 4)] == [A, A, A, A | D]


def test_a_supervisor_write_that_wp_0_permits_sets_dirty_in_a_read_only_leaf():
    memory = four_levels(0x5000 | P)
    paging = Paging(PG_PE, 0x1000, PAE, LONG | NXE, memory=memory)
    assert paging.walk_for(0, "w", set_ad=True) == 0x5000
    assert int(memory[4, 0]) == 0x5000 | P | A | D


def test_a_refused_access_changes_nothing():
    memory = four_levels(0x5000 | P | U)
    before = memory.copy()
    assert long_mode(memory).walk_for(0, "w", cpl=3, set_ad=True) == -1
    assert (memory == before).all()


def test_without_set_ad_memory_is_never_written():
    memory = four_levels(0x5000 | P | W | U)
    before = memory.copy()
    assert long_mode(memory).walk_for(0, "w") == 0x5000
    assert (memory == before).all()


def test_read_only_memory_keeps_its_bits_and_the_access_goes_on():
    memory = four_levels(0x5000 | P | W | U)
    frozen = bytes(memory.tobytes())
    assert long_mode(frozen).walk_for(0, "w", set_ad=True) == 0x5000
    assert frozen == memory.tobytes()


def test_one_entry_used_at_every_level_ends_with_both_accessed_and_dirty():
    # The update at the top changes what the leaf's update compares with, so the walk must be done again.
    memory = pages(2)
    memory[1, 0] = 0x1000 | P | W | U
    assert long_mode(memory).walk_for(8, "w", set_ad=True) == 0x1008
    assert int(memory[1, 0]) == 0x1000 | P | W | U | A | D


def test_accessed_bits_set_by_many_threads_at_once_are_all_there():
    memory = four_levels(0)
    memory[4, :] = np.arange(512, dtype=np.uint64) << np.uint64(12) | np.uint64(P | W | U)
    paging = long_mode(memory)
    gvas = np.arange(512, dtype=np.uint64) << np.uint64(12)

    def run(seed):
        rng = np.random.default_rng(seed)
        for access in ("r", "w") * 20:
            paging.translate(rng.permutation(gvas), access, set_ad=True)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (memory[4] & np.uint64(A | D) == A | D).all()
    assert (memory[4] >> np.uint64(12) == np.arange(512)).all()


def test_an_entry_that_points_outside_memory_reads_as_not_present():
    memory = four_levels(0x5000 | P)
    memory[2, 0] = 0xF_FFFF_FFFF_F000 | P | W | U
    result = long_mode(memory, cpu=GuestCpu(maxphyaddr=52)).walk_result(0)
    assert (result.fault, result.error_code) == (Fault.PF, 0)
    assert result.entries[-1].gpa == 0xF_FFFF_FFFF_F000


def test_a_not_present_entry_is_not_asked_about_reserved_bits():
    memory = four_levels((1 << 51) | W)
    assert long_mode(memory).walk_result(0).error_code == 0


def test_reserved_bits_are_reported_before_permissions_of_a_level_above():
    memory = four_levels(1 << 51 | P | W | U)
    memory[2, 0] = 0x3000 | P  # supervisor only
    result = long_mode(memory).walk_result(0, "w", cpl=3)
    assert result.error_code == 0b1111  # P, W, U, RSVD


@pytest.mark.parametrize(("cr4", "top"), [(PAE, 47), (PAE | LA57, 56)])
def test_a_non_canonical_address_is_a_gp_before_any_table_is_read(cr4, top):
    paging = Paging(PG_PE, 0, cr4, LONG)
    lowest_bad, highest_bad = 1 << top, (1 << 64) - (1 << top) - 1
    for gva in (lowest_bad, highest_bad):
        result = paging.walk_result(gva)
        assert result.fault is Fault.GP and not result.entries
    for gva in (lowest_bad - 1, highest_bad + 1):
        assert paging.walk_result(gva).fault is Fault.PF


def test_compatibility_mode_and_32_bit_modes_cut_addresses_to_32_bits():
    memory = four_levels(0x5000 | P)
    high = 0xDEAD_BEEF_0000_0123
    assert long_mode(memory, compat=True).walk(high) == 0x5123
    assert Paging(1, 0, 0, 0).walk(high) == 0x123


def test_without_paging_every_access_is_allowed_and_nothing_is_mapped_by_tables():
    paging = Paging(1, 0, 0, 0)
    assert paging.walk_for(0x1234, "w", cpl=3) == 0x1234
    assert len(paging.mappings()) == 0


def test_a_4_mib_page_takes_address_bits_39_to_32_from_bits_20_to_13():
    memory = pages(2)
    entry = 0xC0_0000 | 0x5A << 13 | P | PS
    memory[1, 0] = entry << 32  # second PDE
    args = (PG_PE, 0x1000, PSE, 0)
    assert Paging(*args, GuestCpu(maxphyaddr=40), memory=memory).walk(0x40_1234) == 0x5A_00C0_1234
    # 35:32 only, and bits above are reserved
    assert Paging(*args, GuestCpu(maxphyaddr=36), memory=memory).walk_result(0x40_1234).error_code == 0b1001


def test_without_pse_bit_7_of_a_pde_is_nothing():
    memory = pages(4)
    memory[1, 0] = 0x2000 | P | PS
    memory[2, 0] = 0x3000 | P
    assert Paging(PG_PE, 0x1000, 0, 0, memory=memory).walk(0x10) == 0x3010


def test_fetch_faults_report_i_d_by_nx_with_pae_or_by_smep_and_kvms_walker_by_nx_alone():
    def code(cr4, efer, dialect):
        return Paging(PG_PE, 0, cr4, efer, dialect=dialect).walk_result(0, "x").error_code

    assert code(0, NXE, "sdm") == 0
    assert code(0, NXE, "kvm") == 0x10
    assert code(SMEP, 0, "sdm") == code(SMEP, 0, "kvm") == 0x10
    assert code(PAE, LONG | NXE, "sdm") == 0x10
    assert code(PAE, LONG, "sdm") == code(PAE, LONG, "kvm") == 0


def test_kvms_walker_gives_no_w_for_a_clean_leaf_until_something_writes():
    clean, dirty = four_levels(0x5000 | P | W | U), four_levels(0x5000 | P | W | U | D)
    for memory, dialect, access, writable in (
        (clean, "kvm", "r", False),
        (clean, "kvm", "w", True),
        (dirty, "kvm", "r", True),
        (clean, "sdm", "r", True),
    ):
        rights = long_mode(memory, dialect=dialect).translate([0], access)["access"][0]
        assert bool(rights & 2) == writable


def test_a_bad_present_pdpte_is_refused_at_the_load_and_a_good_table_fills_the_registers():
    memory = pages(2)
    memory[0, 4:8] = [0x1000 | P, 0, 2, 0x1000 | P]  # not present: bit 1 is no matter
    paging = Paging(PG_PE, 0x20, PAE, 0, memory=memory)
    assert paging.pdptes == (0x1001, 0, 2, 0x1001)
    memory[0, 6] |= np.uint64(P)
    with pytest.raises(ArgumentError, match="PDPTE 2 .*reserved"):
        Paging(PG_PE, 0x20, PAE, 0, memory=memory)


def test_svm_reads_pdptes_on_demand_and_answers_a_bad_one_with_a_reserved_bit_fault():
    host = pages(8)
    host[1, 0], host[2, 0], host[3, 0] = (n << 12 | 7 for n in (2, 3, 4))
    host[4, :8] = [n << 12 | 7 for n in range(8)]
    host[5, 0] = 0x6000 | W | P
    paging = Paging(PG_PE, 0x5000, PAE, 0, memory=host, nested=NptTables(0x1000))
    result = paging.walk_result(0)
    assert (result.fault, result.error_code) == (Fault.PF, 0b1001)
    host[5, 0] = 0x6000 | P
    assert paging.walk_result(0).entries[-1].level == 2


class TestTwoDimensions:
    """Guest tables in guest pages 1 to 4 mapping gva 0 to gpa 5; host tables in host pages 9 to 12, identity."""

    EPT = 0x9000 | 0x1E
    EPT_AD = EPT | 0x40

    def build(self, *, ept=True):
        memory = pages(16)
        memory[:8] = four_levels(0x5000 | P | W | U)
        low = 7
        for table in (9, 10, 11):
            memory[table, 0] = (table + 1) << 12 | low
        memory[12, :16] = np.arange(16, dtype=np.uint64) << np.uint64(12) | np.uint64(low | (0x30 if ept else 0))
        return memory

    def over_ept(self, memory, eptp=EPT, dialect="sdm"):
        nested = EptTables(eptp)
        return Paging(PG_PE | WP, 0x1000, PAE, LONG | NXE, memory=memory, nested=nested, dialect=dialect)

    def over_npt(self, memory):
        return Paging(PG_PE | WP, 0x1000, PAE, LONG | NXE, memory=memory, nested=NptTables(0x9000))

    def test_both_dimensions_translate(self):
        memory = self.build()
        memory[12, 5] = 0x7000 | 0x37
        assert self.over_ept(memory).walk(0x123) == 0x7123

    def test_a_violation_on_a_guest_table_comes_before_its_entry_is_looked_at(self):
        memory = self.build()
        memory[3, 0] = 0  # not present, but nobody gets to see it
        memory[12, 3] = 0
        result = self.over_ept(memory).walk_result(0x8)
        assert (result.fault, result.error_code) == (Fault.EPT_VIOLATION, 0x81)
        assert result.second.gva == 0x3000
        assert result.pending_gpa == 0x3000

    def test_the_guests_permission_check_comes_before_the_final_translation(self):
        memory = self.build()
        memory[4, 0] = 0x5000 | P
        memory[12, 5] = 0
        assert self.over_ept(memory).walk_result(0, "w").error_code == 0b11

    def test_guest_bits_are_set_only_when_the_final_translation_succeeded(self):
        memory = self.build()
        memory[12, 5] = 0
        result = self.over_ept(memory).walk_result(0, "w", set_ad=True)
        assert (result.fault, result.error_code) == (Fault.EPT_VIOLATION, 0x182)
        assert int(memory[4, 0]) & (A | D) == 0

    def test_with_ept_a_d_on_reading_a_guest_table_is_a_write(self):
        memory = self.build()
        memory[12, 2] = 0x2000 | 0x31  # read only
        assert self.over_ept(memory).walk(0) == 0x5000
        result = self.over_ept(memory, self.EPT_AD).walk_result(0)
        assert (result.fault, result.error_code) == (Fault.EPT_VIOLATION, 0x8B)
        memory[12, 2] = 0x2000 | 0x37
        self.over_ept(memory, self.EPT_AD).walk_for(0, "r", set_ad=True)
        assert int(memory[12, 2]) & 0x300 == 0x300  # A and D of the EPT entry
        assert int(memory[12, 5]) & 0x300 == 0x100  # the page itself was read

    def test_with_ept_a_d_off_a_guest_accessed_bit_cannot_be_set_in_a_read_only_page(self):
        memory = self.build()
        memory[12, 2] = 0x2000 | 0x31
        result = self.over_ept(memory).walk_result(0, set_ad=True)
        assert (result.fault, result.error_code) == (Fault.EPT_VIOLATION, 0x8B)
        memory[2, 0] |= np.uint64(A)
        assert self.over_ept(memory).walk_for(0, "r", set_ad=True) == 0x5000

    def test_a_misconfigured_entry_is_found_while_walking_whatever_the_access(self):
        memory = self.build()
        memory[12, 5] = 0x5000 | 0x36
        result = self.over_ept(memory).walk_result(0)
        assert (result.fault, result.error_code, result.second.gva) == (Fault.EPT_MISCONFIG, 0, 0x5000)

    def test_npt_says_by_bit_33_or_32_whether_a_guest_table_or_the_final_address_was_refused(self):
        memory = self.build(ept=False)
        memory[12, 5] = 0
        result = self.over_npt(memory).walk_result(0x10, "x")
        assert (result.fault, result.error_code, result.second.gva) == (Fault.NPF, 1 << 32 | 0x14, 0x5010)
        memory[12, 2] = 0x2000 | P | U
        result = self.over_npt(memory).walk_result(0x10, "x")
        assert (result.fault, result.error_code, result.second.gva) == (Fault.NPF, 1 << 33 | 0x7, 0x2000)

    def test_kvms_walker_translates_the_page_of_a_guest_table_as_user_and_write(self):
        memory = self.build()
        memory[4, 3] = memory[4, 0]
        memory[12, 4] = 0x4000 | 0x31
        result = self.over_ept(memory, dialect="kvm").walk_result(0x3000)
        assert (result.fault, result.error_code, result.second.gva) == (Fault.EPT_VIOLATION, 0x8B, 0x4000)

    def test_a_guest_physical_address_wider_than_the_tables_is_refused_as_not_mapped(self):
        memory = self.build()
        memory[4, 0] = 1 << 48 | P | W | U
        nested = EptTables(self.EPT)
        cpu = GuestCpu(maxphyaddr=52)
        result = Paging(PG_PE, 0x1000, PAE, LONG, cpu, memory=memory, nested=nested).walk_result(0)
        assert (result.fault, result.error_code) == (Fault.EPT_VIOLATION, 0x181)
