"""The tour's last part: prefill, then each decode step; the cache, and how a token was drawn."""

from collections.abc import Callable, Sequence

import numpy as np

from gpt import flops
from gpt.reports.html import escape
from gpt.reports.spelling import Spelled, spell_all
from gpt.reports.tour_recorder import Drawing, Journey, Reading

MOST_ROWS = 10  # likeliest tokens of the model's own distribution that are shown
MOST_SLOTS = 128

INTRODUCTION = """<section><h2>6. Two regimes: prefill, then decode</h2>
<p><b>Prefill</b> reads the whole prompt at once: every token asks at the same time, which makes
large matrix products, bound by arithmetic. It leaves the keys and values of each position in the
cache, and one distribution: that of the next token. Each <b>decode</b> step then reads one token:
it writes one key and one value a layer and head, reads all earlier ones back, and all weights
again, to do little arithmetic: bound by memory.</p>
<p class="key soft">A slot of the cache: <span class="slot read"></span>read back
<span class="slot written"></span>written now <span class="slot"></span>empty</p>
<div class="steps" id="steps" role="radiogroup" aria-label="Prefill or decode step"></div>"""


def section(
    journey: Journey, spelled: Sequence[Spelled], decode_bytes: Callable[[Sequence[int]], bytes]
) -> str:
    """All steps, one below the other; the script shows one at a time."""
    T = len(journey.prompt_ids)
    parts = []
    pairs = zip(journey.readings, journey.drawings, strict=True)
    for i, (reading, drawing) in enumerate(pairs):
        read = f"decode step {i}: reads {spelled[T + i - 1].text}" if i else "prefill"
        parts.append(
            f'<article class="step" data-name="{escape(f"step {i}" if i else "prefill")}">'
            f"<h3>{escape(read[0].upper() + read[1:])}</h3>"
            f"{cache(journey, reading)}{distribution(drawing, spelled[T + i], decode_bytes)}"
            "</article>"
        )
    return INTRODUCTION + "\n".join(parts) + "</section>"


def cache(journey: Journey, reading: Reading) -> str:
    """What one call read from the cache and wrote to it, and what that costs."""
    c, n, first = journey.config, len(reading.tokens), reading.first
    shown = min(max(reading.capacity, first + n), MOST_SLOTS)
    kinds = ["read" if slot < first else "" for slot in range(shown)]
    for slot in reading.written:
        if slot < shown:
            kinds[slot] = "written"
    slots = "".join(f'<span class="slot {kind}"></span>' for kind in kinds)
    wrote = f"slot {reading.written[0]}" if n == 1 else f"slots 0 to {n - 1}"
    read = f"{first:,} positions" if first else "nothing: it was empty"
    moved = flops.decode_bytes(c, 1, first) if first else flops.prefill_bytes(c, 1, n)
    total = flops.forward_flops(c, n, first, 1)
    size = say_bytes(flops.cache_bytes(c, 1, n))
    again = f", {say_bytes(flops.cache_bytes(c, 1, first))}" if first else ""
    label = f"cache: {first} slots read, {n} written"
    return f"""<div class="slots" role="img" aria-label="{label}">{slots}</div>
<p>Wrote {wrote}: a key and a value in each of {c.n_layers} layers and {c.kv_heads} heads, {size}.
Read back {read}{again}.</p>
<p class="soft">{total / n / 1e6:,.2f} million operations a token, {say_bytes(moved)} moved for {n}
token{"s" if n > 1 else ""}, weights included: <b>{total / moved:,.1f} operations a byte</b>.</p>"""


def say_bytes(n: int) -> str:
    """Bytes as people say them."""
    if n < 10_000:
        return f"{n:,} bytes"
    return f"{n / 1e3:,.0f} kB" if n < 1e6 else f"{n / 1e6:,.1f} MB"


def distribution(
    drawing: Drawing, drawn: Spelled, decode_bytes: Callable[[Sequence[int]], bytes]
) -> str:
    """The likeliest next tokens, as the model sees them and after each setting; the draw."""
    stages, model = drawing.stages, drawing.stages["the model"]
    last = list(stages.values())[-1]
    top = np.argsort(-model, kind="stable")[:MOST_ROWS].tolist()
    rows = []
    for token in top if drawing.token in top else [*top, drawing.token]:
        cells = "".join(f"<td>{share(probs[token])}</td>" for probs in stages.values())
        shown = spell_all([token], decode_bytes)[0]
        half = " bytes" if shown.half else ""
        name = f'<span class="chip{half}">{escape(shown.text)}</span>'
        chosen = ' class="chosen"' if token == drawing.token else ""
        rows.append(f"<tr{chosen}><td>{name}</td>{cells}</tr>")
    head = "".join(f'<th scope="col">{name}</th>' for name in ("next token", *stages))
    left = "".join(f'<td class="soft">{int((probs > 0).sum()):,}</td>' for probs in stages.values())
    return f"""<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>
<tbody>{"".join(rows)}<tr><td class="soft">tokens left</td>{left}</tr></tbody></table></div>
<p>{say_draw(drawing, drawn, last)}</p>"""


def say_draw(drawing: Drawing, drawn: Spelled, last: np.ndarray) -> str:
    """How the token was picked from what was left."""
    name = f'<span class="chip drawn">{escape(drawn.text)}</span>'
    if drawing.uniform is None:
        return f"Temperature 0: the likeliest is taken, {name}."
    before = float(last[: drawing.token].sum(dtype=np.float64))
    after = before + float(last[drawing.token])
    return (
        f"All shares laid end to end, in the order of the vocabulary, reach from 0 to 1. The seed "
        f"gave {drawing.uniform:.4f}, which falls between {before:.4f} and {after:.4f}: {name}."
    )


def share(p: float) -> str:
    """A probability with its bar; a dash where the token was struck out."""
    if p == 0:
        return '<span class="gone">–</span>'
    text = f"{p:.1%}" if p >= 0.001 else f"{p:.0e}".replace("e-0", "e-")
    return f'<span class="share" style="--p:{100 * p:.1f}%">{text}</span>'
