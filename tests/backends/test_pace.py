"""csrc/cpu/pace.h: whether a program's threads help each other, on a machine whose times are made up."""

from __future__ import annotations

import subprocess

import pytest

from regnet_fast.backends import cpu_library

MACHINE = """
#include <cstdio>
#include "pace.h"
int main() {
    Pace pace;
    double together, cpu, alone;
    int calls;
    while (scanf("%d %lf %lf %lf", &calls, &together, &cpu, &alone) == 4) {
        int helped = 0, last = 0;
        for (int i = 0; i < calls; i++) {
            const bool with = pace.helped();
            helped += with;
            last = with ? last + 1 : 0;
            pace.add(with, with ? Times{together, cpu} : Times{alone, alone / 2});
        }
        printf("%d %d\\n", helped, last);
    }
}
"""


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """Of phases (calls; seconds together, with a core, and alone), how many calls were helped, and at the end."""
    made = tmp_path_factory.mktemp("pace") / "machine"
    try:
        command = [*cpu_library.compiler(), "-std=c++17", "-O1", f"-I{cpu_library.FOLDER / 'cpu'}", "-x", "c++", "-"]
    except cpu_library.LibraryError as error:
        pytest.skip(str(error))
    subprocess.run([*command, "-o", made], input=MACHINE, text=True, check=True)

    def run(*phases):
        given = "\n".join(" ".join(map(str, phase)) for phase in phases)
        out = subprocess.run([made], input=given, capture_output=True, text=True, check=True).stdout
        return [tuple(map(int, line.split())) for line in out.splitlines()]

    return run


QUIET = 3e-3, 3e-3, 5e-3


def test_a_quiet_machine(calls):
    assert calls((1000, *QUIET)) == [(1000, 1000)]


def test_one_thread_alone_is_faster_beside_other_work(calls):
    (helped, _), (again, last) = calls((800, 20e-3, 6e-3, 10e-3), (800, *QUIET))
    assert 80 <= helped <= 120  # to see whether it still is
    assert last > 600 and again > 700


def test_helpers_are_faster_beside_other_work(calls):
    (helped, _), (again, last) = calls((800, 40e-3, 20e-3, 64e-3), (800, *QUIET))
    assert 690 <= helped <= 720
    assert last > 700 and again > 750


def test_a_few_disturbed_calls(calls):
    busy = 20e-3, 6e-3, 10e-3
    assert calls((2, *busy), (300, *QUIET), (1, *busy), (300, *QUIET)) == [(2, 2), (300, 300), (1, 1), (300, 300)]
