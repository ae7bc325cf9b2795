"""`stochsec join-records`: records of disjoint test images as one."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from stages import StageError
from stages.core.console import say
from stages.core.files import fingerprint
from stages.core.records import KEPT, AttackResult
from stages.reporting.flags import flags_of
from stages.reporting.rows import count

FREE = {"subset", "flags", KEPT}  # what may differ between the parts


def run(paths: Sequence[Path], out: Path, *, without_images: bool) -> AttackResult:
    """Join records of one attack on parts of the test images, made anywhere; write and return it.

    They may come in any order. If one was kept without its images, or ``without_images`` asks for
    it, all lose theirs. `StageError` unless conditions, networks and machines' settings are the
    same and the parts are adjacent; then nothing is written.
    """
    parts = sorted(
        ((AttackResult.load(path), path) for path in paths), key=lambda part: span(*part)
    )
    (first, origin), *others = parts
    for (before, earlier), (part, path) in zip(parts, others, strict=False):
        for name in sorted((first.about.keys() | part.about.keys()) - FREE):
            if first.about.get(name) != part.about.get(name):
                raise StageError(
                    f"{path}: {name} = {part.about.get(name)}, and {first.about.get(name)} in "
                    f"{origin}"
                )
        end = span(before, earlier)[1]
        if span(part, path)[0] != end:
            raise StageError(
                f"{path}: expected test images from {end} on, got {{}}:{{}}".format(
                    *span(part, path)
                )
            )
    if without_images or any(KEPT in part.about for part, _ in parts):
        parts = [(stripped(part, path), path) for part, path in parts]
    joined = AttackResult.concatenate([part for part, _ in parts])
    start, stop = span(*parts[0])[0], span(*parts[-1])[1]
    joined.about["subset"] = [start, stop] if start else None
    if KEPT in joined.about:
        joined.about[KEPT] = {
            "sha256": [hash_of for part, _ in parts for hash_of in hashes(part)],
            "farthest": max(part.farthest() for part, _ in parts),
        }
    joined.about["flags"] = flags_of(joined)
    joined.save(out)
    labels, record = joined.images.labels, joined.record
    natural, robust = count(record.clean_correct(labels)), count(record.robust(labels))
    say(f"{out}: test images {start}:{stop}, natural {natural}, robust {robust} n={natural.n}")
    return joined


def span(part: AttackResult, path: Path) -> tuple[int, int]:
    """The test images [start, stop) of a record."""
    count_of = len(part.images.labels)
    start, stop = part.about.get("subset") or (0, count_of)
    if stop - start != count_of:
        raise StageError(f"{path}: says test images {start}:{stop}, has {count_of}")
    return start, stop


def stripped(part: AttackResult, path: Path) -> AttackResult:
    """A record without pixels, which says how far they were apart."""
    if KEPT in part.about:
        return part
    about = {**part.about, KEPT: {"sha256": fingerprint(path), "farthest": part.farthest()}}
    empty = torch.empty(len(part.images.labels), 0)
    images = replace(part.images, images=empty.to(torch.uint8))
    return AttackResult(images, replace(part.record, adversarial=empty), about)


def hashes(part: AttackResult) -> list[str]:
    """The hashes of the whole records that one without images was made of."""
    found = part.about[KEPT]["sha256"]
    return found if isinstance(found, list) else [found]
