"""The tour page: a prompt on its way through a model, as recorded by tour_recorder.py.

Sections in the order of the page. What does not depend on the token or head that the reader picks
is HTML; attention maps, scores and the logit lens are painted by tour.js from packed arrays.
"""

import codecs
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from gpt import flops
from gpt.reports.html import build_page, escape, pack, table
from gpt.reports.tour_recorder import ModelCall, SampledToken, TourRecord
from gpt.sampling.settings import Settings
from gpt.sampling.text_stream import split_end
from gpt.terminal import visible

MAX_TABLE_ROWS = 10  # likeliest tokens shown of a distribution
MAX_SLOTS = 128  # of the cache, shown

DecodeBytes = Callable[[Sequence[int]], bytes]


@dataclass(frozen=True)
class Source:
    """Where the model came from: the run, the flags it was loaded with by name, and the Python
    interpreter as the user types it."""

    run: Path
    load_flags: Mapping[str, Any] = field(default_factory=dict)
    python: str = "python"


def build_tour(record: TourRecord, model, source: Source, settings: Settings) -> str:
    """The whole page."""
    decode_bytes = model.tokenizer.decode_bytes
    ids = [*record.prompt_ids, *(sampled.token for sampled in record.sampled)]
    tokens = display_tokens(ids, decode_bytes)
    prompt = record.prompt or decode_bytes(record.prompt_ids).decode("utf-8", "replace")
    body = f"""<header>
<h1>How “{escape(prompt)}” goes through the model</h1>
{introduction(record, model, source, settings)}
</header>
<main>
<noscript><p><b>The maps and scores below need JavaScript, which is turned off.</b></p></noscript>
{tokens_section(record, tokens)}
{shapes_section(record)}
<div class="picker" aria-label="What is shown below">
<div class="chips" id="tokens" role="radiogroup" aria-label="Token"></div>
<div class="soft" id="picked" aria-live="polite"></div>
</div>
{ATTENTION_SECTION}
{scores_section(record)}
{lens_section(record)}
{regimes_section(record, tokens, decode_bytes)}
</main>"""
    data = script_data(record, tokens, decode_bytes)
    return build_page(f"Tour: {prompt[:60]}", body, "tour.js", data)


def script_data(
    record: TourRecord, tokens: list["DisplayToken"], decode_bytes: DecodeBytes
) -> dict:
    """What tour.js reads."""
    ids = record.read_ids
    lens_words = {}
    for token in np.unique(record.lens_ids).tolist():
        (word,) = display_tokens([token], decode_bytes)
        lens_words[token] = [word.text, int(word.is_partial)]
    return {
        "q": pack(record.by_position("q")),
        "k": pack(record.cached("k")),
        "v": pack(record.cached("v")),
        "mix": pack(record.by_position("mix")),
        "scores": pack(record.attention_map("scores")),
        "weights": pack(record.attention_map("weights"), 0.0, 1.0),
        "groups": record.config.n_heads // record.config.kv_heads,
        "prefilled": len(record.prompt_ids),
        "tokens": [[t.text, int(t.is_partial), t.character] for t in tokens[: len(ids)]],
        "following": [*ids[1:], record.sampled[-1].token],
        "words": lens_words,
        "lens": {
            "layers": record.lens_layers,
            "ids": record.lens_ids.tolist(),
            "probs": pack(record.lens_probs, 0.0, 1.0),
        },
    }


# Tokens as text


@dataclass(frozen=True)
class DisplayToken:
    """A token as it is shown. `is_partial`: it is a part of a character and `text` has its bytes;
    `character`: the character that it makes together with its neighbors."""

    text: str
    is_partial: bool = False
    character: str = ""


def display_tokens(ids: Sequence[int], decode_bytes: DecodeBytes) -> list[DisplayToken]:
    """The tokens of a text. Spaces and line ends are shown as symbols."""
    token_bytes = [decode_bytes([token]) for token in ids]
    shown = []
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    start = 0
    for i, token in enumerate(token_bytes):
        try:
            shown.append(DisplayToken(show_blanks(token.decode())))
        except UnicodeDecodeError:
            text = token.decode("utf-8", "backslashreplace")
            shown.append(DisplayToken(show_blanks(text), is_partial=True))

        # Where a character is complete, tell all tokens since the last such place.
        decoded = decoder.decode(token)
        if decoder.getstate()[0]:
            continue
        if "\ufffd" not in decoded:
            character = show_blanks(b"".join(token_bytes[start : i + 1]).decode("utf-8", "replace"))
            for j in range(start, i + 1):
                if shown[j].is_partial:
                    shown[j] = DisplayToken(shown[j].text, True, character)
        start = i + 1
    return shown


def show_blanks(text: str) -> str:
    return visible(text.translate(str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥"})))


def chip(token: DisplayToken, token_id: int | None = None, is_sampled: bool = False) -> str:
    """A token in a frame."""
    css_class = "chip"
    if token.is_partial:
        css_class += " bytes"
    if is_sampled:
        css_class += " sampled"
    title = f' title="part of {escape(token.character)}"' if token.character else ""
    number = "" if token_id is None else f"<sup>{token_id}</sup>"
    return f'<span class="{css_class}"{title}>{escape(token.text)}{number}</span>'


# Introduction, and sections 1 to 5


def introduction(record: TourRecord, model, source: Source, settings: Settings) -> str:
    """The model, what it wrote, and the command that writes the same."""
    c = record.config
    # New tokens may complete a character that the prompt ended in.
    _, unfinished = split_end(model.tokenizer.decode_bytes(record.prompt_ids))
    new_bytes = model.tokenizer.decode_bytes([sampled.token for sampled in record.sampled])
    new_text = (unfinished + new_bytes).decode("utf-8", "replace")
    return f"""<p>{escape(source.run.name)}, step {model.step:,}: {c.n_layers} layers of {c.n_heads}
heads, {flops.parameters(c):,} parameters. It read the prompt, then wrote:</p>
<pre>{escape(record.prompt)}<b>{escape(new_text)}</b></pre>
<p class="soft">Every number below is the model’s own, recorded during its forward pass in
{len(record.calls)} calls over {len(record.read_ids)} positions.
<code>{escape(sample_command(source, record, settings))}</code> writes the same text.</p>"""


def sample_command(source: Source, record: TourRecord, settings: Settings) -> str:
    """The sample.py command that writes the same text."""
    words = [source.python, "sample.py", str(source.run)]
    for name, value in source.load_flags.items():
        words += [f"--{name}", str(value)]
    if record.prompt_is_ids:
        words += ["--prompt-ids", " ".join(map(str, record.prompt_ids))]
    else:
        words.append(f"--prompt={record.prompt}")
    for setting in fields(Settings):
        value = getattr(settings, setting.name)
        if value != getattr(Settings(), setting.name):
            words += ["--" + setting.name.replace("_", "-"), str(value)]
    return shlex.join(words)


def tokens_section(record: TourRecord, tokens: list[DisplayToken]) -> str:
    T = len(record.prompt_ids)
    prompt = "".join(map(chip, tokens[:T], record.prompt_ids))
    new = "".join(
        chip(token, sampled.token, is_sampled=True)
        for token, sampled in zip(tokens[T:], record.sampled, strict=True)
    )
    partial = ""
    if any(token.is_partial for token in tokens):
        partial = "<p>Colored tokens are bytes: a character was split into several tokens.</p>"
    return f"""<section><h2>1. Tokens</h2>
<p>The model does not see letters. The tokenizer splits the text into pieces from a fixed list of
{record.config.vocab_size:,}, and the model gets their numbers. ␣ is a space, ⏎ a line end.</p>
<div class="chips" id="prompt">{prompt}</div>
{partial}
<p>The model then wrote these (dashed), one token at a time; each was read before the next:</p>
<div class="chips">{new}</div></section>"""


AXES = {
    "B": "rows of the batch, here one",
    "T": "tokens read in one call",
    "S": "keys attended to: in prefill those of the prompt, then all slots of the cache",
    "D": "width of the residual stream",
    "N": "query heads",
    "K": "key/value heads",
    "G": "query heads per key/value head, N/K",
    "H": "width of one head",
    "F": "width of the MLP",
    "V": "vocabulary",
    "L": "layers",
}


def shapes_section(record: TourRecord) -> str:
    """The shapes of all arrays, in prefill and in a decode step."""
    c = record.config
    T = len(record.prompt_ids)
    sizes = {"B": 1, "T": T, "S": T, "D": c.d_model, "N": c.n_heads, "K": c.kv_heads}
    sizes |= {"G": c.n_heads // c.kv_heads, "H": c.head_width, "F": c.ff_width}
    sizes |= {"V": c.vocab_size, "L": c.n_layers}
    legend = "".join(
        f"<div><dt>{axis}</dt><dd>{sizes[axis]:,} <small>{meaning}</small></dd></div>"
        for axis, meaning in AXES.items()
    )

    calls = {"prefill": record.calls[0]}
    if len(record.calls) > 1:
        calls["a decode step"] = record.calls[-1]
    rows = []
    for name, axes, explanation in forward_stages(record):
        row = [f"{name} <code>{axes}</code><br><small>{explanation}</small>"]
        for call in calls.values():
            sizes |= {"T": len(call.tokens), "S": call.arrays["k"].shape[2]}
            shape = ", ".join(str(sizes[axis]) for axis in axes)
            row.append(f'<span class="mono">[{shape}]</span>')
        rows.append(row)
    return f"""<section><h2>2. Shapes</h2>
<p>Every stage of the forward pass is an array of numbers. A letter stands for each of its axes:</p>
<dl class="facts">{legend}</dl>
{table(["stage", *calls], rows, "shapes")}</section>"""


def forward_stages(record: TourRecord) -> list[tuple[str, str, str]]:
    """The stages of the forward pass: name, axes, explanation."""
    c = record.config
    position, rotated = "", ""
    if c.positions == "learned":
        position = " plus a learned vector for its position"
    elif c.positions == "sinusoidal":
        position = " plus sines and cosines of its position"
    elif c.positions == "rope":
        rotated = ", then rotated by an angle proportional to the position"
    return [
        ("token ids", "BT", "the numbers of the tokens"),
        ("embedding", "BTD", f"each token’s row of a table{position}"),
        ("queries", "BTNH", f"what each token looks for: a learned projection{rotated}"),
        ("keys", "BKSH", f"what each token offers: a second projection{rotated}; cached"),
        ("values", "BKSH", "what each token passes on: a third projection; cached"),
        ("scores", "BKGTS", "each query times each key, divided by √H; later keys are masked"),
        ("weights", "BKGTS", "softmax of the scores: the weights of a query sum to 1"),
        ("mix", "BTNH", "the sum of the values, weighted, for each head"),
        ("residual", "BTD", "the outputs of all heads, projected and added to the stream"),
        ("MLP", "BTF", f"each token by itself: wider, {escape(c.mlp)}, back, and added too"),
        ("logits", "BV", f"after {c.n_layers} such layers: a score for every possible next token"),
    ]


ATTENTION_SECTION = """<section><h2>3. Attention</h2>
<p>Each small square is one head: a row for each token as query, a column for each token as key. The
stronger the color, the larger the weight of that key. Nothing above the diagonal is used: later
tokens are masked. Pick a head; then move over the large map, or use the arrow keys in it.</p>
<div class="attention">
<div><div class="heads" id="heads" role="radiogroup" aria-label="Layer and head"></div></div>
<figure><canvas id="map" tabindex="0" role="img" aria-describedby="cell"></canvas>
<figcaption class="readout" id="cell" aria-live="polite"></figcaption>
<figcaption id="parts"></figcaption></figure>
</div></section>"""


def scores_section(record: TourRecord) -> str:
    c = record.config
    notes = ""
    if c.qk_norm:
        notes += (
            " Queries and keys are normalized first, so that no score grows too large (QK-norm)."
        )
    if c.positions == "rope":
        notes += " They are shown after the rotation by their positions (RoPE)."
    return f"""<section><h2>4. The scores of one query</h2>
<p>Queries, keys and values come from three separate learned projections of the same tokens. The
score of a query and a key is their dot product q·k. It is divided by √H = √{c.head_width}, so that
its size does not depend on the width of the head; scores of later tokens are masked; softmax turns
the others into weights that sum to 1. The output is the sum of the values with these
weights.{notes}</p>
<p class="readout" id="question"></p>
<div id="query"></div>
<div class="scroll" tabindex="0" id="scores"></div>
<div id="answer"></div></section>"""


def lens_section(record: TourRecord) -> str:
    start = "the embedding alone" if record.lens_layers[0] == 0 else "the first layer"
    return f"""<section><h2>5. What each layer predicts</h2>
<p>Each layer adds to the residual stream. If the model stopped after a layer, its head would
already predict the next token: here from {start} to all {record.config.n_layers} layers (the
“logit lens”). The token that really came next is marked.</p>
<div class="scroll lens" tabindex="0" id="lens"></div></section>"""


# Section 6: prefill and decode


REGIMES_INTRODUCTION = """<h2>6. Two regimes: prefill, then decode</h2>
<p><b>Prefill</b> reads the whole prompt at once: large matrix products for all tokens together,
bound by arithmetic. It leaves the keys and values of each position in the cache, and one
distribution: that of the next token. Each <b>decode</b> step then reads one token: it writes one
key and one value per layer and head, and reads all earlier ones and all weights to do little
arithmetic: bound by memory bandwidth.</p>
<p class="key soft">A slot of the cache: <span class="slot read"></span>read
<span class="slot written"></span>written now <span class="slot"></span>empty</p>
<div class="steps" id="steps" role="radiogroup" aria-label="Prefill or decode step"></div>"""


def regimes_section(
    record: TourRecord, tokens: list[DisplayToken], decode_bytes: DecodeBytes
) -> str:
    """All calls of the model, one below the other; the script shows one at a time."""
    T = len(record.prompt_ids)
    steps = []
    for i, (call, sampled) in enumerate(zip(record.calls, record.sampled, strict=True)):
        name, title = "prefill", "Prefill"
        if i > 0:
            name = f"step {i}"
            title = f"Decode step {i}: reads {tokens[T + i - 1].text}"
        steps.append(
            f'<article class="step" data-name="{name}"><h3>{escape(title)}</h3>'
            f"{describe_cache(record, call)}"
            f"{distribution_table(sampled, decode_bytes)}"
            f"<p>{explain_choice(sampled, tokens[T + i])}</p></article>"
        )
    return f"<section>{REGIMES_INTRODUCTION}{''.join(steps)}</section>"


def describe_cache(record: TourRecord, call: ModelCall) -> str:
    """What one call read from the cache and wrote to it, and what that costs."""
    c = record.config
    n_new, n_before = len(call.tokens), call.first_position
    kinds = ["read" if slot < n_before else "" for slot in range(call.capacity)]
    for slot in call.written_slots:
        kinds[slot] = "written"
    slots = "".join(f'<span class="slot {kind}"></span>' for kind in kinds[:MAX_SLOTS])

    written_size = format_bytes(flops.cache_bytes(c, 1, n_new))
    if n_before == 0:
        wrote = f"slots 0 to {n_new - 1}"
        read = "nothing: the cache was empty"
        n_bytes = flops.prefill_bytes(c, 1, n_new)
    else:
        wrote = f"slot {call.written_slots[0]}"
        read = f"{n_before:,} positions, {format_bytes(flops.cache_bytes(c, 1, n_before))}"
        n_bytes = flops.decode_bytes(c, 1, n_before)
    n_flops = flops.forward_flops(c, n_new, n_before, 1)
    tokens = "token" if n_new == 1 else "tokens"
    label = f"cache: {n_before} slots read, {n_new} written"
    return f"""<div class="slots" role="img" aria-label="{label}">{slots}</div>
<p>Wrote {wrote}: a key and a value in each of {c.n_layers} layers and {c.kv_heads} heads,
{written_size}. Read {read}.</p>
<p class="soft">{n_flops / n_new / 1e6:,.2f} million operations per token, {format_bytes(n_bytes)}
moved for {n_new} {tokens}, weights included:
<b>{n_flops / n_bytes:,.1f} operations per byte</b>.</p>"""


def format_bytes(n: int) -> str:
    if n < 10_000:
        return f"{n:,} bytes"
    return f"{n / 1e3:,.0f} kB" if n < 1e6 else f"{n / 1e6:,.1f} MB"


def distribution_table(sampled: SampledToken, decode_bytes: DecodeBytes) -> str:
    """The likeliest next tokens as the model predicts them and after each setting."""
    stages = sampled.stages
    top = np.argsort(-stages["the model"], kind="stable")[:MAX_TABLE_ROWS].tolist()
    if sampled.token not in top:
        top.append(sampled.token)
    rows = []
    for token in top:
        (shown,) = display_tokens([token], decode_bytes)
        cells = "".join(f"<td>{format_prob(probs[token])}</td>" for probs in stages.values())
        css_class = ' class="chosen"' if token == sampled.token else ""
        rows.append(f"<tr{css_class}><td>{chip(shown)}</td>{cells}</tr>")
    head = "".join(f'<th scope="col">{name}</th>' for name in ("next token", *stages))
    counts = "".join(
        f'<td class="soft">{np.count_nonzero(probs):,}</td>' for probs in stages.values()
    )
    return f"""<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>
<tbody>{"".join(rows)}<tr><td class="soft">tokens left</td>{counts}</tr></tbody></table></div>"""


def explain_choice(sampled: SampledToken, shown: DisplayToken) -> str:
    """How the token was chosen among those that were left."""
    if sampled.uniform is None:
        return f"Temperature 0: the likeliest token is taken, {chip(shown, is_sampled=True)}."
    probs = list(sampled.stages.values())[-1]
    low = float(probs[: sampled.token].sum(dtype=np.float64))
    high = low + float(probs[sampled.token])
    return (
        "The probabilities laid end to end, in the order of the vocabulary, cover 0 to 1. The "
        f"random number {sampled.uniform:.4f} falls between {low:.4f} and {high:.4f}: "
        f"{chip(shown, is_sampled=True)}."
    )


def format_prob(p: float) -> str:
    """A probability with a bar; a dash where the token was removed."""
    if p == 0:
        return '<span class="gone">–</span>'
    text = f"{p:.1%}" if p >= 0.001 else f"{p:.0e}".replace("e-0", "e-")
    return f'<span class="share" style="--p:{100 * p:.1f}%">{text}</span>'
