"""The program of bin/fuzz, which describes it."""

import argparse
import importlib
import logging
import re
import subprocess
import sys
from pathlib import Path

import hypothesis
from hypothesis.database import DirectoryBasedExampleDatabase

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".fuzz"
MODULES = ("test_properties", "test_fuzzing")
sys.path += [str(ROOT / "tests" / folder) for folder in ("http1", "support")]


def targets(modules) -> dict[str, object]:
    """The tests that accept any input, by name."""
    return {
        name: test
        for module in modules
        for name, test in vars(module).items()
        if name.startswith("test_") and hypothesis.is_hypothesis_test(test)
    }


def main() -> int:
    # bin/fuzz prints the help.
    parser = argparse.ArgumentParser(prog="bin/fuzz", add_help=False)
    parser.add_argument("minutes", type=float, metavar="MINUTES")
    parser.add_argument("only", nargs="*", metavar="TEXT")
    options = parser.parse_args()
    names = [
        name
        for name in targets(map(importlib.import_module, MODULES))
        if not options.only or any(part in name for part in options.only)
    ]
    if not names:
        parser.error("there is no such test")
    failed = 0
    for number, name in enumerate(names, 1):
        print(f"{number}/{len(names)} {name}: ", end="", flush=True)
        failed += not run(name, max(1, round(60 * options.minutes / len(names))))
    print(f"{failed} of {len(names)} failed" if failed else "nothing found")
    return 1 if failed else 0


def run(name: str, seconds: int) -> bool:
    """Run the property; return whether it held."""
    corpus = FOLDER / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    libfuzzer = [
        f"-max_total_time={seconds}",
        "-max_len=8192",
        "-timeout=20",
        "-print_final_stats=1",
        f"-artifact_prefix={FOLDER}/{name}-",
        str(corpus),
    ]
    child = subprocess.run(
        [sys.executable, __file__, "--fuzz", name, *libfuzzer],
        capture_output=True,
        text=True,
        errors="replace",
    )
    units, lines = (
        re.search(r"executed_units: (\d+)", child.stderr),
        re.findall(r"cov: (\d+)", child.stderr),
    )
    print(
        f"{units[1] if units else 'no'} examples in {seconds} s, coverage {lines[-1] if lines else 0}",
        flush=True,
    )
    if child.returncode == 0:
        return True
    print(child.stdout[-5000:], child.stderr[-5000:], sep="\n")
    subprocess.run([sys.executable, __file__, "--explain", name])
    return False


def child(what: str, name: str, libfuzzer: list[str]) -> None:
    import atheris

    logging.disable()
    hypothesis.settings.register_profile(
        "fuzz",
        database=DirectoryBasedExampleDatabase(FOLDER / "failed"),
        deadline=None,
        derandomize=False,
        phases=(hypothesis.Phase.reuse, hypothesis.Phase.shrink),
    )
    hypothesis.settings.load_profile("fuzz")
    with atheris.instrument_imports(include=["xaiproxy"]):
        test = targets(map(importlib.import_module, MODULES))[name]
    # fuzz_one_input left the failure in the database.
    if what == "--explain":
        test()
    else:
        atheris.Setup([name, *libfuzzer], test.hypothesis.fuzz_one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1:2] in (["--fuzz"], ["--explain"]):
        child(sys.argv[1], sys.argv[2], sys.argv[3:])
    else:
        sys.exit(main())
