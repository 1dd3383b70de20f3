"""The parts of a run's page that are text and tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from flexlora.config.resolve import KEYS
from flexlora.report.class_table import served_alike
from flexlora.report.formats import SCORES, format_metric, format_setting
from flexlora.report.markup import Markup, data, element, joined, name, table, text
from flexlora.report.records import PERSONAL, RunRecords, finite

__all__ = [
    "changed_settings",
    "failures",
    "headline",
    "modules_table",
    "rounds_table",
    "scores_table",
    "versions",
]

MANY = 40  # the most rows of a table
TILES = (
    ("bytes_down", "Bytes down", "training, all rounds"),
    ("bytes_up", "Bytes up", "training, all rounds"),
    ("seconds", "Time", "here, all rounds"),
    ("simulated_seconds", "Simulated time", "all rounds"),
    ("joules", "Simulated energy", "all rounds"),
)
NOTHING = Markup("")


def metric(key: str, value: float | None, *, derived: bool = False) -> Markup:
    """A number in the unit of the metric ``key``."""
    return data(value, format_metric(key, value), derived=derived)


def count(value: int) -> Markup:
    return data(value, str(value), derived=True)


def headline(run: RunRecords) -> Markup:
    """Tiles: rounds done, loss and exact match before and after, bytes, seconds, failures."""
    done, wanted = metric("round", run.last_round), metric("round", run.num_rounds)
    rounds = joined([done, text(" of "), wanted])
    tiles = [("Rounds", rounds, NOTHING)]  # title, value, small print
    for key, title in (("eval_loss", "Held-out loss"), ("eval_exact_match", "Exact match")):
        ends = [point for point in (run.base(key), run.last(key)) if point is not None]
        if ends:
            values = joined((metric(key, value) for _, value in ends), " \u2192 ")
            tiles.append((title, values, text("each client at its rank")))
    for key, title, below in TILES:
        if run.total(key) is not None:
            tiles.append((title, metric(key, run.total(key), derived=True), text(below)))
    if spent := run.last("epsilon"):
        stated = run.last("as_if_clients")
        whose = f", as if {stated[1]:,.0f} clients" if stated else ""
        whom = "of the adapters"
        if median := run.last("epsilon_median"):  # the noise is the clients' own
            whom = f"the largest of a client's (median {median[1]:.3g})"
        below = text(f"{whom}, at delta {run.setting('privacy.delta')}{whose}")
        tiles.append(("Epsilon", metric("epsilon", spent[1]), below))
    failed = int(run.total("clients_failed") or 0)
    trained = joined([count(int(run.total("clients_ok") or 0)), text(" updates counted")])
    tiles.append(("Failures", count(failed), trained))
    return element("dl", joined(_tile(*tile) for tile in tiles), class_="tiles")


def _tile(title: str, value: Markup, below: Markup) -> Markup:
    small = element("small", below) if below else NOTHING
    return element("div", element("dt", text(title)), element("dd", value, small))


def scores_table(run: RunRecords) -> Markup:
    """Every score at the base and the last round: all clients, by rank class, personal factors."""
    shown = [(key, title) for key, title in SCORES.items() if run.points(key)]
    suffixes = [("all clients, each at its own rank", "")]
    if served_alike(run, [key for key, _ in shown]):
        suffixes = [("all clients; every rank class is served the same adapter", "")]
    else:
        suffixes += [(name, f"/{name}") for name in run.rank_classes]
    suffixes += [
        ("clients with factors of their own, without them", f"/global_of_{PERSONAL}"),
        ("clients with factors of their own, with them", f"/{PERSONAL}"),
    ]
    ends = {key: [last] if (last := run.last(key)) else [] for key, _ in shown}
    header = ["rank class"]
    for key, title in shown:
        header += [f"{title}: base", *(f"after round {last[0]}" for last in ends[key])]
    rows = []
    for title, suffix in suffixes:
        cells = []
        for key, _ in shown:
            points = dict(run.points(key + suffix))
            rounds = [0, *(at for at, _ in ends[key])]
            cells += [metric(key, points.get(at)) for at in rounds]
        of_class = suffix or f"/{run.rank_classes[0]}" if len(suffixes) == 3 else suffix
        energy = run.last(f"energy_kept{of_class}")
        cells.append(metric("energy_kept", energy[1] if energy else None))
        if any(cells):
            rows.append([text(title), *cells])
    return table([*header, "energy kept"], rows, caption="Scores on held-out rows")


def failures(run: RunRecords) -> Markup:
    """Statuses and causes other than a plain success, the most frequent first."""
    groups: dict[tuple[str, str], list[Mapping[str, str]]] = {}
    for row in run.clients:
        if row["status"] != "ok" or row["cause"]:
            status = "ok, with a note" if row["status"] == "ok" else row["status"]
            groups.setdefault((status, row["cause"]), []).append(row)
    for values in run.rounds:
        if cause := values.get("left_out"):  # of a secure sum
            row = {"client_id": "", "round": str(values["round"])}
            groups.setdefault(("columns left out", str(cause)), []).append(row)
    if not groups:
        return element("p", text("None: every client that was asked sent an update that counted."))
    ordered = sorted(groups.items(), key=lambda item: (item[0][0][:2] == "ok", -len(item[1])))
    rows = [
        [
            text(status),
            _long(_shortened(cause or "no cause was given", 400)),
            name(_first(_shortened(row["client_id"], 40) for row in group)),
            text(_first(row["round"] for row in group)),
            count(len(group)),
        ]
        for (status, cause), group in ordered[:MANY]
    ]
    header = ["status", "cause", "clients", "rounds", "times"]
    more = text("And "), count(len(ordered) - MANY), text(" more in clients.csv.")
    rest = element("p", *more, class_="note") if len(ordered) > MANY else NOTHING
    return joined([table(header, rows, words=4, caption="Failures by cause"), rest])


def _long(words: str) -> Markup:
    """A text of any length, broken at the end of the cell."""
    return element("span", name(words), class_="long")


def _first(names: Iterable[str], most: int = 6) -> str:
    distinct = [*dict.fromkeys(names)]
    return ", ".join(distinct[:most]) + (", ..." if len(distinct) > most else "")


def _shortened(words: str, most: int) -> str:
    return words if len(words) <= most else words[:most] + "..."


def changed_settings(run: RunRecords) -> Markup:
    """The keys whose value is not the default.

    The defaults of a method's options are in a file that imports torch, which no report needs: the
    run itself says which of them were changed.
    """
    rows, changed = [], run.environment.get("changed_keys")
    for key, value in run.config.items():
        default, meaning = "(no such key in this version)", ""
        if key in KEYS:
            default, meaning = format_setting(KEYS[key].default), KEYS[key].description or ""
        elif key.startswith("method."):
            default = "(the method's)"
            if isinstance(changed, list) and key not in changed:
                continue
        if format_setting(value) != default:
            named = element("code", text(key))
            shown = element("span", name(format_setting(value)), class_="value")
            rows.append([named, shown, text(default), text(meaning)])
    if not rows:
        return element("p", text("Nothing: this is the default configuration."))
    header = ["key", "value", "default", "meaning"]
    return table(header, rows, words=4, caption="Settings that are not the default")


def versions(run: RunRecords) -> Markup:
    """The versions and the machine in ``environment.json``."""
    flat: dict[str, object] = {}
    for key, value in run.environment.items():
        if key == "changed_keys":  # shown with their values above
            continue
        flat |= dict(value) if isinstance(value, Mapping) else {key: value}
    shown = {k: v if isinstance(v, str) else json.dumps(v) for k, v in flat.items()}
    rows = [
        [text(key), _long("not known" if value == "null" else value)]
        for key, value in shown.items()
    ]
    return table(["what", "value"], rows, words=2, caption="Versions and machine")


def rounds_table(run: RunRecords) -> Markup:
    """Every metric without a suffix, by round; empty without rounds."""
    if not run.rounds:
        return NOTHING
    keys = dict.fromkeys(
        key for row in run.rounds for key, v in row.items() if finite(v) is not None
    )
    shown = [key for key in keys if "/" not in key and key != "round"]
    rows = [
        [metric("round", finite(row["round"])), *(metric(k, finite(row.get(k))) for k in shown)]
        for row in run.rounds
    ]
    header = ["round", *(key.replace("_", " ") for key in shown)]
    return table(header, rows, words=0, caption="All numbers by round")


def modules_table(run: RunRecords) -> Markup:
    """The decomposition of the last round's sum by module; empty without such rounds."""
    server_round, modules = run.last_modules()
    if not modules:
        return NOTHING
    known = ["rank", "effective_rank", *(f"energy_kept/{name}" for name in run.rank_classes)]
    known += ["tail_energy", "factor_gap", "error", "seconds"]
    keys = [
        key for key in known if any(finite(row.get(key)) is not None for row in modules.values())
    ]
    rows: list[Sequence[Markup]] = [
        [
            name(module),
            text(report.get("route", "")),
            *(metric(key, finite(report.get(key))) for key in keys),
        ]
        for module, report in modules.items()
    ]
    header = ["module", "route", *(key.replace("_", " ").replace("/", ", ") for key in keys)]
    return table(header, rows, words=2, caption=f"Round {server_round}", note=True)
