"""Memory for blocks is given back once nothing refers to it, and used again within bounds."""

import gc
import threading

import pytest
import torch

from loraplex_server.vllm_plugin.cpu.regions import Regions

SIZE = 1 << 20


def test_memory_is_used_again_only_when_the_last_view_of_it_has_gone() -> None:
    regions = Regions()
    first = regions.take(SIZE)
    address, view = first.data_ptr(), first[100:].view(torch.uint8)
    first.fill_(7)
    del first
    gc.collect()
    other = regions.take(SIZE)
    assert other.data_ptr() != address
    assert int(view[0]) == 7, "a view keeps its memory to itself"
    del view
    gc.collect()
    assert regions.spare_bytes == SIZE
    assert regions.take(SIZE).data_ptr() == address


@pytest.mark.parametrize(
    ("wanted", "again"), [(SIZE, True), (SIZE - 4096, True), (SIZE + 1, False), (SIZE // 2, False)]
)
def test_a_region_is_used_again_for_what_nearly_fills_it(wanted: int, again: bool) -> None:
    regions = Regions()
    address = regions.take(SIZE).data_ptr()
    taken = regions.take(wanted)
    assert len(taken) == wanted
    assert (taken.data_ptr() == address) == again


def test_no_more_is_kept_than_may_and_the_oldest_goes_first() -> None:
    regions = Regions(spare_bytes_max=2 * SIZE)
    taken = [regions.take(SIZE) for _ in range(4)]
    addresses = [each.data_ptr() for each in taken]
    while taken:
        del taken[0]
    assert regions.spare_bytes == 2 * SIZE
    assert {regions.take(SIZE).data_ptr() for _ in range(1)} <= set(addresses[2:])


def test_threads_never_share_a_region() -> None:
    regions, wrong = Regions(), []

    def work(value: int) -> None:
        for _ in range(200):
            mine = regions.take(4096 * (1 + value % 2))
            mine.fill_(value)
            if not bool((mine == value).all()):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
