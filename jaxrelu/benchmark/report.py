"""Tables and the picture of measurements."""

import io
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

__all__ = ["TITLES", "group", "plot_memory", "print_ratios", "print_tables", "value"]

Record = Mapping[str, Any]
Rows = Mapping[tuple[Any, ...], Mapping[str, Record]]
# measurements that agree in these fields share a row of a table
KEYS = ("device", "what", "network", "activation", "dtype", "size")
PIPED = 80  # the width of what goes to a file or a pipe
# each kind of measurement has a table of its own
TITLES = {
    "memory": "temporary memory of a gradient or training step, in MiB",
    "peak": "memory that a run adds to the device's peak, in MiB",
    "resident": "growth of the process's peak memory by a training step, in MiB",
    "saved": "memory that PyTorch saves for the backward pass, in MiB",
    "forward": "time of a call",
    "gradient": "time of a call and its gradient",
    "inplace": "time of a call in place",
    "expm1": "time of elu",
    "exp": "time of elu's derivative times a gradient",
    "eager": "time of a call outside jit",
    "step": "time of an Adam step",
    "observed 1/1": "time of an Adam step under diagnostics.observe",
    "observed 1/20": "time of 20 Adam steps, one of them under diagnostics.observe",
    "import": "time of an import",
}
# what a name in a table means; a table is followed by those that it uses
_TERMS = {
    "residual": "an mlp with a sum around each layer",
    "blocks": "an mlp with each layer jitted by itself",
    "checkpoint": "an mlp with each layer under jax.checkpoint(dots_saveable)",
    "scan": "an mlp as lax.scan over its layers",
    "vmapped": "an mlp under jax.vmap over the examples",
    "gelu": "an mlp with jax.nn.gelu in place of the activation, also under jaxrelu",
    "autoencoder": "an autoencoder of one hidden layer, 4 times as wide as its input",
    "conv": "convolutions with a bias",
    "conv_norm": "convolutions with BatchNorm",
    "mobilenet": "MobileNetV2's blocks",
    "unet": "a U-Net with GroupNorm",
    "linen": "an Adam step of the mlp in Flax linen",
    "nnx": "an Adam step of the mlp in Flax nnx",
    "elu_output": 'elu(save="output")',
    "jax.nn": "the same with jax.nn's function, or Flax's for prelu",
    "lean": "as jax.nn, under jaxrelu.memory.lean",
    "floor": "the same without an activation",
    "copy": "a copy of the array, by NumPy on the CPU",
    "torch": "PyTorch",
    "polynomial": "jaxrelu's own formula of exp and expm1",
    "jnp": "jnp.exp and jnp.expm1",
    "spread": "the interquartile range of the time before it",
    "+ckpt": "as jax.nn, with each layer under jax.checkpoint(dots_saveable)",
    "fusions": "kernels that the compiler merged from several operations: with jaxrelu, with jax.nn",
}


def value(record: Record) -> float:
    """Returns what was measured, in seconds or bytes."""
    return record["median_s"] if "median_s" in record else record["temp_bytes"]


def group(records: Iterable[Record]) -> dict[tuple[Any, ...], dict[str, Record]]:
    """Returns the records by the values of KEYS, then by peer; a later record replaces an earlier one."""
    rows: dict[tuple[Any, ...], dict[str, Record]] = {}
    for record in records:
        rows.setdefault(tuple(record[key] for key in KEYS), {})[record["peer"]] = record
    return rows


def print_tables(records: Sequence[Record]) -> bool:
    """Prints the tables, of at most 80 columns if they go to a file or a pipe; returns whether there is any."""
    # without markup, as which rich would read a device's name in brackets
    width = None if sys.stdout.isatty() else PIPED
    console = Console(file=sys.stdout, width=width, markup=False, emoji=False, highlight=False)
    rows = group(records)
    tables: dict[tuple[str, str, str | None], list[dict[str, str]]] = {}
    for key, peers in rows.items():
        figures = _figures(key, peers, rows)
        if any(figures.values()) and (key[3] or key[1] == "import"):
            names = {"network": key[2] or "", "activation": key[3] or "", "size": _size(key[5])}
            tables.setdefault((key[0], key[1], key[4]), []).append(names | figures)
    devices, kinds = [key[0] for key in rows], [*TITLES]
    for device, what, dtype in sorted(tables, key=lambda table: (devices.index(table[0]), kinds.index(table[1]))):
        _print(console, f"{TITLES[what]}: {', '.join(filter(None, (device, dtype)))}", tables[device, what, dtype])
    dated = {f"{r['date'][:10]}: " + " ".join(f"{k} {v}" for k, v in r["versions"].items()) for r in records}
    for line in sorted(dated) if tables else ():
        console.print(line)
    return bool(tables)


def _print(console: Console, title: str, rows: list[dict[str, str]]) -> None:
    """Prints rows, which map headings to cells, in as many tables as the width needs, and what their terms mean."""
    names = [name for name in ("network", "activation", "size") if any(row[name] for row in rows)]
    varying = [name for name in names if len({row[name] for row in rows}) > 1]
    figures = [name for name in rows[0] if name not in KEYS and any(row[name] for row in rows)]
    constants = [rows[0][name] + " elements" * (name == "size") for name in names if name not in varying]

    def width(columns: list[str]) -> int:
        cells = ([name, *(row[name] for row in rows)] for name in columns)
        return sum(1 + max(len(line) for text in column for line in text.split("\n")) for column in cells) - 1

    parts: list[list[str]] = []
    for name in figures:
        if not parts or width([*varying, *parts[-1], name]) > console.width:
            parts.append([])
        parts[-1].append(name)
    for part in parts:
        console.print(", ".join([title, *constants, *["continued"] * (part is not parts[0])]), end="\n\n")
        table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
        for name in (*varying, *part):
            # folded if one column alone is wider than the terminal
            table.add_column(name, justify="left" if name in varying else "right", vertical="bottom", overflow="fold")
        shown = [row for row in rows if any(row[name] for name in part)]
        for row, following in zip(shown, [*shown[1:], shown[-1]], strict=True):
            last = "activation" in varying and row["network"] != following["network"]
            table.add_row(*(row[name] for name in (*varying, *part)), end_section=last)
        console.print(table)
        used = {*part, *(row[name] for row in shown for name in names)}
        terms = [f"{term}: {meaning}" for term, meaning in _TERMS.items() if term in used]
        console.print("", *terms, *[""] * bool(terms), sep="\n")


def _beside(key: tuple[Any, ...], peers: Mapping[str, Record], rows: Rows) -> dict[str, Record | None]:
    """Returns by heading what a row measured, and then what it is compared with."""
    plain = rows.get((key[0], "forward", *key[2:]), {})
    copy = {"copy": plain.get("copy"), "torch": peers.get("torch")}
    if key[1] == "inplace":
        return {"in place": peers.get("jaxrelu"), "not in place": plain.get("jaxrelu"), **copy}
    if key[1] == "import":
        return {"jaxrelu": peers.get("jaxrelu"), "jax": peers.get("jax")}
    if key[1].startswith("observed"):
        return {"observed": peers.get("jaxrelu"), "not observed": peers.get("step")}
    if key[1] in ("expm1", "exp"):
        return {"polynomial": peers.get("polynomial"), "jnp": peers.get("jnp")}
    floor = peers.get("identity", rows.get((*key[:3], None, *key[4:]), {}).get("identity"))
    return {"jaxrelu": peers.get("jaxrelu"), "jax.nn": _reference(peers), "floor": floor, **copy}


def _reference(peers: Mapping[str, Record]) -> Record | None:
    return peers.get("flax", peers.get("jax.nn"))


def _figures(key: tuple[Any, ...], peers: Mapping[str, Record], rows: Rows) -> dict[str, str]:
    """Returns the cells of a row after its names, by heading."""
    (ours, first), *others = _beside(key, peers, rows).items()
    cells = {ours: _figure(first), "spread": _seconds(first["spread"]) if first and first["spread"] is not None else ""}
    for name, record in others:
        cells |= {name: _figure(record), f"{ours}/\n{name}": _ratio(first, record)}
    lean = peers.get("lean")
    cells |= {"lean": _figure(lean), "lean/\njax.nn": _ratio(lean, _reference(peers))}
    expert = next((record for peer, record in peers.items() if peer.endswith("+checkpoint")), None)
    fusions = [str(r["fusions"]) for r in (first, *(record for _, record in others[:1])) if r and "fusions" in r]
    return cells | {"+ckpt": _figure(expert), "fusions": ", ".join(fusions)}


def print_ratios(records: Iterable[Record]) -> None:
    """Prints a table of memory in Markdown: for each network that with jaxrelu, and under lean, divided by jax.nn's.

    Of each device and dtype the table has the first activation that was measured there.
    """
    columns: dict[tuple[str, str], dict[str, str]] = {}
    first: dict[tuple[str, str], str] = {}
    for key, peers in group(records).items():
        place, reference = (key[0], key[4]), _reference(peers)
        if key[1] == "memory" and reference and first.setdefault(place, key[3]) == key[3]:
            ratios = [_ratio(peers.get(peer), reference).removeprefix("0") for peer in ("jaxrelu", "lean")]
            columns.setdefault(place, {})[key[2]] = " / ".join(filter(None, ratios))
    # the last word of "h200 cuBLAS, compiled ahead of time", and "f32" for float32, so that the table is narrow
    heads = [f"{device.split(',')[0].split()[-1]} {_SHORT.get(dtype, dtype)}" for device, dtype in columns]
    table = [["jaxrelu / lean", *heads], ["---"] * (1 + len(heads))]
    for network in dict.fromkeys(name for column in columns.values() for name in column):
        table.append([network, *(column.get(network, "") for column in columns.values())])
    for cells in table:
        print(f"| {' | '.join(cells)} |")


_SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def _size(size: int | None) -> str:
    if not size:
        return ""
    return f"2^{size.bit_length() - 1}" if size >= 1024 and not size & (size - 1) else str(size)


def _figure(record: Record | None) -> str:
    if record is None:
        return ""
    mebibytes = record.get("temp_bytes", 0) / 2**20
    return _seconds(record["median_s"]) if "median_s" in record else f"{mebibytes:.{1 if mebibytes >= 10 else 3}f}"


def _seconds(t: float) -> str:
    scale, unit = next(((s, u) for s, u in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")) if t >= s), (1e-9, "ns"))
    return f"{t / scale:.3g} {unit}"


def _ratio(a: Record | None, b: Record | None) -> str:
    return f"{value(a) / value(b):.2f}" if a and b and value(b) else ""


# colours of Okabe and Ito, which people with any kind of colour vision can tell apart
_BARS = (("jax.nn (Flax for prelu)", "#E69F00"), ("jaxrelu", "#0072B2"), ("jax.nn under lean", "#009E73"))


def plot_memory(records: Sequence[Record], path: Path) -> None:
    """Draws the memory of each network, in one panel per device, for the first activation and dtype measured there.

    Devices on which one network was measured share a panel.

    Args:
        records: measurements.
        path: the PNG file to write.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = {key: peers for key, peers in group(records).items() if key[1] == "memory"}
    panels: dict[str, dict[str, list[Record | None]]] = {}
    # a run that was interrupted may have measured a network without activations only
    for device in dict.fromkeys(key[0] for key in rows if key[3]):
        same = next(key[3:] for key in rows if key[0] == device and key[3])
        chosen = {key: peers for key, peers in rows.items() if key[0] == device and key[3:] == same}
        groups = {key[2]: [_reference(peers), peers.get("jaxrelu"), peers.get("lean")] for key, peers in chosen.items()}
        title = f"{same[0]}, {same[1]}, {_size(same[2])} elements"
        if len(groups) == 1:
            [(network, bars)] = groups.items()
            panels.setdefault(f"{network}, {title}", {})[textwrap.fill(device, 20)] = bars
        else:
            panels[f"{textwrap.fill(device, 50)}\n{title}"] = groups
    columns: list[list[str]] = [[], []][: len(panels)]
    for title in panels:
        min(columns, key=lambda column: sum(2 + len(panels[above]) for above in column)).append(title)
    tallest = max(sum(2 + len(panels[title]) for title in column) for column in columns)
    figure = plt.figure(figsize=(5.2 * len(columns), 1 + 0.4 * tallest), layout="constrained")
    for part, column in zip(figure.subfigures(1, len(columns), squeeze=False)[0], columns, strict=True):
        heights = [2 + len(panels[title]) for title in column]
        axes = part.subplots(len(column), height_ratios=heights, squeeze=False)[:, 0]
        for axis, title in zip(axes, column, strict=True):
            for i, (label, color) in enumerate(_BARS):
                bars = [
                    (n + 0.28 * (i - 1), value(r) / 2**20, _ratio(r, found[0]) if i else "")
                    for n, found in enumerate(panels[title].values())
                    if (r := found[i])
                ]
                axis.barh([y for y, *_ in bars], [size for _, size, _ in bars], 0.26, color=color, label=label)
                for y, size, ratio in bars:
                    axis.text(size, y, f" {ratio}", va="center", fontsize=7)
            axis.set_yticks(range(len(panels[title])), list(panels[title]), fontsize=9)
            axis.set_ylim(len(panels[title]) - 0.4, -0.6)
            axis.margins(x=0.1)  # room for the ratio beside the longest bar
            axis.set_title(title, fontsize=9, loc="left")
            axis.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    title = "Temporary memory of one gradient or training step, in MiB\nbeside a bar: its memory divided by jax.nn's"
    figure.suptitle(title, fontsize=10)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150)
    plt.close(figure)
    try:
        path.write_bytes(picture.getvalue())
    except OSError as error:
        error.filename = str(path)  # writing does not name it
        if path.is_file():
            path.unlink()  # half a picture
        raise
