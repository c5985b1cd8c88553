"""The summary of a report as text."""

from scripts.report.page import TableRow


def format_table(columns: list[str], table: list[TableRow]) -> str:
    """The table as text, in per cent."""
    wide, first = max(len(name) for name in columns), max(14, *(len(row["name"]) for row in table))
    lines = [f"{'accuracy in %':<{first}} {'number':>7}  " + "  ".join(f"{name:>{wide}}" for name in columns)]
    for before, row in zip([table[0], *table], table, strict=False):
        if row["group"] != before["group"]:
            lines.append("")
        cells = "  ".join(f"{100 * score:>{wide}.1f}" for score in row["scores"])
        lines.append(f"{row['name']:<{first}} {row['count']:>7}  {cells}")
    return "\n".join(lines)
