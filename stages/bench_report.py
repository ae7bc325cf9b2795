"""The table and the picture of `stochsec bench`, from its JSON alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from stages.figures import BLUE, GREEN, GREY, ORANGE, save
from stages.files import write_text

COLOURS = {
    "usual float32": GREY,
    "backward float32": "#999999",
    "plain float32": "#CC79A7",
    "compiled float32": BLUE,
    "compiled tf32": GREEN,
    "compiled bfloat16": ORANGE,
}
HOW_TO_READ = """\
`usual` is the loop that a user would write and the authors wrote, with torch's defaults, each job
in a process of its own; `backward` the same with `backward()`, which computes gradients of the
weights too; `plain` the reference chain of this library; `compiled` its fast one. `speedup` is the
usual loop's median time over this one's, from one run with everything timed in turn. `of the limit`
is the rate of useful operations over that of the fastest 3x3 convolution of the machine's library
in that precision, measured in the same run.
"""


def table(result: dict[str, Any]) -> pd.DataFrame:
    """The rows as people read them."""
    rows = pd.DataFrame(result["rows"])
    spread = rows["ms_quartiles"].map(lambda ends: f" [{ends[0]:.4g}, {ends[1]:.4g}]")
    return pd.DataFrame(
        {
            "task": rows["task"],
            "image": rows["image"],
            "batch": rows["batch"],
            "steps": rows["steps"],
            "engine": rows["engine"],
            "precision": rows["precision"],
            "ms [quartiles]": rows["ms"].map(lambda ms: f"{ms:.4g}") + spread,
            "speedup": rows["speedup"].map(lambda ratio: f"{ratio:.2f}"),
            "of the limit": rows["limit_fraction"].map(lambda share: f"{share:.0%}"),
            "image-steps/s": rows["image_steps_per_s"].map(lambda rate: f"{rate:,.0f}"),
        }
    )


def picture(result: dict[str, Any]) -> Figure:
    """Bars of the speed-up and of the fraction of the machine's convolution rate."""
    rows = pd.DataFrame(result["rows"])
    figure = Figure(figsize=(8.0, 0.75 + 0.17 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    place, ticks, labels = 0.0, [], []
    for (task, image, batch), group in rows.groupby(["task", "image", "batch"], sort=False):
        places = [place + i for i in range(len(group))]
        names = group["engine"] + " " + group["precision"]
        colours = [COLOURS[name] for name in names]
        quartiles = np.array(group["ms_quartiles"].tolist())
        speedup, baseline = group["speedup"].to_numpy(), group["baseline_ms"].to_numpy()
        slow, fast = baseline / quartiles[:, 1], baseline / quartiles[:, 0]
        spread = np.array([speedup - slow, fast - speedup]).clip(0)
        left.barh(places, speedup, xerr=spread, color=colours, error_kw={"lw": 0.8})
        right.barh(places, 100 * group["limit_fraction"], color=colours)
        ticks.append(place + (len(group) - 1) / 2)
        labels.append(f"{task}\n{image}, batch {batch}")
        place += len(group) + 1
    left.set(xlabel="times as fast as the usual loop (bars: quartiles of its own time)")
    left.axvline(1, color="k", lw=0.8)
    right.set(xlabel="% of the machine's convolution rate in that precision")
    left.set_yticks(ticks, labels)
    left.invert_yaxis()
    shown = [name for name in COLOURS if (rows["engine"] + " " + rows["precision"] == name).any()]
    handles = [left.barh(0, 0, color=COLOURS[name], label=name) for name in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(shown))
    return figure


def write(result: dict[str, Any], out: Path, name: str) -> None:
    """``name``.md and the picture beside it."""
    about = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    limits = pd.DataFrame(result["limits"]).to_markdown(index=False)
    rows = table(result).to_markdown(index=False, disable_numparse=True)
    text = f"# Speed\n\nMachine: {about}.\n\n{HOW_TO_READ}\n![Speed]({name}.png)\n\n{rows}\n\n"
    write_text(out / f"{name}.md", f"{text}The machine's own rates:\n\n{limits}\n")
    save(picture(result), out / name)
