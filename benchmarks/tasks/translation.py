"""Translation of programs' messages from English to French, from their gettext catalogs."""

import functools
import gettext
import io
import re
from collections.abc import Sequence

import sacrebleu

from benchmarks import data
from benchmarks.tasks import Task
from benchmarks.tasks.shared.completion import Pair, Pairs, make_task

PACKAGES = """
jupyterlab-language-pack-fr-FR 4.5.post3
    9f6ce9d4e64b367ff084a2313af29d6ad8a02d1d08000f3e6c53e2856fa9a11f
Trac 1.6 5ff2f3394ebee7cc5b8ee465871cfdecb78ee492a74215b47b6d9ddbcc93b5f7
django-allauth 65.21.1 7bdf018c9f3f0a32c80677f84e7777272d9c833b180bd6734314c4831c802a9e
"""


def splits() -> dict[str, list[Pair]]:
    """Messages of two to twelve words and their translations, divided by what the message says."""
    pairs: dict[str, Pair] = {}
    for wheel in data.archives(PACKAGES):
        for name in sorted(wheel.namelist()):
            if re.search(r"/fr(_FR)?/LC_MESSAGES/.*\.mo$", name):
                for pair in _read(wheel.read(name)):
                    pairs.setdefault(_saying(pair), pair)
    return data.divide(pairs.values(), _saying)


def _read(catalog: bytes) -> list[Pair]:
    pairs = []
    for key, translation in vars(gettext.GNUTranslations(io.BytesIO(catalog)))["_catalog"].items():
        # A message with a plural comes with the number of its form; a context goes before \x04.
        message, form = key if isinstance(key, tuple) else (key, 0)
        source, target = (" ".join(x.split()) for x in (message.split("\x04")[-1], translation))
        if form == 0 and source != target and 2 <= len(source.split()) <= 12:
            pairs.append((source, target))
    return pairs


def _saying(pair: Pair) -> str:
    """The words of a message: "Reset all…" and "Reset All" are no two sources."""
    return " ".join(re.findall(r"\w+", pair[0].lower()))


@functools.cache
def load() -> Task:
    """Reads the catalogs."""
    # The target is what AdamW reached in a pilot of half the steps.
    fields = {"metric": "chrF", "higher_is_better": True, "target": 15.0}
    return make_task(Pairs(splits(), prompt=18, completion=22), score=score, **fields)


def score(found: Sequence[str], wanted: Sequence[str]) -> float:
    """The chrF of all as one corpus, from 0 to 100."""
    return sacrebleu.corpus_chrf(found, [wanted]).score
