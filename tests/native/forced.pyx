# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Forced interleavings: every case is a schedule, run by ``forced CASE``; see README.md beside this file."""

from libc.stdio cimport printf
from libc.string cimport memset, strcmp
from kvmmmu.engine.hooks cimport *
from kvmmmu.engine.state cimport MMU_EPT, MMU_SHADOW
from turns cimport *
from world cimport *
from cases_walk cimport *
from cases_life cimport *
from cases_pass cimport *
from cases_batch cimport *
from cases_lock cimport *

ctypedef int (*case_fn)(World *) noexcept nogil

cdef struct Case:
    const char *name
    case_fn run
    int mmu
    bint tdp_mmu
    int mutants[4]    # faults this case finds when they are planted; 0 ends the list

cdef enum:
    MAX_CASES = 128

cdef struct Cases:
    Case all[128]
    int n


cdef void case_add(Cases *c, const char *name, case_fn run, int mmu, bint tdp_mmu, int m0, int m1) noexcept nogil:
    cdef Case *it = &c.all[c.n]
    it.name = name
    it.run = run
    it.mmu = mmu
    it.tdp_mmu = tdp_mmu
    it.mutants[0] = m0
    it.mutants[1] = m1
    c.n += 1


cdef void cases_list(Cases *c) noexcept nogil:
    """One line a case; the tests read the names here."""
    case_add(c, b"c1_empty_to_present", c1_empty_to_present, MMU_SHADOW, False, 0, 0)
    case_add(c, b"c1_old_value", c1_old_value, MMU_SHADOW, False, 0, 0)
    case_add(c, b"c2_empty_to_mmio", c2_empty_to_mmio, MMU_SHADOW, False, 0, 0)
    case_add(c, b"c2_old_value", c2_old_value, MMU_SHADOW, False, 0, 0)
    case_add(c, b"c3_link", c3_link, MMU_SHADOW, False, MUTANT_LINK_EARLY, 0)
    case_add(c, b"c3_before_link", c3_before_link, MMU_SHADOW, False, 0, 0)
    case_add(c, b"c4_freer_waits", c4_freer_waits, MMU_SHADOW, False, MUTANT_NO_DRAIN, MUTANT_NO_ANNOUNCE)
    case_add(c, b"c4_empty_seen", c4_empty_seen, MMU_SHADOW, False, 0, 0)
    case_add(c, b"c5_mmio_to_empty", c5_mmio_to_empty, MMU_SHADOW, False, MUTANT_NO_DRAIN, MUTANT_NO_ANNOUNCE)
    case_add(c, b"c5_empty_seen", c5_empty_seen, MMU_SHADOW, False, 0, 0)
    case_add(c, b"c6_slot_created", c6_slot_created, MMU_SHADOW, False, MUTANT_NO_IN_PROGRESS, MUTANT_NO_SYNC)
    case_add(c, b"c6_after_update", c6_after_update, MMU_SHADOW, False, MUTANT_NO_SYNC, 0)
    case_add(c, b"c6_generation", c6_generation, MMU_SHADOW, False, MUTANT_NO_GENERATION, 0)
    case_add(c, b"c7_slot_deleted", c7_slot_deleted, MMU_SHADOW, False, MUTANT_NO_SYNC, 0)
    case_add(c, b"c8_new_generation", c8_new_generation, MMU_SHADOW, False, MUTANT_SECOND_READ, 0)
    case_add(c, b"c9_both_give_write", c9_both_give_write, MMU_EPT, True, 0, 0)
    case_add(c, b"c9_zapped_meanwhile", c9_zapped_meanwhile, MMU_EPT, True, MUTANT_PLAIN_STORE, 0)
    case_add(c, b"c10_processor_sets_bits", c10_processor_sets_bits, MMU_SHADOW, False, MUTANT_NO_DRAIN, 0)
    case_add(c, b"c11_page_unlinked", c11_page_unlinked, MMU_SHADOW, False, MUTANT_NO_DRAIN, MUTANT_NO_ANNOUNCE)
    case_add(c, b"c11_empty_seen", c11_empty_seen, MMU_SHADOW, False, 0, 0)
    case_add(c, b"c12_collapse", c12_collapse, MMU_EPT, True, 0, 0)
    case_add(c, b"c12_old_table", c12_old_table, MMU_EPT, True, MUTANT_NO_DRAIN, 0)
    case_add(c, b"c13_split", c13_split, MMU_EPT, True, 0, 0)
    case_add(c, b"c14_other_table", c14_other_table, MMU_SHADOW, False, MUTANT_NO_DRAIN, 0)
    case_add(c, b"c29_request_follows_invalidation", c29_request_follows_invalidation, MMU_EPT, True, 0, 0)
    case_add(c, b"r7_zapped_before_walk", r7_zapped_before_walk, MMU_SHADOW, False, 0, 0)
    case_add(c, b"r7_remapped_before_walk", r7_remapped_before_walk, MMU_SHADOW, False, 0, 0)
    case_add(c, b"c15_page_is_not_reused", c15_page_is_not_reused,
             MMU_SHADOW, False, MUTANT_NO_DRAIN, MUTANT_NO_ANNOUNCE)
    case_add(c, b"c16_root_in_use", c16_root_in_use, MMU_SHADOW, False, MUTANT_NO_DRAIN, 0)
    case_add(c, b"c17_root_is_the_vcpus_own", c17_root_is_the_vcpus_own, MMU_SHADOW, False, 0, 0)
    case_add(c, b"c18_tracked_leaf", c18_tracked_leaf, MMU_EPT, True, MUTANT_PLAIN_STORE, 0)
    case_add(c, b"c19_removed_is_seen", c19_removed_is_seen, MMU_EPT, True, 0, 0)
    case_add(c, b"c21_pae_root_entry_is_missing", c21_pae_root_entry_is_missing, MMU_SHADOW, False, 0, 0)
    case_add(c, b"c22_generation_moves_before_the_record", c22_generation_moves_before_the_record,
             MMU_SHADOW, False, MUTANT_NO_IN_PROGRESS, MUTANT_NO_SYNC)
    case_add(c, b"c23_remapped_and_not_flushed", c23_remapped_and_not_flushed, MMU_SHADOW, False, 0, 0)
    case_add(c, b"c23_flushed_by_another", c23_flushed_by_another, MMU_SHADOW, False, 0, 0)
    case_add(c, b"c24_unsync_before_writable", c24_unsync_before_writable, MMU_SHADOW, False, 0, 0)
    case_add(c, b"c25_table_counted_then_reread", c25_table_counted_then_reread, MMU_SHADOW, False, MUTANT_NO_REREAD, 0)
    case_add(c, b"c25_written_while_a_fault_waits", c25_written_while_a_fault_waits,
             MMU_SHADOW, False, MUTANT_NO_REREAD, 0)
    case_add(c, b"c26_notifier_between_frame_and_lock", c26_notifier_between_frame_and_lock,
             MMU_SHADOW, False, MUTANT_NO_SEQ, 0)
    case_add(c, b"c27_flush_waits_for_the_processor", c27_flush_waits_for_the_processor,
             MMU_EPT, True, MUTANT_NO_DRAIN, 0)
    case_add(c, b"c28_two_install_one_spte", c28_two_install_one_spte, MMU_EPT, True, 0, 0)
    case_add(c, b"c28_shadow_serialises", c28_shadow_serialises, MMU_SHADOW, False, 0, 0)
    case_add(c, b"c29_root_goes_before_the_walk", c29_root_goes_before_the_walk, MMU_SHADOW, False, MUTANT_NO_DRAIN, 0)
    case_add(c, b"c30_prefetch_over_an_mmio_spte", c30_prefetch_over_an_mmio_spte, MMU_SHADOW, False, 0, 0)
    case_add(c, b"c31_read_only_frame_replaced", c31_read_only_frame_replaced, MMU_SHADOW, False, MUTANT_NO_DRAIN, 0)
    case_add(c, b"c32_slot_comes_between_hit_and_emulation", c32_slot_comes_between_hit_and_emulation,
             MMU_SHADOW, False, MUTANT_NO_SYNC, 0)
    case_add(c, b"c33_collapse", c33_collapse, MMU_EPT, True, MUTANT_NO_DRAIN, 0)
    case_add(c, b"c34_generation_goes_round", c34_generation_goes_round, MMU_SHADOW, False, MUTANT_LATE_GENERATION, 0)
    case_add(c, b"c35_bits_come_between", c35_bits_come_between, MMU_EPT, True, MUTANT_PASS_ONCE, 0)
    case_add(c, b"c35_fault_takes_the_huge_leaf", c35_fault_takes_the_huge_leaf, MMU_EPT, True, 0, 0)
    case_add(c, b"c36_pass_meets_removed", c36_pass_meets_removed, MMU_EPT, True, 0, 0)
    case_add(c, b"c37_repair_by_the_old_slot", c37_repair_by_the_old_slot, MMU_EPT, True, MUTANT_NO_SYNC, 0)
    case_add(c, b"c37_repair_by_the_new_slot", c37_repair_by_the_new_slot, MMU_EPT, True, 0, 0)
    case_add(c, b"c38_fault_is_first", c38_fault_is_first, MMU_EPT, True, 0, 0)
    case_add(c, b"c38_split_is_first", c38_split_is_first, MMU_EPT, True, 0, 0)
    case_add(c, b"c38_bits_come_between", c38_bits_come_between, MMU_EPT, True, MUTANT_PASS_ONCE, 0)
    case_add(c, b"c39_fault_in_the_table", c39_fault_in_the_table, MMU_EPT, True, MUTANT_NO_GRACE, 0)
    case_add(c, b"c39_fault_over_the_table", c39_fault_over_the_table, MMU_EPT, True, MUTANT_SECOND_READ, 0)
    case_add(c, b"c40_table_goes_around_a_removed_entry", c40_table_goes_around_a_removed_entry,
             MMU_EPT, True, MUTANT_REMOVED_TAKEN, 0)
    case_add(c, b"c41_writer_is_let_in", c41_writer_is_let_in, MMU_EPT, True, MUTANT_STALE_PATH, 0)
    case_add(c, b"c42_batch_leaves_at_a_request", c42_batch_leaves_at_a_request,
             MMU_SHADOW, False, MUTANT_DEAF_BATCH, 0)
    case_add(c, b"c42_nested_batch_leaves", c42_batch_leaves_at_a_request, MMU_EPT, True, MUTANT_DEAF_BATCH, 0)
    case_add(c, b"c44_update_asks_a_batch_to_leave", c44_update_asks_a_batch_to_leave,
             MMU_SHADOW, False, MUTANT_NO_KICK, MUTANT_DEAF_BATCH)
    case_add(c, b"c44_batch_enters_after_the_look", c44_batch_enters_after_the_look,
             MMU_SHADOW, False, MUTANT_SECOND_LOOK, 0)
    case_add(c, b"c44_batch_is_back_before_the_look", c44_batch_is_back_before_the_look,
             MMU_EPT, True, MUTANT_NO_KICK, 0)
    case_add(c, b"l1_long_wait_goes_first", l1_long_wait_goes_first, MMU_SHADOW, False, 0, 0)
    case_add(c, b"l1_reader_goes_first", l1_reader_goes_first, MMU_EPT, True, 0, 0)
    case_add(c, b"l2_short_wait_does_not", l2_short_wait_does_not, MMU_SHADOW, False, 0, 0)


cdef int case_run(const Case *it, bint points) noexcept nogil:
    """0: its schedule ran and its rules held."""
    cdef World *w = world_new(it.mmu, 2, it.tdp_mmu)
    cdef int failed
    if w == NULL:
        printf("no memory for the machine\n")
        return 2
    turns_reset()
    failed = it.run(w)
    turns_finish()
    if points:
        turns_print_points()
    failed += world_end(w)
    return 1 if failed else 0


cdef public int native_main(int argc, char **argv) noexcept nogil:
    """forced --list | [--without POINT] [--mutant MUTANT] [--points] CASE"""
    cdef Cases c
    cdef int i = 1, j, number
    cdef bint points = False
    memset(&c, 0, sizeof(c))
    cases_list(&c)
    while i < argc and argv[i][0] == b"-":
        if strcmp(argv[i], b"--list") == 0:
            for j in range(c.n):
                printf("%s", c.all[j].name)
                number = 0
                while number < 4 and c.all[j].mutants[number]:
                    printf(" %s", turns_mutant_name(c.all[j].mutants[number]))
                    number += 1
                printf("\n")
            return 0
        if strcmp(argv[i], b"--points") == 0:
            points = True
        elif i + 1 < argc and strcmp(argv[i], b"--without") == 0:
            i += 1
            number = turns_point_number(argv[i])
            if number < 0:
                printf("no point %s\n", argv[i])
                return 2
            turns_without(number)
        elif i + 1 < argc and strcmp(argv[i], b"--mutant") == 0:
            i += 1
            number = turns_mutant_number(argv[i])
            if number < 0:
                printf("no mutant %s\n", argv[i])
                return 2
            turns_plant(number)
        i += 1
    for j in range(c.n):
        if i < argc and strcmp(argv[i], c.all[j].name) == 0:
            return case_run(&c.all[j], points)
    printf("usage: forced --list | [--without POINT] [--mutant MUTANT] [--points] CASE\n")
    return 2
