"""One HTML file that opens offline: curves, clips that play, numbers with intervals, configuration."""

import base64
import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from dit_video.eval.charts import Points, format_number, line_chart

MAX_CLIPS = 60
MAX_VIDEO_BYTES = 3_200_000  # base64 adds a third: the file stays under 5 MB
_CHOICE = (
    "The first clips of each suite, the last of them replaced by later failures where there are any: look here, count below."
)
NUM_POINTS = 200  # of a curve, after averaging over bins

Rows = list[dict[str, Any]]


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Writes the report of a run directory (default: its report.html) and returns where it lies.

    Reads config.yaml, metrics.jsonl, evaluation.json, summary.json, data.json and evaluation/index.jsonl with its mp4 files; what is
    missing or damaged is said in its place. All text from the run is escaped; the page may load nothing and run no script.

    Raises ValueError if run_dir is not a directory.
    """
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir} is not a run directory; set run=")
    notes: list[str] = []
    summary = _read_object(run_dir / "summary.json", notes)
    evaluation = _read_object(run_dir / "evaluation.json", notes)
    log = _read_lines(run_dir / "metrics.jsonl", notes)
    clips = _read_lines(run_dir / "evaluation" / "index.jsonl", notes)
    estimates, protocol = _mapping(evaluation.get("metrics")), _mapping(evaluation.get("protocol"))
    parts = [
        _section("Summary", _facts(summary) + _headline(estimates)),
        _section("Loss", _loss_charts(log)),
        _section("Samples", _gallery(run_dir / "evaluation", clips)),
        _section("Measured", _measured(estimates, protocol)),
        _section("During training", _progress_charts(log)),
        _section("Data", _data(_read_object(run_dir / "data.json", notes))),
        _section("Throughput", _throughput_charts(log)),
        _section("Configuration", _config(run_dir / "config.yaml")),
    ]
    said = "".join(f"<p class=note>{escape(note)}</p>" for note in notes)
    name = escape(run_dir.resolve().name)
    page = _PAGE.format(title=name, style=_STYLE, body=f"<header><p>Run report</p><h1>{name}</h1></header>{said}{''.join(parts)}")
    target = out or run_dir / "report.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8", errors="replace")
    return target


# Reading: a run may be unfinished, so nothing here is taken for granted.


def _read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append(f"{path.name} is missing: what it would say is left out.")
        return {}
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} cannot be read: {error}")
        return {}
    if not isinstance(found, dict):
        notes.append(f"{path.name} does not hold a JSON object.")
        return {}
    return found


def _read_lines(path: Path, notes: list[str]) -> Rows:
    if not path.is_file():
        notes.append(f"{path.parent.name + '/' if path.name == 'index.jsonl' else ''}{path.name} is missing.")
        return []
    rows: Rows = []
    damaged = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            damaged += 1
    if damaged:
        notes.append(f"{path.name}: left out as damaged: {damaged} of {damaged + len(rows)} lines.")
    return rows


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body or '<p class=missing>Nothing was recorded.</p>'}</section>"


def _words(name: str) -> str:
    return escape(name.replace("_", " "))


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _facts(summary: Mapping[str, Any]) -> str:
    def show(value: object) -> str:
        number = _number(value)
        if number is None:
            return escape(str(value))
        return f"{value:,}" if isinstance(value, int) else format_number(number)

    scalars = {key: value for key, value in summary.items() if isinstance(value, str | int | float)}
    items = "".join(f"<div><dt>{_words(key)}</dt><dd>{show(value)}</dd></div>" for key, value in scalars.items())
    return f"<dl class=facts>{items}</dl>" if items else ""


def _headline(estimates: Mapping[str, Any]) -> str:
    cards = ""
    for suite, words in (("seen", "prompts of the kind trained on"), ("held_out", "prompts never trained on")):
        found = _estimate(estimates.get(f"adherence.{suite}.all"))
        if found:
            value, low, high, count = found
            cards += (
                f"<div class=card><b>{_percent(value)}</b><span>right in all that was asked, {words}</span>{_bar(*found[:3])}"
                f"<small>95% interval {_percent(low)} to {_percent(high)}, {count} clips</small></div>"
            )
    return f"<div class=cards>{cards}</div>" if cards else ""


def _estimate(found: object) -> tuple[float, float, float, int] | None:
    if not isinstance(found, dict):
        return None
    value, low, high = (_number(found.get(key)) for key in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return None
    return value, low, high, int(_number(found.get("count")) or 0)


def _bar(value: float, low: float, high: float) -> str:
    left, filled, right = (max(0.0, min(100.0, 100 * part)) for part in (low, value, high))
    return (
        f"<svg class=bar viewBox='0 0 100 8' preserveAspectRatio=none aria-hidden=true><rect class=track width=100 height=8 />"
        f"<rect class=fill width={filled:.2f} height=8 /><path class=whisker d='M{left:.2f} 4H{right:.2f}' /></svg>"
    )


def _measured(estimates: Mapping[str, Any], protocol: Mapping[str, Any]) -> str:
    """A table per metric: suites down, fields across, every cell with its interval."""
    tables: dict[str, dict[str, dict[str, tuple[float, float, float, int]]]] = defaultdict(lambda: defaultdict(dict))
    for name, raw in estimates.items():
        found, words = _estimate(raw), name.split(".", 2)
        if found and len(words) == 3:
            tables[words[0]][words[1]][words[2]] = found
    html = ""
    for metric, table in tables.items():
        fields = list(dict.fromkeys(field for row in table.values() for field in row))
        head = "".join(f"<th>{_words(field)}</th>" for field in fields)
        body = ""
        for suite, row in table.items():
            cells = "".join(_cell(row.get(field), metric == "adherence") for field in fields)
            count = max(estimate[3] for estimate in row.values())
            body += f"<tr><th scope=row>{_words(suite)}<small>n = {count}</small></th>{cells}</tr>"
        said = f"<p class=protocol>{escape(str(protocol[f'metric.{metric}']))}</p>" if f"metric.{metric}" in protocol else ""
        shown = f"<div class=scroll><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        html += f"<h3>{_words(metric)}</h3>{said}{shown}"
    asked = "".join(
        f"<dt>{_words(name.removeprefix('suite.'))}</dt><dd>{escape(str(text))}</dd>"
        for name, text in protocol.items()
        if name.startswith("suite.")
    )
    suites = f"<details><summary>What each suite asks for</summary><dl class=suites>{asked}</dl></details>" if asked else ""
    return html + suites


def _cell(found: tuple[float, float, float, int] | None, percent: bool) -> str:
    if found is None:
        return "<td class=missing>&ndash;</td>"
    value, low, high, _ = found
    show: Callable[[float], str] = _percent if percent else format_number
    bar = _bar(value, low, high) if percent else ""
    return f"<td><b>{show(value)}</b><small>{show(low)} &ndash; {show(high)}</small>{bar}</td>"


# Clips


def _gallery(folder: Path, rows: Rows) -> str:
    groups: dict[str, list[str]] = defaultdict(list)
    left_out, budget = 0, MAX_VIDEO_BYTES
    for row in rows:
        name = str(row.get("file", ""))
        path = folder / name
        # A name from a file is not trusted: only mp4 files of the folder itself are shown.
        usable = name == Path(name).name and path.suffix == ".mp4" and not path.is_symlink() and path.is_file()
        size = path.stat().st_size if usable else 0
        if not usable or size > budget or sum(map(len, groups.values())) >= MAX_CLIPS:
            left_out += 1
            continue
        budget -= size
        groups[str(row.get("suite", ""))].append(_clip(row, path.read_bytes()))
    html = f"<p class=protocol>{_CHOICE}</p>" if groups else ""
    html += "".join(f"<h3>{_words(suite)}</h3><div class=clips>{''.join(found)}</div>" for suite, found in groups.items())
    if left_out:
        html += f"<p class=missing>{left_out} more clips are not shown: too many, too large, or their file is missing.</p>"
    return html


def _clip(row: Mapping[str, Any], video: bytes) -> str:
    verdict = row.get("verdict")
    said = "<span class=unjudged>not judged</span>"
    if isinstance(verdict, dict):
        kind = "right" if verdict.get("right") is True else "wrong"
        said = f"<span class={kind}>{kind}</span> {escape(str(verdict.get('reason', '')))}"
    source = base64.b64encode(video).decode()
    return (
        f"<figure class=clip><video loop muted autoplay playsinline src='data:video/mp4;base64,{source}'></video>"
        f"<figcaption><q>{escape(str(row.get('prompt', '')))}</q><p>{said}</p>"
        f"<small>seed {escape(str(row.get('seed', '')))}</small></figcaption></figure>"
    )


# Data


def _data(data: Mapping[str, Any]) -> str:
    """Clips of every bucket and source, what a step of each costs beside the dearest, and what was refused."""
    rows = data.get("buckets")
    buckets = [_mapping(bucket) for bucket in rows] if isinstance(rows, list) else []
    if not buckets:
        return ""
    names = list(dict.fromkeys(name for bucket in buckets for name in _mapping(bucket.get("clips"))))
    columns = ["frames", "height", "width", "fps", *names, "tokens a clip", "clips a step", "cost of a step"]
    costs = [(_number(bucket.get("clips_per_step")) or 0) * (_number(bucket.get("cost_per_clip")) or 0) for bucket in buckets]
    body = ""
    for bucket, cost in zip(buckets, costs, strict=True):
        shape, clips = _mapping(bucket.get("shape")), _mapping(bucket.get("clips"))
        values = [shape.get(key) for key in ("num_frames", "height", "width", "fps")] + [clips.get(name, 0) for name in names]
        values += [bucket.get("tokens_per_clip"), bucket.get("clips_per_step")]
        cells = "".join(f"<td>{'&ndash;' if (n := _number(value)) is None else format(n, ',g')}</td>" for value in values)
        body += f"<tr>{cells}<td>{_percent(cost / max(costs)) if max(costs) > 0 else '&ndash;'}</td></tr>"
    head = "".join(f"<th>{_words(name)}</th>" for name in columns)
    html = f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    refused = [
        f"{count:,} {escape(why)}" for why, count in _mapping(data.get("refused")).items() if isinstance(count, int) and count
    ]
    html += f"<p class=protocol>Left out: {', '.join(refused) or 'none'}.</p>"
    problems = data.get("problems")
    return html + "".join(
        f"<p class=note>{escape(str(problem))}</p>" for problem in (problems if isinstance(problems, list) else [])
    )


# Curves


def _curve(log: Rows, key: str) -> Points:
    """A logged quantity over clips, averaged over bins so that long runs stay readable."""
    found = [(_number(row.get("clips", row.get("step"))), _number(row.get(key))) for row in log if key in row]
    points = [(x, y) for x, y in found if x is not None and y is not None]
    size = math.ceil(len(points) / NUM_POINTS) or 1
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in bins]


def _curves(log: Rows, prefix: str) -> dict[str, Points]:
    keys = sorted({key for row in log for key in row if key.startswith(prefix)})
    curves = {key.removeprefix(prefix).replace("_", " "): _curve(log, key) for key in keys}
    return {label: points for label, points in curves.items() if points}


def _loss_charts(log: Rows) -> str:
    totals = {"training": _curve(log, "train/loss"), "validation": _curve(log, "val/loss")}
    charts = line_chart("Loss", {label: points for label, points in totals.items() if points})
    charts += line_chart("By task", _curves(log, "train/loss/task/"))
    charts += line_chart("By noise level (0 clean, 1 noise)", _curves(log, "train/loss/level/"), ordered=True)
    charts += line_chart("Validation, by part", _curves(log, "val/loss/"))
    return f"<div class=charts>{charts}</div>" if charts else ""


def _progress_charts(log: Rows) -> str:
    curves = _curves(log, "eval/")
    adherence = {label: curve for label, curve in curves.items() if label.startswith("adherence.") and label.endswith(".all")}
    charts = line_chart(
        "Right in everything", {label.split(".")[1]: curve for label, curve in adherence.items()}, log_scale=False
    )
    return f"<div class=charts>{charts}</div>" if charts else ""


def _throughput_charts(log: Rows) -> str:
    charts = line_chart("Clips per second", {"clips/s": _curve(log, "perf/clips_per_second")}, log_scale=False)
    charts += line_chart("Model FLOPs utilisation", {"MFU": _curve(log, "perf/mfu")}, log_scale=False)
    return f"<div class=charts>{charts}</div>" if charts else ""


def _config(path: Path) -> str:
    if not path.is_file():
        return "<p class=missing>config.yaml is missing.</p>"
    text = escape(path.read_text(encoding="utf-8", errors="replace"))
    return f"<details><summary>{path.name}, as resolved</summary><pre>{text}</pre></details>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none';style-src 'unsafe-inline';media-src data:">
<title>{title}</title><style>{style}</style></head><body><main>{body}</main></body></html>
"""

_STYLE = """
:root{color-scheme:light dark;--paper:#fbfaf8;--panel:#fff;--ink:#1d1c1a;--soft:#6d6a64;--line:#e4e1da;--good:#12784a;
--bad:#b42318;
--fill:#2f6fdd;--s0:#2f6fdd;--s1:#d2691e;--s2:#15906b;--s3:#b0418f;--s4:#7562e0;--s5:#8a6d1f;--early:#9cc3f0;
--late:#12386f}
@media(prefers-color-scheme:dark){:root{--paper:#151618;--panel:#1d1f22;--ink:#eceae6;--soft:#9d9a94;--line:#303338;
--good:#5fd39b;
--bad:#ff8f82;--fill:#6ea3ff;--s0:#6ea3ff;--s1:#f09a55;--s2:#4fcaa2;--s3:#e585c8;--s4:#a99bff;--s5:#d3b45a;
--early:#2f5a94;--late:#cfe2ff}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
font-variant-numeric:tabular-nums;-webkit-text-size-adjust:100%}
main{max-width:1180px;margin:0 auto;padding:40px 24px 80px}
header p{margin:0;color:var(--soft);font-size:13px}
h1{margin:0 0 8px;font-size:32px;line-height:1.2;letter-spacing:-.02em;overflow-wrap:anywhere}
section{margin-top:44px}
h2{margin:0 0 16px;padding-bottom:8px;border-bottom:1px solid var(--line);font-size:20px;letter-spacing:-.01em}
h3{margin:24px 0 6px;font-size:15px}h3::first-letter{text-transform:uppercase}
small{color:var(--soft);font-size:12px}.missing,.protocol{color:var(--soft);font-size:13px}.protocol{margin:0 0 8px;
max-width:80ch}
.note{margin:8px 0;padding:8px 12px;border-left:3px solid var(--s1);background:var(--panel);overflow-wrap:anywhere}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:14px 20px;margin:0}
.facts dt{color:var(--soft);font-size:12px}.facts dd{margin:0;font-weight:550;overflow-wrap:anywhere}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(260px,1fr));gap:16px;margin-top:24px}
.card,.chart{margin:0;padding:18px 20px;border:1px solid var(--line);border-radius:10px;background:var(--panel)}
.card b,.card span,.card small{display:block}.card b{font-size:34px;line-height:1.15;letter-spacing:-.02em}
.bar{display:block;width:100%;height:8px;margin:8px 0 4px;border-radius:4px;overflow:hidden}
.track{fill:var(--line)}.fill{fill:var(--fill)}.whisker{stroke:var(--ink);stroke-width:2;
vector-effect:non-scaling-stroke}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,480px),1fr));gap:16px}
.chart{min-width:0}.chart figcaption{margin-bottom:8px;font-weight:600}.chart svg{display:block;width:100%;
min-width:360px}
.chart text{fill:var(--soft);font-size:11px}.grid{stroke:var(--line)}
.line{fill:none;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round}.line circle{fill:var(--c)}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:8px 0 0;padding:0;list-style:none;font-size:12px;
color:var(--soft)}
.legend li::before{content:"";display:inline-block;width:14px;height:3px;margin-right:6px;border-radius:2px;
background:var(--c);vertical-align:middle}
.legend b{color:var(--ink);font-weight:550}
.scroll{overflow-x:auto}table{border-collapse:collapse;min-width:50%}
th,td{padding:8px 26px 8px 0;border-bottom:1px solid var(--line);text-align:left;vertical-align:top;
white-space:nowrap}
thead th{color:var(--soft);font-size:12px;font-weight:500}tbody th{font-weight:550}
td b,td small,th small{display:block}td b{font-weight:550}th small{font-weight:400}td .bar{height:5px;min-width:84px;
margin-top:5px}
.clips{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:20px 16px}
.clip{margin:0;min-width:0}.clip video{display:block;width:100%;border-radius:8px;background:var(--line);
image-rendering:pixelated}
.clip figcaption{margin-top:8px;font-size:13px;line-height:1.4;overflow-wrap:anywhere}.clip p{margin:4px 0 0}
.clip q{quotes:none}
.right,.wrong,.unjudged{font-weight:600}.right{color:var(--good)}.right::before{content:"\\2713\\00a0"}
.wrong{color:var(--bad)}.wrong::before{content:"\\2717\\00a0"}.unjudged{color:var(--soft)}
details{margin-top:20px}summary{cursor:pointer;font-weight:550}
pre{max-height:640px;overflow:auto;padding:16px;border:1px solid var(--line);border-radius:10px;
background:var(--panel);
font:12px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.suites dt{font-weight:550}.suites dd{margin:0 0 10px;color:var(--soft);max-width:90ch}
@media print{.scroll{overflow:visible}}
"""
