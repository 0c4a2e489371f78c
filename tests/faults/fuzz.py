"""Mutated files of adapters, models and checkpoints: each is loaded, or refused by the documented error.

    python tests/faults/fuzz.py --count 10000 --seed 0

Each file is one of the tests' fixtures with bytes, fields of its JSON or headers of its tensors changed, or replaced,
removed or made a link. A case fails with any other error, if it takes more time or memory than it may, or if it
imports, runs, connects to or opens anything out of its directory. What failed is kept, and can be run again alone:
`--only adapter:17`.
"""

import argparse
import collections
import faulthandler
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path


os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.append(str(Path(__file__).parents[1] / "hostile"))

import mutations
import subjects
from watch import watching


SECONDS = {"adapter": 1.0, "model": 5.0, "checkpoint": 2.0}  # of the processor; a case takes some hundredths
MEMORY = 64 * 2**20  # bytes, beyond four times those of the files
HANG = 120.0  # seconds after which the process ends with a traceback


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="cases in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=subjects.SUBJECTS, default=list(SHARES))
    parser.add_argument("--only", help="one case, `kind:number`")
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "jpeft-fuzz", help="failed cases")
    parser.add_argument("--sealed", action="store_true", help="manifests get a right digest again, as anyone can make")
    options = parser.parse_args()
    mutations.SEALED = options.sealed
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        for kind in options.kinds:
            total = sum(SHARES[k] for k in options.kinds)
            numbers = range(options.count * SHARES[kind] // total)
            if options.only:
                numbers = [int(options.only.partition(":")[2])] if options.only.startswith(f"{kind}:") else []
            if numbers:
                failed += run(kind, numbers, options.seed, Path(scratch) / kind, options.keep)
    return min(failed, 1)


SHARES = {"adapter": 7, "model": 2, "checkpoint": 1}  # of the cases; a model takes longer to read


def run(kind: str, numbers, seed: int, scratch: Path, keep: Path) -> int:
    """Cases of one kind; how many failed."""
    subject = subjects.SUBJECTS[kind](scratch)
    for name in subject.seeds:  # what is imported and compiled at first use
        _case(subject, name, scratch / "seed", lambda directory: "")
    outcomes, failed, took, most = collections.Counter(), 0, [], 0
    start = time.perf_counter()
    for number in numbers:
        rng = random.Random(f"{seed}:{kind}:{number}")
        name = rng.choice(subject.seeds)
        faulthandler.dump_traceback_later(HANG, exit=True)
        words, watched, size = _case(subject, name, scratch / "case", lambda path, rng=rng: mutations.mutate(rng, path))
        faulthandler.cancel_dump_traceback_later()
        what, outcome, problem = words
        faults = [*watched.faults, *([problem] if problem else [])]
        if watched.seconds > SECONDS[kind]:
            faults.append(f"{watched.seconds:.2f} s")
        if watched.peak > MEMORY + 4 * size:
            faults.append(f"{watched.peak} bytes of memory for {size} of files")
        outcomes[outcome] += 1
        took.append(watched.seconds)
        most = max(most, watched.peak)
        if faults:
            failed += 1
            kept = keep / f"{kind}-{seed}-{number}"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(scratch / "case", kept, symlinks=True)
            print(f"FAILED {kind}:{number} ({name}; {what}), kept at {kept}\n  " + "\n  ".join(faults[:8]), flush=True)
    took.sort()
    print(json.dumps({
        "kind": kind, "seed": seed, "cases": len(took), "failed": failed, "outcomes": dict(outcomes.most_common()),
        "seconds": round(time.perf_counter() - start, 1), "median_ms": round(1e3 * took[len(took) // 2], 1),
        "99th_percentile_ms": round(1e3 * took[int(0.99 * len(took))], 1), "slowest_ms": round(1e3 * took[-1], 1),
        "largest_growth_MB": round(most / 1e6, 1),
    }), flush=True)  # fmt: skip
    return failed


def _case(subject, name, directory: Path, change):
    shutil.rmtree(directory, ignore_errors=True)
    subject.write(name, directory)
    what = change(directory)
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file() and not path.is_symlink())
    problem, outcome = "", "loaded"
    with watching(directory) as watched:
        try:
            subjects.wait(subject.read(name, directory))
        except subject.errors as error:
            outcome, message = type(error).__name__, str(error)
            if len(message) > 600_000 or not message.replace("\n", "").isprintable():
                problem = f"a message of {len(message)} characters, or with control characters"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            outcome = problem = f"{type(error).__name__}: {str(error)[:300]}"
            outcome = type(error).__name__
            problem += _where(error)
    return (what, outcome, problem), watched, size


def _where(error: BaseException) -> str:
    """The innermost line of ours in its traceback."""
    here, found = error.__traceback__, ""
    while here is not None:
        code = here.tb_frame.f_code
        if "/jpeft/" in code.co_filename:
            found = f"\n  at {code.co_filename}:{here.tb_lineno} in {code.co_name}"
        here = here.tb_next
    return found


if __name__ == "__main__":
    sys.exit(main())
