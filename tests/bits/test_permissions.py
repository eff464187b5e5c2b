"""The permission table against the manual's rules, written here in the manual's own order, for every input."""

from itertools import product

import pytest

from kvmmmu.paging import EptTables, NptTables, Paging
from kvmmmu.walks import Rights

PG_PE, WP = 0x8000_0001, 1 << 16
PAE, SMEP, SMAP, PKE = 1 << 5, 1 << 20, 1 << 21, 1 << 22
LONG, NXE = 0x500, 0x800


def may_access_by_the_manual(*, wp, nxe, smep, smap, r, w, x, u, access, cpl, implicit, ac):
    """SDM vol. 3A section 4.6.1, paragraph by paragraph: supervisor-mode accesses, then user-mode accesses."""
    supervisor_access = implicit or cpl < 3
    if supervisor_access:
        if access == "r":
            return not u or not smap or (ac and not implicit)
        if access == "w":
            if u and smap and not (ac and not implicit):
                return False
            return w or not wp
        if u and smep:
            return False
        return x or not nxe
    if not u:
        return False
    if access == "r":
        return True
    if access == "w":
        return w
    return x or not nxe


def key_allows_by_the_manual(*, pkru, key, wp, u, access, cpl, implicit):
    """SDM vol. 3A section 4.6.2: keys rule data accesses to user-mode addresses."""
    if access == "x" or not u:
        return True
    if pkru >> 2 * key & 1:
        return False
    user_access = cpl == 3 and not implicit
    return not (access == "w" and pkru >> (2 * key + 1) & 1 and (user_access or wp))


@pytest.mark.parametrize("wp", [False, True])
@pytest.mark.parametrize("nxe", [False, True])
@pytest.mark.parametrize("smep", [False, True])
@pytest.mark.parametrize("smap", [False, True])
@pytest.mark.parametrize("dialect", ["sdm", "kvm"])
def test_rights_refuse_exactly_what_the_manual_refuses(wp, nxe, smep, smap, dialect):
    cr0 = PG_PE | (WP if wp else 0)
    cr4 = PAE | (SMEP if smep else 0) | (SMAP if smap else 0)
    paging = Paging(cr0, 0, cr4, LONG | (NXE if nxe else 0), dialect=dialect)
    for rights in range(8):
        w, x, u = (bool(rights & bit) for bit in (Rights.W, Rights.X, Rights.U))
        for access, cpl, implicit, ac in product("rwx", range(4), (False, True), (False, True)):
            allowed = may_access_by_the_manual(
                wp=wp, nxe=nxe, smep=smep, smap=smap, r=True, w=w, x=x, u=u,
                access=access, cpl=cpl, implicit=implicit, ac=ac,
            )  # fmt: skip
            got = paging.permission_fault(rights, access, cpl, ac, implicit)
            assert got == (0 if allowed else 1), (rights, access, cpl, implicit, ac)


@pytest.mark.parametrize("wp", [False, True])
@pytest.mark.parametrize("key", range(16))
@pytest.mark.parametrize("bits", range(4))
def test_protection_keys_refuse_data_accesses_to_user_pages_and_say_so_in_the_error_code(wp, key, bits):
    others_deny_everything = 0xFFFF_FFFF & ~(3 << 2 * key)
    pkru = others_deny_everything | bits << 2 * key
    cr0 = PG_PE | (WP if wp else 0)
    paging = Paging(cr0, 0, PAE | PKE, LONG | NXE, pkru=pkru)
    plain = Paging(cr0, 0, PAE, LONG | NXE, pkru=pkru)
    for rights, access, cpl, implicit in product(range(8), "rwx", (0, 3), (False, True)):
        u = bool(rights & Rights.U)
        allowed = key_allows_by_the_manual(pkru=pkru, key=key, wp=wp, u=u, access=access, cpl=cpl, implicit=implicit)
        before = plain.permission_fault(rights, access, cpl, False, implicit, key)
        got = paging.permission_fault(rights, access, cpl, False, implicit, key)
        assert got == (before if allowed else 0x21), (rights, access, cpl, implicit)


def test_protection_keys_do_not_exist_outside_long_mode():
    paging = Paging(PG_PE, 0, PAE | PKE, 0, pkru=0xFFFF_FFFF, pdptes=(0, 0, 0, 0))
    assert paging.permission_fault(7, "r", 3, pkey=1) == 0


def test_ept_asks_each_right_for_itself_and_nothing_else():
    paging = Paging(PG_PE, 0, PAE | SMAP | SMEP, LONG, nested=EptTables(0x1E))
    for rights, access, reads, ac in product(range(8), "rwx", (False, True), (False, True)):
        needs = {"r": 0, "w": Rights.W, "x": Rights.X}[access] | (Rights.U if reads else 0)
        got = paging.permission_fault(rights, access, 3 if reads else 0, ac, dimension=2)
        assert got == (0 if rights & needs == needs else 1), (rights, access, reads)


def test_nested_tables_obey_w_for_every_write_whatever_the_guests_wp_says():
    paging = Paging(PG_PE, 0, PAE, LONG, nested=NptTables(0))
    for rights, access in product(range(8), "rwx"):
        needs = Rights.U | {"r": 0, "w": Rights.W, "x": Rights.X}[access]
        assert paging.permission_fault(rights, access, 3, dimension=2) == (0 if rights & needs == needs else 1)
