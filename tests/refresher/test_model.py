"""refresh.pml, the model of the refresh protocol, checked by spin in every interleaving, as a
whole and without each rule.

docs/login-safety.md lists the properties, and what the model leaves out.
"""

import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess

import pytest

pytestmark = pytest.mark.skipif(
    not (shutil.which("spin") and shutil.which("gcc")),
    reason="the model is checked with spin and gcc",
)

MODEL = pathlib.Path(__file__).with_name("refresh.pml")
# Seconds for one search; the longest takes 4 on a core of its own.
LIMIT = 120

# How many faults are searched at once. All of them together would take hours.
WHOLE = {
    "kills and lost answers": dict(REFRESHERS=3, KILLS=3, LOSSES=4),
    "the lock file is removed": dict(REFRESHERS=3, KILLS=1, LOSSES=1, REMOVALS=1, TOKENS=2),
    "twice, with kills": dict(REFRESHERS=2, KILLS=2, LOSSES=0, REMOVALS=2, TOKENS=2),
    "tokens.json.new is removed": dict(
        REFRESHERS=2, KILLS=2, LOSSES=1, TIDYINGS=1, FULL=1, TOKENS=2
    ),
    "written without a lock": dict(REFRESHERS=2, KILLS=1, LOSSES=2, FOREIGN=1, FULL=1, TOKENS=2),
    "xai-login signs in": dict(REFRESHERS=2, KILLS=1, LOSSES=2, SIGN_INS=1, FULL=1, TOKENS=2),
}

# A rule that is left out, the property that fails, and the smallest set of faults that breaks it.
MUTANTS = {
    "WITHOUT_LOCK": (3, dict(REFRESHERS=2)),
    "WITHOUT_FOLDER_LOCK": (3, dict(REFRESHERS=2, REMOVALS=1)),
    "WITHOUT_REREAD": (2, dict(REFRESHERS=2, LOSSES=4)),
    "WITHOUT_ADOPTION": (1, dict(KILLS=1)),
    "WITHOUT_REPLACES": (4, dict(KILLS=1, FOREIGN=1)),
    "WITHOUT_WHOLENESS": (7, dict(KILLS=1)),
    "WITHOUT_CHECK_BEFORE_RENAME": (4, dict(FOREIGN=1)),
    "WITHOUT_COUNT_BEFORE": (2, dict(KILLS=1, LOSSES=3)),
    "WITHOUT_COUNT_IN_RECORD": (2, dict(LOSSES=3)),
    "WITHOUT_SHARED_COUNT": (2, dict(REFRESHERS=2, LOSSES=3)),
    "WITHOUT_GIVING_BACK": (5, dict()),
    "WITHOUT_TOKEN_OF_TRY": (5, dict(KILLS=3, FOREIGN=1)),
    "WITHOUT_TOKEN_OF_TRY WITHOUT_REMOVAL_OF_TRY": (5, dict(KILLS=2)),
    "WITHOUT_TOKEN_OF_TERMINAL": (5, dict(LOSSES=1, FOREIGN=1)),
    "WITHOUT_REHEARSAL": (6, dict(FULL=1)),
    "WITHOUT_SAVING_AGAIN": (3, dict()),
    "WITHOUT_DEAF_TO_SIGTERM": (3, dict()),
}

# Rules that another rule replaces, as long as that one holds.
REDUNDANT = {
    "WITHOUT_IDENTITY_CHECK": dict(REFRESHERS=2, KILLS=1, LOSSES=1, REMOVALS=1, TOKENS=2),
    "WITHOUT_REMOVAL_OF_TRY": dict(REFRESHERS=1, KILLS=2, LOSSES=3),
}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The program that searches all variants of the model."""
    folder = tmp_path_factory.mktemp("model")
    for command in (
        ["spin", "-a", MODEL],
        # Without -O: compiling with it takes longer than it saves.
        ["gcc", "-w", "-DSAFETY", "-o", "pan", "pan.c"],
    ):
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, timeout=LIMIT)
    return folder / "pan"


def search(
    program: pathlib.Path, folder: pathlib.Path, sizes: dict[str, int], rules: str, number: int = 0
) -> str:
    """The output of the search for the model of these sizes, with all properties (0) or one.

    `rules`: those that are left out.
    """
    folder.mkdir()
    chosen = {"REFRESHERS": 1, "TOKENS": 3, **sizes, "PROPERTY": number}
    chosen.update(dict.fromkeys(rules.split(), 1))
    done = subprocess.run(
        [program, "-m50000", "-w22"],
        cwd=folder,
        env={name: str(value) for name, value in chosen.items()},
        check=True,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    return done.stdout.partition("unreached in")[0]


@pytest.fixture(scope="module")
def searches(program):
    """All searches, side by side, the longest first: futures of their output by name."""
    jobs = {name: (sizes, "") for name, sizes in WHOLE.items()}
    jobs.update({name: (sizes, name) for name, sizes in REDUNDANT.items()})
    jobs.update({name: (sizes, name, number) for name, (number, sizes) in MUTANTS.items()})
    jobs["restored"] = dict(REFRESHERS=1, FOREIGN=1), "WITH_A_RESTORED_FILE", 1
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield {
            name: pool.submit(search, program, program.with_name(str(number)), *job)
            for number, (name, job) in enumerate(jobs.items())
        }


def holds(output: str) -> bool:
    complete = (
        "error: max search depth too small" not in output and "Search not completed" not in output
    )
    return complete and "errors: 0" in output


def fails(output: str, number: int) -> bool:
    """Whether that property fails, and not something else, such as a deadlock of the model."""
    return (
        re.search(rf"assertion violated \(*PROPERTY!=0\)&&\(PROPERTY!={number}\)", output)
        is not None
    )


@pytest.mark.parametrize("name", WHOLE)
def test_the_protocol_has_every_property(searches, name):
    output = searches[name].result()
    assert holds(output), output


@pytest.mark.parametrize("name", MUTANTS)
def test_each_rule_is_needed(searches, name):
    output = searches[name].result()
    assert fails(output, MUTANTS[name][0]), output


@pytest.mark.parametrize("name", REDUNDANT)
def test_a_redundant_rule_can_be_left_out(searches, name):
    output = searches[name].result()
    assert holds(output), output


def test_a_restored_file_is_beyond_the_protocol(searches):
    assert fails(searches["restored"].result(), 1)


def test_every_rule_of_the_model_is_left_out_in_a_test():
    rules = set(re.findall(r"\bWITHOUT_[A-Z_]+\b", MODEL.read_text()))
    assert rules == {
        rule for names in (MUTANTS, REDUNDANT) for name in names for rule in name.split()
    }
