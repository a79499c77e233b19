"""The tour of a prompt as a page: a Journey to HTML, and numbers for its script.

What does not depend on what is picked is HTML from here; the maps, the scores of one token and the
logit lens are drawn by tour.js from the packed numbers.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gpt import flops
from gpt.reports import regimes
from gpt.reports.html import assemble, escape, pack, table
from gpt.reports.spelling import Spelled, spell_all
from gpt.reports.tour_recorder import Journey
from gpt.sampling.settings import Settings
from gpt.sampling.text_stream import split_end

LETTERS = {
    "B": "rows of the batch, here one",
    "T": "tokens read in one go",
    "S": "keys attended to: in prefill the prompt's, then all slots of the cache, filled or not",
    "D": "width of the residual stream",
    "N": "query heads",
    "K": "key/value heads",
    "G": "query heads to each of them, N/K",
    "H": "width of one head",
    "F": "width of the MLP",
    "V": "vocabulary",
    "L": "layers",
}


def chip(spelled: Spelled, number: int | None = None, kind: str = "") -> str:
    """A token in its frame."""
    half = " bytes" if spelled.half else ""
    title = f' title="part of {escape(spelled.whole)}"' if spelled.whole else ""
    small = "" if number is None else f"<sup>{number}</sup>"
    return f'<span class="chip{half}{kind}"{title}>{escape(spelled.text)}{small}</span>'


@dataclass(frozen=True)
class Source:
    """What `run` was loaded with: flags that were given, by name; and `python` as one types it."""

    run: Path
    loading: Mapping[str, Any] = field(default_factory=dict)
    python: str = "python"


def build(journey: Journey, model, source: Source, settings: Settings) -> str:
    """The whole page."""
    ids = [*journey.prompt_ids, *(drawing.token for drawing in journey.drawings)]
    spelled = spell_all(ids, model.tokenizer.decode_bytes)
    prompt = journey.prompt or as_text(model, journey.prompt_ids)
    body = f"""<header>
<h1>How “{escape(prompt)}” goes through the model</h1>
{introduce(journey, model, source, settings)}
</header>
<main>
<noscript><p><b>The maps and scores below need JavaScript, which is switched off.</b></p></noscript>
{tokens_section(journey, spelled)}
{shapes_section(journey)}
<div class="picker" aria-label="What is shown below">
<div class="chips" id="tokens" role="radiogroup" aria-label="Token"></div>
<div class="soft" id="picked" aria-live="polite"></div>
</div>
{MAPS}
{scores_section(journey)}
{lens_section(journey)}
{regimes.section(journey, spelled, model.tokenizer.decode_bytes)}
</main>"""
    title = f"Tour: {prompt[:60]}"
    return assemble(title, body, numbers(journey, spelled, model.tokenizer), "tour.js")


def introduce(journey: Journey, model, source: Source, settings: Settings) -> str:
    """Which model it is, what it wrote, and the command that writes the same."""
    c, P, name = journey.config, len(journey.read_ids), source.run.name
    written = [drawing.token for drawing in journey.drawings]
    _, begun = split_end(model.tokenizer.decode_bytes(journey.prompt_ids))
    text = as_text(model, written, begun)
    return f"""<p>{escape(name)}, step {model.step:,}: {c.n_layers} layers of {c.n_heads} heads,
{flops.parameters(c):,} weights. It read the prompt, then wrote:</p>
<pre>{escape(journey.prompt)}<b>{escape(text)}</b></pre>
<p class="soft">Every number below is the model’s own, noted while it computed: a recorder stood
where its attention is called, {len(journey.readings)} times over {P} positions.
<code>{escape(command_of(source, journey, settings))}</code> writes the same text.</p>"""


def as_text(model, ids: list[int], before: bytes = b"") -> str:
    """What token ids spell, after the first bytes of a character that they complete."""
    return (before + model.tokenizer.decode_bytes(ids)).decode("utf-8", "replace")


def command_of(source: Source, journey: Journey, settings: Settings) -> str:
    """The command of sample.py that draws what the tour drew."""
    words = [source.python, "sample.py", str(source.run)]
    words += [word for name, value in source.loading.items() for word in (f"--{name}", str(value))]
    ids = " ".join(map(str, journey.prompt_ids))
    words += ["--prompt-ids", ids] if journey.by_ids else [f"--prompt={journey.prompt}"]
    words += ["--max-new-tokens", str(settings.max_new_tokens)]
    words += ["--temperature", repr(settings.temperature)]
    if settings.repetition_penalty != 1:
        words += ["--repetition-penalty", repr(settings.repetition_penalty)]
    for name, off in (("top_k", 0), ("top_p", 1), ("min_p", 0)):
        if getattr(settings, name) != off:
            words += [f"--{name.replace('_', '-')}", repr(getattr(settings, name))]
    return shlex.join([*words, "--seed", str(settings.seed)])


def tokens_section(journey: Journey, spelled: list[Spelled]) -> str:
    """The text as the model sees it."""
    T, ids = len(journey.prompt_ids), journey.prompt_ids
    shown = "".join(chip(one, token) for one, token in zip(spelled[:T], ids, strict=True))
    drawn = "".join(
        chip(one, drawing.token, " drawn")
        for one, drawing in zip(spelled[T:], journey.drawings, strict=True)
    )
    half = "<p>Tokens in colour are bytes: a character was split between several.</p>"
    return f"""<section><h2>1. Tokens</h2>
<p>The model knows no letters. The tokenizer cuts the text into pieces from a fixed list of
{journey.config.vocab_size:,}, and the model gets their numbers. ␣ is a space, ⏎ a line’s end.</p>
<div class="chips" id="prompt">{shown}</div>
{half if any(one.half for one in spelled) else ""}
<p>What it wrote, dashed, came after: one token at a time, each read before the next.</p>
<div class="chips">{drawn}</div></section>"""


def shapes_section(journey: Journey) -> str:
    """What shape the numbers have on their way, in both regimes."""
    c = journey.config
    T = len(journey.prompt_ids)
    sizes = {"B": 1, "T": T, "S": T, "D": c.d_model, "N": c.n_heads, "K": c.kv_heads}
    sizes |= {"G": c.n_heads // c.kv_heads, "H": c.head_width, "F": c.ff_width}
    sizes |= {"V": c.vocab_size, "L": c.n_layers}
    facts = "".join(
        f"<div><dt>{letter}</dt><dd>{sizes[letter]:,} <small>{LETTERS[letter]}</small></dd></div>"
        for letter in sizes
    )
    rows = []
    for stage, letters, said in stages(journey):
        shapes = [shape(letters, sizes | {"T": t, "S": s}) for t, s in calls(journey)]
        rows.append([f"{stage} <code>{letters}</code><br><small>{said}</small>", *shapes])
    head = ["stage", *(["prefill", "a decode step"][: len(calls(journey))])]
    return f"""<section><h2>2. Shapes</h2>
<p>Everything on the way is a block of numbers. A letter stands for each of its sides:</p>
<dl class="facts">{facts}</dl>
{table(head, rows, "shapes")}</section>"""


def calls(journey: Journey) -> list[tuple[int, int]]:
    """Tokens read and slots there were, in the prefill and in the last decode step."""
    readings = [journey.readings[0], *journey.readings[1:][-1:]]
    return [(len(reading.tokens), reading.kept["k"].shape[2]) for reading in readings]


def shape(letters: str, sizes: dict[str, int]) -> str:
    """`BTNH` as the numbers it stands for."""
    return f'<span class="mono">[{", ".join(str(sizes[letter]) for letter in letters)}]</span>'


def stages(journey: Journey) -> list[tuple[str, str, str]]:
    """The way through the model: stage, letters, what happens."""
    c = journey.config
    turned = (
        ", then turned by an angle that grows with the position" if c.positions == "rope" else ""
    )
    place = {
        "learned": " plus the row of its position",
        "sinusoidal": " plus waves that tell it its position",
    }
    scored = "each query times each key, divided by √H; what lies ahead is masked"
    return [
        ("token ids", "BT", "the numbers of the tokens"),
        ("embedding", "BTD", f"each token’s row of a table{place.get(c.positions, '')}"),
        ("queries", "BTNH", f"what each token looks for: its own projection{turned}"),
        ("keys", "BKSH", f"what each token offers: another projection{turned}; kept in the cache"),
        ("values", "BKSH", "what each token hands over: a third one; kept in the cache"),
        ("scores", "BKGTS", scored),
        ("weights", "BKGTS", "softmax: the scores of each query as shares that sum to 1"),
        ("mix", "BTNH", "values added up by these shares, head by head"),
        ("residual", "BTD", "the heads’ results, projected and added to the stream"),
        ("MLP", "BTF", f"each token by itself: wider, {escape(c.mlp)}, back, added too"),
        (
            "logits",
            "BV",
            f"after {c.n_layers} such layers: the last token against every token there is",
        ),
    ]


MAPS = """<section><h2>3. Attention</h2>
<p>Each small square is one head: a row for each token that asks (its query), a column for each
token that may answer (its key). The stronger the colour, the larger the share of that answer. No
row looks ahead: what lies above the diagonal is masked. Pick a head; then move over the large map,
or use the arrow keys in it.</p>
<div class="attention">
<div><div class="heads" id="heads" role="radiogroup" aria-label="Layer and head"></div></div>
<figure><canvas id="map" tabindex="0" role="img" aria-describedby="cell"></canvas>
<figcaption class="readout" id="cell" aria-live="polite"></figcaption>
<figcaption id="parts"></figcaption></figure>
</div></section>"""


def scores_section(journey: Journey) -> str:
    """Where the script puts the scores of one token."""
    c = journey.config
    norm = " Both are normalised before, so that no score runs away (QK-norm)." if c.qk_norm else ""
    turned = (
        " They are shown as they meet, turned by their positions (RoPE)."
        if c.positions == "rope"
        else ""
    )
    return f"""<section><h2>4. One token asks</h2>
<p>Queries, keys and values come from three separate learned projections of the same tokens. The
query of the picked token meets every key: multiply number by number, add up. Divide by √H =
√{c.head_width}, so that the size of the sum does not depend on the head's width; strike out what
lies ahead;
softmax makes shares of the rest. The answer is the sum of the values in these
shares.{norm}{turned}</p>
<p class="readout" id="question"></p>
<div id="query"></div>
<div class="scroll" tabindex="0" id="scores"></div>
<div id="answer"></div></section>"""


def lens_section(journey: Journey) -> str:
    """Where the script puts the logit lens."""
    start = "the embedding alone" if journey.lens_layers[0] == 0 else "the first layer"
    return f"""<section><h2>5. What each layer would say</h2>
<p>Each layer adds to the residual stream. Stop after it, and the head already makes a distribution
of the next token: from {start} to all {journey.config.n_layers} layers (the “logit lens”). Marked:
the token that really came next.</p>
<div class="scroll lens" tabindex="0" id="lens"></div></section>"""


def numbers(journey: Journey, spelled: list[Spelled], tokenizer) -> dict:
    """What tour.js draws from."""
    ids = journey.read_ids
    following = [*ids[1:], journey.drawings[-1].token]
    words = {}
    for token in np.unique(journey.lens_ids).tolist():
        word = spell_all([token], tokenizer.decode_bytes)[0]
        words[token] = [word.text, int(word.half)]
    arrays = {name: pack(journey.joined(name)) for name in ("q", "mix")}
    arrays |= {name: pack(journey.cached(name)) for name in ("k", "v")}
    return arrays | {
        "heads": journey.config.n_heads,
        "groups": journey.config.n_heads // journey.config.kv_heads,
        "prefilled": len(journey.prompt_ids),
        "tokens": [[one.text, int(one.half), one.whole] for one in spelled[: len(ids)]],
        "scores": pack(journey.map("scores")),
        "weights": pack(journey.map("weights"), 0.0, 1.0),
        "following": following,
        "words": words,
        "lens": {
            "layers": journey.lens_layers,
            "ids": journey.lens_ids.tolist(),
            "probs": pack(journey.lens_probs, 0.0, 1.0),
        },
    }
