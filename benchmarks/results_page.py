"""The tables and the plot of RESULTS.md, made from the rows that ``run_all.py`` keeps.

What stands between the two marker lines is written anew; the text around it is ours.
"""

from pathlib import Path
from typing import Any

from benchmarks.targets import TARGETS
from data.errors import DataError
from data.files import open_atomic

BEGIN = "<!-- run_all.sh writes from here on -->"
END = "<!-- to here -->"
PLOT = "scaling.png"
SECTIONS = {
    "steps": "Training and inference",
    "decoding": "Decoding",
    "data": "Data pipelines, one core",
    "checkpoints": "Checkpoints",
    "forecast": "Forecast: predicted (ours) beside measured",
}
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
ON_CPU_ONLY = ("data",)
NOT_MEASURED = "not measured"

Results = dict[str, dict[str, Any]]


def update_page(path: Path, results: Results) -> None:
    """Write the generated part of the page, and the plot beside it where there are curves.

    Args:
        path: of RESULTS.md.
        results: device -> content of its file of rows.

    Raises:
        DataError: the page lacks the marker lines.
    """
    text = path.read_text(encoding="utf-8")
    if any(content["curves"] for content in results.values()):
        draw_curves(path.with_name(PLOT), results)
    before, marker, rest = text.partition(BEGIN)
    _, other, after = rest.partition(END)
    if not (marker and other):
        raise DataError(f"{path} has no lines {BEGIN} and {END}: put both where the tables are to stand")
    with open_atomic(path) as file:
        file.write(f"{before}{BEGIN}\n\n{render(results)}\n{END}{after}")


def render(results: Results) -> str:
    """The generated part, Markdown."""
    lines = ["## All benchmarks in one run", ""]
    if not results:
        return "\n".join(
            [*lines, f"{NOT_MEASURED.capitalize()} yet: `bash benchmarks/run_all.sh` writes this part.", ""]
        )
    lines += [
        "`bash benchmarks/run_all.sh`. Medians of calls in turns; a step comes after an untimed one of the same side,",
        "and so finds memory as that left it. A ratio above 1 says how many times faster ours is.",
        "Outputs are compared before anything is timed. Memory: at most of the process or GPU, beyond what was there",
        "before (adaptive rows: what autograd keeps). Of peak: useful FLOPs over what a matrix product reaches there.",
        "",
    ]
    for device, content in results.items():
        for number, run in enumerate(content["runs"]):
            lines.append(f"- **{run_name(device, number)}**: {describe_run(run)}")
    lines += ["", "### Targets", "", *targets_table(results)]
    for section, title in SECTIONS.items():
        lines += ["", f"### {title}", "", *table(section, results)]
    lines += [
        "",
        "### Scaling",
        "",
        *curve_table(results),
        "",
        "### How each was measured",
        "",
        *settings_table(results),
    ]
    return "\n".join([*lines, ""])


def run_name(device: str, number: int) -> str:
    """Such as ``CPU 1``."""
    return f"{DEVICES[device]} {number + 1}"


def describe_run(run: dict[str, Any]) -> str:
    """Machine, versions, commit and date in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    machine = f"{run['gpu']}, " if run["gpu"] else ""
    machine += f"{run['processor']}, {run['threads']} of {run['cores']} cores, {run['memory_gib']} GiB"
    peak = f"a {run['peak_dtype']} matrix product reaches {run['peak_tflops']:.3g} TFLOP/s"
    return f"{machine}; {peak}; commit {run['commit']}, {run['date']}; {versions}."


def table(section: str, results: Results) -> list[str]:
    """Rows of one section, a group of columns for each device."""
    devices = [device for device in DEVICES if device == "cpu" or section not in ON_CPU_ONLY]
    rows = {device: {row["what"]: row for row in _entries(results, device, "rows", section)} for device in devices}
    names = list(dict.fromkeys(name for found in rows.values() for name in found))
    if not names:
        return [f"{NOT_MEASURED.capitalize()}."]
    columns = [("ours", _ours), ("peer", _peer), ("ratio", _ratio)]
    everything = [row for found in rows.values() for row in found.values()]
    if any(row["ours_mib"] is not None for row in everything):
        columns.append(("memory: ours, peer", _memory))
    if any(row["utilisation"] is not None for row in everything):
        columns.append(("of peak", _utilisation))
    head = ["", "peer"]
    for device in devices:
        head += [f"{DEVICES[device]}: {columns[0][0]}", *(title for title, _ in columns[1:])]
    lines = [_line(head), _line(["---"] * len(head))]
    for name in names:
        cells = [name, next(found[name]["peer_name"] for found in rows.values() if name in found) or "–"]
        for device in devices:
            row = rows[device].get(name)
            cells += [cell(row) for _, cell in columns] if row else [NOT_MEASURED, *[""] * (len(columns) - 1)]
        lines.append(_line(cells))
    return lines


def targets_table(results: Results) -> list[str]:
    """What was aimed at beside what was measured."""
    lines = [_line(["", "beside", "device", "target", "measured", "met"]), _line(["---"] * 6)]
    for target in TARGETS:
        row = next((r for r in _entries(results, target.device, "rows") if r["what"] == target.what), None)
        found = row and target.found(row)
        cells = [target.what, (row and row["peer_name"]) or "–", DEVICES[target.device], target.wanted()]
        lines.append(
            _line([*cells, found or NOT_MEASURED, ("yes" if target.is_met(row) else "**no**") if found else ""])
        )
    return lines


def curve_table(results: Results) -> list[str]:
    """Values and exponents of all curves, and the plot."""
    lines = [_line(["", "device", "at", "ours", "peer", "exponent: ours, peer"]), _line(["---"] * 6)]
    names = list(dict.fromkeys(c["what"] for device in DEVICES for c in _entries(results, device, "curves")))
    if not names:
        return [f"{NOT_MEASURED.capitalize()}."]
    for name in names:
        for device in DEVICES:
            curve = next((c for c in _entries(results, device, "curves") if c["what"] == name), None)
            if curve is None:
                lines.append(_line([name, DEVICES[device], NOT_MEASURED, "", "", ""]))
                continue
            peer = "–" if not curve["peer_name"] else curve["state"]
            if curve["peer"] is not None:
                peer = f"{curve['peer_name']}: {_series(curve['peer'])}"
            slopes = [curve.get(f"{side}_exponent") for side in ("ours", "peer")]
            lines.append(
                _line(
                    [name, DEVICES[device], f"{', '.join(f'{x:g}' for x in curve['x'])} {curve['axis']}"]
                    + [_series(curve["ours"]), peer, ", ".join(f"{slope:.2f}" for slope in slopes if slope is not None)]
                )
            )
    note = "An exponent of 1 says that twice as much takes twice as long, one of 0 that it takes no longer."
    return [*lines, "", note, "", f"![Times over length, batch, image size and processes]({PLOT})"]


def settings_table(results: Results) -> list[str]:
    """Sizes, what was checked, load, run and command of every row and curve."""
    head = ["", "run", "setting", "checked", "load before, after", "command"]
    lines = [_line(head), _line(["---"] * len(head))]
    for device in results:
        for entry in (*_entries(results, device, "rows"), *_entries(results, device, "curves")):
            load = f"{entry['load_before']:.1f}, {entry['load_after']:.1f}"
            command = f"`python benchmarks/{entry['command']}`"
            cells = [entry["what"], run_name(device, entry["run"]), entry["setting"], entry["check"], load, command]
            lines.append(_line(cells))
    return lines


def draw_curves(path: Path, results: Results) -> None:
    """One panel a curve, both axes logarithmic, ours and the peer on each device."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    found = [(device, curve) for device in DEVICES for curve in _entries(results, device, "curves")]
    names = list(dict.fromkeys(curve["what"] for _, curve in found))
    figure, axes = pyplot.subplots(1, len(names), figsize=(3.1 * len(names), 2.8), squeeze=False)
    for panel, name in zip(axes[0], names, strict=True):
        for device, curve in found:
            if curve["what"] == name:
                colour, peer_colour = ("tab:blue", "tab:orange") if device == "cpu" else ("tab:green", "tab:red")
                panel.plot(curve["x"], curve["ours"], "o-", color=colour, label=f"ours, {DEVICES[device]}")
                if curve["peer"] is not None:
                    label = f"{curve['peer_name']}, {DEVICES[device]}"
                    panel.plot(curve["x"], curve["peer"], "s--", color=peer_colour, label=label)
                panel.set_xlabel(curve["axis"])
                panel.set_xticks(curve["x"], [f"{x:g}" for x in curve["x"]])
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xticks(sorted({x for _, c in found if c["what"] == name for x in c["x"]}))
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_title(name, fontsize=9)
        panel.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def seconds(value: float) -> str:
    """With a unit that suits it."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def _series(values: list[float]) -> str:
    return ", ".join(seconds(value) for value in values)


def _entries(results: Results, device: str, kind: str, section: str | None = None) -> list[dict[str, Any]]:
    entries = results[device][kind] if device in results else []
    return [entry for entry in entries if section is None or entry["section"] == section]


def _ours(row: dict[str, Any]) -> str:
    rate = f" ({1 / row['ours']:,.0f} a second)" if row["section"] == "data" else ""
    return seconds(row["ours"]) + rate


def _peer(row: dict[str, Any]) -> str:
    if not row["peer_name"]:
        return "–"
    return row["state"] if row["peer"] is None else seconds(row["peer"])


def _ratio(row: dict[str, Any]) -> str:
    return "" if row["ratio"] is None else f"**{row['ratio']:.2f}**"


def _memory(row: dict[str, Any]) -> str:
    sides = [f"{row[f'{side}_mib']:,.0f}" for side in ("ours", "peer") if row[f"{side}_mib"] is not None]
    return f"{', '.join(sides)} MiB" if sides else ""


def _utilisation(row: dict[str, Any]) -> str:
    return "" if row["utilisation"] is None else f"{100 * row['utilisation']:.0f} %"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
