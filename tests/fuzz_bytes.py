"""Fuzzes the reading of one kind of file by coverage: `python tests/fuzz_bytes.py profile -runs=10000`.

Needs atheris (`pip install atheris`), which is no dependency of the tests. Options behind the kind are libFuzzer's. Kinds are those of
fuzz_targets.py; the valid file is the first input of the corpus. An exception that is no message of vitq, an input of more than a minute
or a process that grows by more than 1 GB ends it with a file that reproduces it.
"""

import resource
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["vitq"]):
    from fuzz_targets import TARGETS, make_session, reader


def main() -> None:
    name, *options = sys.argv[1:]
    with tempfile.TemporaryDirectory() as place:
        session = make_session(Path(place) / "made")
        corpus = Path(place) / "corpus"
        corpus.mkdir()
        (corpus / "valid").write_bytes((session / TARGETS[name].file).read_bytes())
        read = reader(name, session)
        megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024 + 1000
        limits = ["-timeout=60", f"-rss_limit_mb={megabytes}", "-max_len=1000000"]
        atheris.Setup([sys.argv[0], *limits, *options, str(corpus)], read)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
