"""A diagnosis as one HTML page that opens anywhere: pictures inside, nothing loaded from elsewhere, no script."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path

from lora_kernels.landscape.report import Diagnosis, LayerDiagnosis, number
from lora_kernels.landscape.verdict import LOUD_FAILURE, LOW_RANK_MINIMUM, STILL_TRAINING

_COLOURS = {LOUD_FAILURE: "#b3261e", LOW_RANK_MINIMUM: "#1b7f3b", STILL_TRAINING: "#8a6100"}
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1d1d1f }
table { border-collapse: collapse; font-size: 13px } td, th { padding: .2rem .6rem; border-bottom: 1px solid #ddd }
td { text-align: right; font-variant-numeric: tabular-nums } td.name, td.verdict { text-align: left }
th { text-align: right; position: sticky; top: 0; background: #fff } th:first-child { text-align: left }
img { max-width: 100%; height: auto } .quiet { color: #666 } figure { margin: 1.5rem 0 } .wide { overflow-x: auto }
"""
_MEANING = {
    "rank": "singular values of s B A above the tolerance, of the adapter's rank",
    "stable": "stable rank: squared Frobenius norm over squared spectral norm",
    "entropy": "entropy rank: exponential of the entropy of the normalised singular values",
    "|sBA|₂": "spectral norm of the update",
    "|sBA|*": "nuclear norm of the update",
    "of |W|₂": "spectral norm relative to that of the base weight",
    "balance": "|AAᵀ − BᵀB| / (|A|² + |B|²): zero at every stationary point under weight decay",
    "s|G|₂/λ": "1 at a minimum that is not zero",
    "alignment": "UᵀGV against −(λ/s) I on the update's directions, relative",
    "stationarity": "gradient of the objective by the factors, relative to that of the decay",
}


def _row(each: LayerDiagnosis, certified: bool) -> str:
    seen, found = each.spectrum, each.certificate
    cells = [
        f"{seen.numerical_rank}/{seen.rank}",
        number(seen.stable_rank),
        number(seen.entropy_rank),
        number(seen.spectral),
        number(seen.nuclear),
        number(seen.spectral_share),
        number(seen.balance),
    ]
    if certified:
        cells += ["", "", ""] if found is None else []
        cells += [] if found is None else [f"{found.ratio:.4g}", number(found.alignment), number(found.stationarity)]
    middle = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    colour = _COLOURS.get(each.verdict.kind, "#666")
    reasons = escape("; ".join((*each.verdict.reasons, *each.notes)), quote=True)
    verdict = escape(each.verdict.kind.replace("_", " "))
    return (
        f'<tr><td class="name">{escape(each.name)}</td>{middle}'
        f'<td class="verdict" style="color:{colour}" title="{reasons}">{verdict}</td></tr>'
    )


def render(diagnosis: Diagnosis, pictures: Mapping[str, Path]) -> str:
    """The page.

    Args:
        diagnosis: what is shown.
        pictures: title to PNG file.

    Returns:
        HTML; everything from the adapter is escaped.
    """
    certified = any(each.certificate is not None for each in diagnosis)
    columns = list(_MEANING)[: None if certified else -3]
    heads = "".join(f'<th title="{escape(_MEANING[each], quote=True)}">{escape(each)}</th>' for each in columns)
    images = "".join(
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<img alt="{escape(title, quote=True)}" src="data:image/png;base64,'
        f'{base64.b64encode(file.read_bytes()).decode("ascii")}"></figure>'
        for title, file in pictures.items()
    )
    notes = [*diagnosis.notes, *(f"{name}: {why}" for name, why in diagnosis.unsupported)]
    if certified:
        notes.append(f"Certified: {next(each.certificate.objective for each in diagnosis if each.certificate)}.")
    loud = [each for each in diagnosis if each.verdict.kind == LOUD_FAILURE]
    reasons = "".join(f"<li>{escape(each.name)}: {escape('; '.join(each.verdict.reasons))}</li>" for each in loud[:20])
    rows = "\n".join(_row(each, certified) for each in diagnosis)
    meaning = "".join(f"<li><b>{escape(each)}</b>: {escape(_MEANING[each])}</li>" for each in columns)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Loss landscape of {escape(diagnosis.adapter)}</title>
<style>{_STYLE}</style></head><body>
<h1>Loss landscape of {escape(diagnosis.adapter)}</h1>
<p style="color:{_COLOURS.get(diagnosis.verdict.kind, "#666")}"><b>{escape(diagnosis.summary())}</b></p>
<ul>{reasons}</ul>
<p class="quiet">{"<br>".join(escape(each) for each in notes)}</p>
{images}
<div class="wide"><table><thead><tr><th>layer</th>{heads}<th>verdict</th></tr></thead><tbody>
{rows}
</tbody></table></div>
<ul class="quiet">{meaning}<li>hold the pointer over a verdict for its reasons</li></ul>
</body></html>
"""
