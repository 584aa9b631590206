"""The model card of an export: what it is, what it was trained on, what was measured, and how it is used."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

LIBRARY = "---\nlibrary_name: dit_video\ntags: [video-diffusion, text-to-video, diffusion-transformer]\n---\n"


def config_hash(config: Mapping[str, Any]) -> str:
    """Equal for equal configs, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def model_card(run: Path, meta: Mapping[str, Any], sets: Mapping[str, int], out: Path) -> str:
    """The card, in markdown; `sets` are the sets of weights with how many numbers each holds. What the run never measured is not said."""
    config = meta["config"]
    kind = OmegaConf.select(OmegaConf.create(config), "model._target_") or "a transformer"
    weights = ", ".join(f"{name} ({count:,} numbers)" for name, count in sets.items())
    frozen = [f"{part}.folder" for part in ("autoencoder", "text", "image_encoder") if (config.get(part) or {}).get("folder")]
    given = [json.dumps(str(out)), *([] if "ema" in sets else [f'weights="{next(iter(sets))}"'])]
    use = [
        "```python",
        "import dit_video",
        "",
        f"run = dit_video.load({', '.join(given)})",
        f"video = run.sample({_prompt(config)}, seed=7)",
        "```",
    ]
    if frozen:
        use += ["", f'Frozen weights are not in it; where they lie elsewhere by now, say so: `folders={{"{frozen[0]}": ...}}`.']
    lines = [
        LIBRARY,
        f"# {run.name}",
        "",
        f"A video diffusion transformer (`{kind.rpartition('.')[2]}`), trained with dit_video on {meta['clips']:,} clips in "
        f"{meta['steps']:,} steps. Weights: {weights}.",
        "",
        *use,
        *("", "## Training", "", "| what | value |", "|---|---|", *_facts(meta, config)),
        *("", "## Data", "", *_data(run)),
        *("", "## Evaluation", "", *_evaluation(run)),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _prompt(config: Mapping[str, Any]) -> str:
    """The first of a run's prompts, as Python writes it."""
    prompts = config.get("sample_prompts") or ["a prompt"]
    return json.dumps(str(prompts[0]), ensure_ascii=False)


def _facts(meta: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    data = config["data"]
    facts = {
        "clips and steps": f"{meta['clips']:,} and {meta['steps']:,}",
        "config": f"`{config_hash(config)}`, whole in config.json",
        "code": meta.get("code", "unknown"),
        "seed": config["seed"],
        "shape": f"{data['num_frames']} frames of {data['height']}x{data['width']} at {data['fps']:g} fps",
        **{part.replace("_", " "): _named(config.get(part)) for part in ("autoencoder", "image_encoder")},
        "text encoder": _named(config.get("text")),
        "frozen weights": ", ".join(filter(None, meta.get("encoders", {}).values())),
        "adapters beside": f"the weights of {config.get('init_from')} (`{meta.get('base')}`)" if config.get("lora") else None,
        "averaged with decay": ", ".join(f"{decay:g}" for decay in meta.get("ema_decays", [])),
        "core-seconds": f"{meta['core_seconds']:,.0f}" if "core_seconds" in meta else None,
    }
    return [f"| {name} | {value} |" for name, value in facts.items() if value not in (None, "")]


def _named(config: Mapping[str, Any] | None) -> str:
    """A part by its class and folder; nothing for one that was not chosen."""
    if not config:
        return ""
    if encoders := config.get("encoders"):
        return " and ".join(map(_named, encoders.values()))
    folder = config.get("folder") or ""
    where = folder if folder.startswith("package:") else Path(folder).name
    return f"{config.get('_target_', '').rpartition('.')[2]}{f' of {where}' if where else ''}"


def _data(run: Path) -> Sequence[str]:
    try:
        about = json.loads((run / "data.json").read_text())
        lines = [f"Fingerprint `{about['fingerprint']}`.", "", "| clips | made into | a step |", "|---|---|---|"]
        for bucket in about["buckets"]:
            shape, clips = bucket["shape"], ", ".join(f"{count:,} of {name}" for name, count in bucket["clips"].items())
            size = f"{shape['num_frames']} frames of {shape['height']}x{shape['width']} at {shape['fps']:g} fps"
            lines.append(f"| {clips} | {size} | {bucket['clips_per_step']} |")
        return lines
    except (OSError, ValueError, KeyError, TypeError):
        return ["The run's folder says nothing of its data."]


def _evaluation(run: Path) -> Sequence[str]:
    try:
        found = json.loads((run / "evaluation.json").read_text())
        lines = ["| metric | value | 95% interval | count |", "|---|---|---|---|"]
        for name, estimate in found["metrics"].items():
            interval = f"{estimate['low']:.3f} to {estimate['high']:.3f}"
            lines.append(f"| {name} | {estimate['value']:.3f} | {interval} | {estimate['count']} |")
        return [*lines, "", *(f"- {name}: {told}" for name, told in found["protocol"].items())]
    except (OSError, ValueError, KeyError, TypeError):
        return ["Not evaluated yet; `dit-video evaluate` writes the table."]
