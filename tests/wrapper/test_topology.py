"""What the process may use of this machine, and a machine that is pretended."""

import os

import pytest

from ktmoe import topology


def test_this_machine() -> None:
    cpus = topology.usable_cpus()
    assert cpus == os.sched_getaffinity(0)
    assert 1 <= topology.physical_cores(cpus) <= len(cpus)
    assert frozenset().union(*topology.node_cpus(cpus).values()) == cpus
    assert topology.node_cpus(frozenset()) == {0: frozenset()}
    assert topology.physical_cores(frozenset({10**6})) == 1


def test_cpu_lists(tmp_path) -> None:
    path = tmp_path / "list"
    path.write_text("0-3,8,10-11\n")
    assert topology.cpu_list(str(path)) == [0, 1, 2, 3, 8, 10, 11]
    path.write_text("\n")
    assert topology.cpu_list(str(path)) == []
    assert topology.cpu_list(str(tmp_path / "absent")) == []


def test_nodes_of_the_affinity_mask(tmp_path, monkeypatch) -> None:
    """Ascending, without nodes that have none of the CPUs, or only memory."""
    monkeypatch.setattr(topology, "_NODES", str(tmp_path))
    (tmp_path / "online").write_text("0-3")
    for node, cpus in enumerate(("0-3", "4-7", "8-11", "")):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(cpus)
    topology._real_nodes.cache_clear()
    try:
        assert topology.node_cpus(frozenset({9, 2, 3})) == {0: {2, 3}, 2: {9}}
        assert topology.node_cpus(frozenset({77})) == {0: {77}}
    finally:
        topology._real_nodes.cache_clear()


def test_pretended_nodes(monkeypatch) -> None:
    cpus = frozenset({1, 5})
    monkeypatch.setenv("KTMOE_FAKE_NUMA", "3")
    assert topology.node_cpus(cpus) == {0: cpus, 1: cpus, 2: cpus}
    monkeypatch.setenv("KTMOE_FAKE_NUMA", "0")
    assert topology.node_cpus(cpus) == topology._real_nodes(cpus)
    for text in ("two", "-1", "1.5"):
        monkeypatch.setenv("KTMOE_FAKE_NUMA", text)
        with pytest.raises(ValueError, match=f"KTMOE_FAKE_NUMA: got '{text}', expected a number of nodes"):
            topology.node_cpus(cpus)
