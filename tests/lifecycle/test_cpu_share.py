"""The defaults know quotas and launchers."""

from pathlib import Path

import pytest

from ktmoe import cpu_share


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


CGROUPS = {
    "v2": ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "250000 100000"}, 2.5),
    "v2, a group above is tighter": (
        {
            "proc/self/cgroup": "0::/a/b",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000",
            "sys/fs/cgroup/a/cpu.max": "150000 50000",
        },
        3.0,
    ),
    "v2 in a container": ({"proc/self/cgroup": "0::/../..", "sys/fs/cgroup/cpu.max": "400000 100000"}, 4.0),
    "v2 without a limit": ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, None),
    "v1": (
        {
            "proc/self/cgroup": "5:memory:/x\n3:cpu,cpuacct:/x",
            "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us": "200000",
            "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us": "100000",
        },
        2.0,
    ),
    "v1 without a limit": (
        {
            "proc/self/cgroup": "3:cpu:/",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
        None,
    ),
    "nonsense": ({"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/cpu.max": "many 0"}, None),
    "nothing": ({}, None),
}


@pytest.mark.parametrize("case", CGROUPS)
def test_quota_of_the_control_group(tmp_path: Path, case: str) -> None:
    files, cpus = CGROUPS[case]
    assert cpu_share.cgroup_cpus(tree(tmp_path, files)) == cpus


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


def ranked(monkeypatch: pytest.MonkeyPatch, rank: object, count: object) -> None:
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(count))


def test_default_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = tree(tmp_path / "free", {})
    tight = tree(tmp_path / "tight", {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "350000 100000"})
    assert cpu_share.default_threads(8, free) == 8
    assert cpu_share.default_threads(8, tight) == 3
    assert cpu_share.default_threads(2, tight) == 2
    tiny = tree(tmp_path / "tiny", {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "20000 100000"})
    assert cpu_share.default_threads(8, tiny) == 1


def test_ranks_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = tree(tmp_path / "free", {})
    for cores, ranks in ((8, 4), (10, 4), (2, 4)):
        threads = []
        for rank in range(ranks):
            ranked(monkeypatch, rank, ranks)
            threads.append(cpu_share.default_threads(cores, free))
        assert sum(threads) == max(cores, ranks)
        assert max(threads) - min(threads) <= 1


def test_ranks_share_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu_share.nodes_of_rank((0, 1, 2, 3)) == (0, 1, 2, 3)
    for nodes, ranks, want in (
        ((0, 1, 2, 3), 2, [(0, 1), (2, 3)]),
        ((0, 1, 2), 2, [(0,), (1, 2)]),
        ((0, 1), 4, [(0,), (0,), (1,), (1,)]),
        ((5,), 3, [(5,), (5,), (5,)]),
    ):
        got = []
        for rank in range(ranks):
            ranked(monkeypatch, rank, ranks)
            got.append(cpu_share.nodes_of_rank(nodes))
        assert got == want


@pytest.mark.parametrize(("rank", "count"), [("", "2"), ("x", "2"), ("2", "2"), ("-1", "2"), ("0", "0")])
def test_a_launcher_that_makes_no_sense_is_ignored(monkeypatch: pytest.MonkeyPatch, rank: str, count: str) -> None:
    ranked(monkeypatch, rank, count)
    assert cpu_share.local_rank() == (0, 1)
