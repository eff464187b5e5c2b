"""Lists, hash and free memory: every page and every list block is in exactly one place."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvmmmu.check.snapshot import LIST_ACTIVE, LIST_CACHED, LIST_FREE, Role, Snapshot
from kvmmmu.constants import TABLE
from kvmmmu.errors import Violation

_HASH_MULTIPLIER = 0x61C8864680B583EB
_HASH_BITS = 12


def _page(number: int) -> str:
    return f"page {number}"


def active_list(s: Snapshot) -> Iterator[Violation]:
    """The active list holds every valid page of the current generation once, linked both ways."""
    name = "active list"
    before, at, seen = 0, s.active_head, set[int]()
    while at and at not in seen and at < s.top:
        seen.add(at)
        page = s.pages[at]
        if page["list_prev"] != before:
            yield Violation(name, _page(at), f"list_prev is {page['list_prev']}, expected {before}")
        if page["on_list"] != LIST_ACTIVE:
            yield Violation(name, _page(at), f"stands in the list but on_list is {page['on_list']}")
        # Linux 3.1 leaves a zapped root there while a vCPU uses it.
        stays = page["root_count"] > 0 and s.era & TABLE["ERA_ZAP_AT_ONCE"]
        if (page["role"] & Role.INVALID and not stays) or page["tdp"] or page["special"]:
            yield Violation(name, _page(at), "is zapped, of the TDP MMU or a PAE root: expected off the list")
        if page["valid_gen"] != s.valid_gen:
            yield Violation(name, _page(at), f"has generation {page['valid_gen']}, expected {s.valid_gen}")
        before, at = at, int(page["list_next"])
    if at:
        yield Violation(name, _page(at), "closes a circle or is outside the arena")
    if before != s.active_tail:
        yield Violation(name, _page(before), f"is the last page, but the tail is {s.active_tail}")
    if len(seen) != s.active_n:
        yield Violation(name, "active list", f"holds {len(seen)} pages, counted are {s.active_n}")
    for number in np.flatnonzero(s.valid).tolist():
        if number not in seen:
            yield Violation(name, _page(number), "is valid, expected in the active list")


def hash_chains(s: Snapshot) -> Iterator[Violation]:
    """Every page of the shadow MMU is in the chain of its gfn once, zapped roots too; nothing else is in a chain."""
    name = "hash"
    seen = set[int]()
    for bucket in np.flatnonzero(s.hash).tolist():
        before, at = 0, int(s.hash[bucket])
        while at and at not in seen and at < s.top:
            seen.add(at)
            page = s.pages[at]
            wanted = (int(page["gfn"]) * _HASH_MULTIPLIER & (1 << 64) - 1) >> (64 - _HASH_BITS)
            if wanted != bucket:
                yield Violation(name, _page(at), f"is in bucket {bucket}, expected {wanted}")
            if page["hash_prev"] != before:
                yield Violation(name, _page(at), f"hash_prev is {page['hash_prev']}, expected {before}")
            if not s.shadow[at]:
                yield Violation(name, _page(at), "is free or not of the shadow MMU, expected out of the hash")
            before, at = at, int(page["hash_next"])
        if at:
            yield Violation(name, _page(at), "is in two chains, closes a circle or is outside the arena")
    for number in np.flatnonzero(s.shadow).tolist():
        if number not in seen:
            yield Violation(name, _page(number), "is in use, expected in the hash")


def free_list(s: Snapshot) -> Iterator[Violation]:
    """The free list holds every free page once that no vCPU has set aside, and their entries are empty."""
    name = "free list"
    at, seen = s.free, set[int]()
    while at and at not in seen and at < s.top:
        seen.add(at)
        if s.pages["on_list"][at] != LIST_FREE:
            yield Violation(name, _page(at), f"is in the free list but on_list is {s.pages['on_list'][at]}")
        at = int(s.pages["list_next"][at])
    if at:
        yield Violation(name, _page(at), "closes a circle or is outside the arena")
    for number in np.flatnonzero(~s.live).tolist():
        if number and number not in seen and s.pages["on_list"][number] != LIST_CACHED:
            yield Violation(name, _page(number), "is free, expected in the free list")
        if s.sptes[number].any():
            entry = int(np.flatnonzero(s.sptes[number])[0])
            yield Violation(name, f"page {number} entry {entry}", f"is {s.sptes[number, entry]:#x}, expected 0")


def list_blocks(s: Snapshot) -> Iterator[Violation]:
    """Every block of an spte list is in exactly one list or in the free chain, and counts 1 to 14 entries."""
    name = "list blocks"
    owner: dict[int, str] = {}
    heads = [(int(head), f"parents of page {n}") for n, head in enumerate(s.pages["parents"]) if s.live[n] and head]
    for space in s.spaces:
        for slot in space.slots:
            for level, column in slot.rmap.items():
                for place in np.flatnonzero(column).tolist():
                    heads.append((int(column[place]), f"rmap of slot {slot.id} level {level} place {place}"))
    for head, what in heads:
        if head & 3 == 1:
            continue
        if head & 3 != 2:
            yield Violation(name, what, f"head word {head:#x} is of no kind")
            continue
        block = head >> 2
        while block:
            if block in owner or not 2 <= block <= s.desc_top:
                yield Violation(name, f"block {block}", f"of {what} is also of {owner.get(block, 'nobody')}")
                break
            owner[block] = what
            if not 1 <= s.descs["count"][block] <= 14:
                yield Violation(name, f"block {block}", f"of {what} counts {s.descs['count'][block]} entries")
            block = int(s.descs["more"][block])
    block = s.desc_free
    while block:
        if block in owner or not 2 <= block <= s.desc_top:
            yield Violation(name, f"block {block}", f"is free and also of {owner.get(block, 'nobody')}")
            break
        owner[block] = "the free chain"
        block = int(s.descs["more"][block])
    for block in range(2, s.desc_top + 1):
        if block not in owner:
            yield Violation(name, f"block {block}", "is in no list, expected in the free chain")


def used_pages(s: Snapshot) -> Iterator[Violation]:
    """used_pages counts the shadow MMU's pages, zapped roots still in use included, and keeps the quota."""
    name = "used pages"
    found = int(s.shadow.sum())
    if found != s.used_pages:
        yield Violation(name, "used_pages", f"is {s.used_pages}, expected {found}")
    if s.used_pages > s.max_pages:
        yield Violation(name, "used_pages", f"is {s.used_pages}, more than the quota of {s.max_pages}")
    indirect = int((s.valid & Role.has_gptes(s.pages["role"])).sum())
    if indirect != s.indirect_pages:
        yield Violation(name, "indirect_pages", f"is {s.indirect_pages}, expected {indirect}")
