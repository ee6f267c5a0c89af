"""Tables and the picture of measurements."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

__all__ = ["group", "plot_memory", "print_tables", "value"]

Record = Mapping[str, Any]
# measurements that agree in these fields share a row of a table
KEYS = ("device", "what", "network", "activation", "dtype", "size")
WIDTH = 150
MEMORY = ("memory", "peak", "resident")
TIME = ("forward", "gradient", "inplace", "expm1", "exp", "eager", "step", "observed 1/1", "observed 1/20", "import")


def value(record: Record) -> float:
    """Returns what was measured, in seconds or bytes."""
    return record["median_s"] if "median_s" in record else record["temp_bytes"]


def group(records: Iterable[Record]) -> dict[tuple[Any, ...], dict[str, Record]]:
    """Returns the records by the values of KEYS, then by peer; a later record replaces an earlier one."""
    rows: dict[tuple[Any, ...], dict[str, Record]] = {}
    for record in records:
        rows.setdefault(tuple(record[key] for key in KEYS), {})[record["peer"]] = record
    return rows


def print_tables(records: Sequence[Record]) -> None:
    """Prints a table of memory and one of time for each device, of the same width on a terminal and in a file."""
    console = Console(file=sys.stdout, width=WIDTH)
    rows = group(records)
    for device in dict.fromkeys(key[0] for key in rows):
        here = {key: peers for key, peers in rows.items() if key[0] == device}
        for title, kinds, columns, fill in (
            ("memory", MEMORY, _MEMORY_COLUMNS, _memory_row),
            ("time", TIME, _TIME_COLUMNS, _time_row),
        ):
            chosen = {key: here[key] for key in here if key[1] in kinds and (key[3] or key[1] == "import")}
            chosen = dict(sorted(chosen.items(), key=lambda item: kinds.index(item[0][1])))
            if chosen:
                console.print(_table(f"{title}, {device}", columns, chosen, fill, rows))
    for line in sorted({f"{r['date'][:10]}: " + " ".join(f"{k} {v}" for k, v in r["versions"].items()) for r in records}):
        console.print(line, soft_wrap=True, highlight=False)


Rows = Mapping[tuple[Any, ...], Mapping[str, Record]]
_MEMORY_COLUMNS = ("jaxrelu", "reference", "ratio", "floor", "ratio", "+checkpoint", "torch saves", "fusions")
_TIME_COLUMNS = ("jaxrelu", "spread", "reference", "ratio", "copy", "ratio", "torch", "ratio", "+checkpoint", "floor")


def _table(title: str, columns: Sequence[str], chosen: Rows, fill: Callable[..., list[str]], rows: Rows) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("what", "activation", "dtype", "size"):
        table.add_column(name, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    before = None
    for key, peers in chosen.items():
        _, what, network, activation, dtype, size = key
        if before not in (None, (what, network)):
            table.add_section()
        before = (what, network)
        name = network if what == "memory" else f"{what} {network}" if what in ("peak", "step") else what
        cells = [name, activation or "", dtype or "", _size(size)]
        table.add_row(*cells, *fill(key, peers, rows))
    return table


def _memory_row(key: tuple[Any, ...], peers: Mapping[str, Record], rows: Rows) -> list[str]:
    ours, reference = peers.get("jaxrelu"), _reference(peers)
    floor = rows.get((*key[:3], None, *key[4:]), {}).get("identity", peers.get("identity"))
    torch = rows.get((key[0], "saved", *key[2:]), {}).get("torch") if key[1] == "memory" else None
    fusions = [str(r["fusions"]) for r in (ours, reference) if r and "fusions" in r]
    return [
        _bytes(ours),
        _bytes(reference),
        _ratio(ours, reference),
        _bytes(floor),
        _ratio(ours, floor),
        _bytes(_expert(peers)),
        _bytes(torch),
        " to ".join(fusions),
    ]


def _time_row(key: tuple[Any, ...], peers: Mapping[str, Record], rows: Rows) -> list[str]:
    ours, reference = peers.get("jaxrelu", peers.get("polynomial")), _reference(peers)
    forward = rows.get((key[0], "forward", *key[2:]), {})
    copy = forward.get("copy")
    if key[1] == "inplace":  # compared with the call that is not in place
        reference = forward.get("jaxrelu")
    elif key[1] == "import":
        reference = peers.get("jax")
    elif "step" in peers:  # the steps without observe
        reference = peers["step"]
    torch = peers.get("torch")
    return [
        _seconds(value(ours)) if ours else "",
        _seconds(ours["spread"]) if ours else "",
        _seconds(value(reference)) if reference else "",
        _ratio(ours, reference),
        _seconds(value(copy)) if copy else "",
        _ratio(ours, copy),
        _seconds(value(torch)) if torch else "",
        _ratio(ours, torch),
        _seconds(value(expert)) if (expert := _expert(peers)) else "",
        _seconds(value(peers["identity"])) if "identity" in peers else "",
    ]


def _reference(peers: Mapping[str, Record]) -> Record | None:
    return next((peers[name] for name in ("flax", "jax.nn", "jnp") if name in peers), None)


def _expert(peers: Mapping[str, Record]) -> Record | None:
    return next((record for peer, record in peers.items() if peer.endswith("+checkpoint")), None)


def _size(size: int | None) -> str:
    if not size:
        return ""
    return f"2^{size.bit_length() - 1}" if size >= 1024 and not size & (size - 1) else str(size)


def _bytes(record: Record | None) -> str:
    return f"{value(record) / 2**20:.1f} MiB" if record else ""


def _seconds(t: float) -> str:
    scale, unit = next((s, u) for s, u in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (0.0, "ns")) if t >= s)
    return f"{t / (scale or 1e-9):.3g} {unit}"


def _ratio(a: Record | None, b: Record | None) -> str:
    return f"{value(a) / value(b):.2f}" if a and b and value(b) else ""


# colours of Okabe and Ito, which people with any kind of colour vision can tell apart
_BARS = (("jaxrelu", "#0072B2"), ("jax.nn", "#E69F00"), ("no activation", "#999999"))


def plot_memory(records: Sequence[Record], path: Path) -> None:
    """Draws the memory of each network, in one panel per device, for the first activation and dtype measured there.

    Args:
        records: measurements.
        path: the PNG file to write.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = {key: peers for key, peers in group(records).items() if key[1] == "memory"}
    # a run that was interrupted may have measured a network without activations only
    panels = list(dict.fromkeys(key[0] for key in rows if key[3]))
    most = max((len({key[2] for key in rows if key[0] == device}) for device in panels), default=0)
    figure, axes = plt.subplots(
        len(panels), figsize=(max(8, 0.8 * most), 1.2 + 2.4 * len(panels)), layout="constrained", squeeze=False
    )
    for axis, device in zip(axes[:, 0], panels, strict=True):
        _, _, _, activation, dtype, size = next(key for key in rows if key[0] == device and key[3])
        chosen = {
            key[2]: (peers.get("jaxrelu"), _reference(peers), rows.get((*key[:3], None, *key[4:]), {}).get("identity"))
            for key, peers in rows.items()
            if key[0] == device and key[3:] == (activation, dtype, size)
        }
        for i, (label, color) in enumerate(_BARS):
            bars = [(n, value(r) / 2**20) for n, found in enumerate(chosen.values()) if (r := found[i])]
            axis.bar([n + 0.28 * (i - 1) for n, _ in bars], [v for _, v in bars], 0.26, color=color, label=label)
        axis.set_xticks(range(len(chosen)), [name.replace("_", "\n") for name in chosen], fontsize=9)
        axis.set_xlim(-0.6, max(4, len(chosen)) - 0.4)  # so that few networks do not make wide blocks
        axis.set_ylabel("MiB")
        axis.set_title(f"{activation}, {dtype}, 2^{size.bit_length() - 1} elements: {device}", fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=10, frameon=False)
    figure.suptitle("Temporary memory of one gradient or training step, by network", fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)
