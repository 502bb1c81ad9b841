"""Summaries of functions and classes of Python: their first line from the rest of their docs."""

import ast
import functools
import warnings
import zipfile
from collections.abc import Sequence
from typing import Any

import joblib
from rouge_score.rouge_scorer import RougeScorer

from benchmarks import data
from benchmarks.tasks import Task
from benchmarks.tasks.shared.completion import Pair, Pairs, make_task

PACKAGES = """
jax 0.10.2 724d73c4678d8b06f6a6ab4db1b8a2fea8cd4f1e2c2564f99601634ec7b8d1c6
flax 0.12.8 807931d369cbc716fc447801ab39cd6c3c2614d573387a2319a028675dd34fe5
optax 0.2.8 e3ca2d36c99daab1800ae9dbc0545034382d6bc780b24d969e1b0df65fa31cb4
networkx 3.6.1 d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762
sympy 1.14.0 e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5
"""


def splits() -> dict[str, list[Pair]]:
    """Names with the bodies of their docstrings, and the first lines, divided by source file."""
    read: Any = joblib.Memory(data.folder(), verbose=0).cache(_read_all)
    divided = data.divide(read(PACKAGES), unit=lambda triple: triple[0])
    return {
        split: [(prompt, summary) for _, prompt, summary in part] for split, part in divided.items()
    }


def _read_all(packages: str) -> list[list[str]]:
    """File, prompt and summary of every docstring that has a body, each body and summary once."""
    print("Reading the docstrings of five packages, once", flush=True)
    triples, seen = [], set()
    for wheel in data.archives(packages):
        for path in sorted(wheel.namelist()):
            if not path.endswith(".py") or "/tests/" in path:
                continue
            for prompt, summary in _read(wheel, path):
                if prompt not in seen and summary not in seen:
                    seen |= {prompt, summary}
                    triples.append([path, prompt, summary])
    return triples


def _read(wheel: zipfile.ZipFile, path: str) -> list[Pair]:
    with warnings.catch_warnings():
        # Of other people's escapes.
        warnings.simplefilter("ignore")
        tree = ast.parse(wheel.read(path))
    pairs = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first, _, body = (ast.get_docstring(node) or "").partition("\n\n")
            summary = " ".join(first.split())
            if len(body.split()) >= 10 and 3 <= len(summary.split()) <= 12:
                # A model reads fewer tokens than these characters hold.
                body = " ".join(body.split())[:120]
                name = node.name.replace("_", " ").strip()
                pairs.append((f"{name}: {body}", summary))
    return pairs


@functools.cache
def load() -> Task:
    """Reads the docstrings."""
    # The target is what AdamW reached in a pilot of half the steps.
    fields = {"metric": "ROUGE-L", "higher_is_better": True, "target": 12.0}
    return make_task(Pairs(splits(), prompt=20, completion=14), score=score, **fields)


def score(found: Sequence[str], wanted: Sequence[str]) -> float:
    """The mean F-measure of ROUGE-L, from 0 to 100."""
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    scores = [scorer.score(*x)["rougeL"].fmeasure for x in zip(wanted, found, strict=True)]
    return 100 * sum(scores) / len(scores)
