"""Writes results into README.md and benchmarks/README.md: `python -m benchmarks.tables`.

What a marker names stands between it and its end: `<!-- range -->` ... `<!-- /range -->`, or
`<!-- / -->` for short. Tables get lines of their own; all else stays within its line, which must
not begin with a marker, for then Markdown takes the line for HTML.
"""

import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.commands.range import extents
from benchmarks.optimizers import is_ours
from benchmarks.show import markdown
from benchmarks.sweep.sizes import moves
from benchmarks.sweep.standings import judge, mean_table, means, verdicts

ROOT = pathlib.Path(__file__).parents[1]
FILES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
RESULTS = ROOT / "benchmarks" / "results" / "cpu-2-cores"
_MARKED = re.compile(r"(<!-- ([^\n/>][^\n>]*) -->).*?(<!-- /(?:\2)? -->)", re.DOTALL)


def main() -> None:
    """Writes the files anew."""
    found = texts()
    for path in FILES:
        path.write_text(filled(path.read_text(), found))


def filled(document: str, found: Mapping[str, str]) -> str:
    """A document with what its markers name between them."""

    def written(match: re.Match[str]) -> str:
        start, name, end = match.groups()
        if name not in found:
            raise KeyError(f"the results hold no {name!r}")
        space = "\n\n" if "\n" in found[name] else ""
        return f"{start}{space}{found[name]}{space}{end}"

    return _MARKED.sub(written, document)


def texts() -> dict[str, str]:
    """All that markers can name, in Markdown; what a sweep found begins with its folder's name."""
    found = _magnitudes(_read(RESULTS / "range.json")["norms"])
    for path in sorted(RESULTS.glob("*/compare.json")):
        found |= _compared(path.parent.name, _read(path))
    for path in sorted(RESULTS.glob("*/transfer.json")):
        found |= _transferred(path.parent.name, _read(path))
    for entry in map(json.loads, (RESULTS / "train" / "metrics.jsonl").read_text().splitlines()):
        if entry["kind"] == "result":
            found[f"train/{entry['optimizer']}"] = f"{entry['test']:.3g}"
    found["lower"] = _received(_read(RESULTS.parent / "compiled" / "lower.json")["results"])
    return found | _timed(_read(RESULTS / "speed.json")["results"])


def _read(path: pathlib.Path) -> Any:
    return json.loads(path.read_text())


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return markdown(heads, rows).strip()


def _magnitudes(norms: Any) -> dict[str, str]:
    names = [name for name in next(iter(norms.values())) if name != "elements"]
    rows = extents(norms)
    table = _table(["dtype", *(f"`{x}`" for x in names)], rows)
    cells = {f"range/{x}/{name}": y for x, *own in rows for name, y in zip(names, own, strict=True)}
    return {"range": table, **cells}


def _compared(sweep: str, results: Any) -> dict[str, str]:
    def outcomes(*names: str) -> str:
        own = [verdict.outcome for x in results.values() if (verdict := judge(x, *names))]
        counts = [f"{x} on {own.count(x)}" for x in ("better", "level", "worse")]
        return f"{', '.join(counts)} of {len(own)} tasks"

    found = {
        sweep: verdicts(results).strip(),
        f"{sweep}/means": mean_table(results).strip(),
        f"{sweep}/untuned": outcomes("unit_muon_untuned"),
        f"{sweep}/decay": outcomes("unit_muon_decay"),
        f"{sweep}/untuned/adamw": outcomes("unit_muon_untuned", "adamw"),
        f"{sweep}/matched": outcomes("unit_muon", "muon_matched"),
        f"{sweep}/keep_norm": outcomes("unit_muon_keep_norm", "unit_muon_decay"),
    }
    for name, metrics in means(results).items():
        own = {x: _place(result, name) for x, result in results.items() if _place(result, name)}
        found[f"{sweep}/near/{name}"] = f"{sum(place['near'] for place in own.values()):g}"
        found[f"{sweep}/diverged/{name}"] = str(sum(place["diverged"] for place in own.values()))
        # On how many tasks unit_muon loses less from training to test.
        less = [_lost(results[x], "unit_muon") < _lost(results[x], name) for x in own]
        found[f"{sweep}/keeps/{name}"] = f"{sum(less)} of {len(less)}"
        found |= {f"{sweep}/{task}/{name}": mean for task, mean in metrics.items()}
    return found


def _place(result: Any, name: str) -> Any:
    return next((place for place in result["standings"] if place["optimizer"] == name), None)


def _lost(result: Any, name: str) -> float:
    """By how much the metric is worse on the test split than in training."""
    place = _place(result, name)
    gap = math.nan if place is None or place["gap"] is None else place["gap"]
    return gap if result["higher_is_better"] else -gap


def _transferred(sweep: str, results: Any) -> dict[str, str]:
    found = {sweep: moves(results).strip()}
    for family, optimizers in results.items():
        for name, own in optimizers.items():
            rates = [best["learning_rate"] for best in own.values()]
            found[f"{sweep}/{family}/{name}"] = f"{max(rates) / min(rates):.1f}"
            found[f"{sweep}/{family}/{name}/rates"] = f"{min(rates):.2g} to {max(rates):.2g}"
            for size, best in own.items():
                found[f"{sweep}/{family}/{name}/{size}"] = f"{best['loss']:.3g}"
    return found


def _received(results: Any) -> str:
    """What devices receive and compute for orthogonal matrices."""
    names = ["orthogonalize()", "optax.contrib.scale_by_muon(beta=0)", "optax.contrib.muon(0.02)"]

    def cell(row: Any) -> str:
        gigabytes, ratio = row["wire_bytes"] / 1e9, row["wire_ratio"]
        return f"{gigabytes:.1f}, {ratio:.{0 if ratio > 10 else 1}f}, {row['products']:.2f}"

    rows = [[topology, *(cell(own[name]) for name in names)] for topology, own in results.items()]
    return _table(["GB, over kernels, products", *(f"`{name}`" for name in names)], rows)


def _timed(parts: Any) -> dict[str, str]:
    def seconds(row: Any) -> float:
        return row["seconds"]["median"]

    def compiling(row: Any) -> float:
        return row["trace_seconds"] + row["compile_seconds"]

    found = {"speed/leaves": _ratios(parts.get("leaves", ()), ["leaves"], seconds, compiling)}
    for scope in ("leaf", "global"):
        rows = [row for row in parts.get("transformation", ()) if row["scope"] == scope]
        found[f"speed/{scope}"] = _ratios(rows, ["model", "dtype"], seconds)
    for row in parts.get("training", ()):
        found[f"training/{row['name']}"] = f"{100 * row['ratio']['median']:.1f} %"
    return found


def _ratios(rows: Any, keys: Sequence[str], *values: Callable[[Any], float]) -> str:
    """What `unit_scale` takes over what others of its scope take; "-" where one was not timed."""
    scopes = {row["name"]: row["scope"] for row in rows}
    ours = {scope: name for name, scope in scopes.items() if is_ours(name)}
    others = [name for name, scope in scopes.items() if scope in ours and not is_ours(name)]
    timed: dict[str, Any] = {}
    for row in rows:
        if "seconds" in row:
            timed.setdefault(" ".join(str(row[key]) for key in keys), {})[row["name"]] = row

    def cell(own: Any, other: str) -> str:
        pair = own.get(ours[scopes[other]]), own.get(other)
        return ", ".join(f"{x(pair[0]) / x(pair[1]):.2f}" for x in values) if all(pair) else "-"

    lines = [[key, *(cell(own, other) for other in others)] for key, own in timed.items()]
    return _table([" ".join(keys), *(f"`{other}`" for other in others)], lines)


if __name__ == "__main__":
    main()
