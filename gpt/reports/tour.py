"""The tour page: a prompt's way through a model, as recorded by tour_recorder.py.

This module fills in the text of tour.html. Whatever depends on the token or head that the reader
picks is painted by tour.js, from packed arrays.
"""

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import Template

import numpy as np
from rich.filesize import decimal

from gpt import flops
from gpt.reports.html import build_page, escape, read_asset, table
from gpt.reports.tour_recorder import SampledToken, TourRecord
from gpt.sampling.completion import split_end
from gpt.terminal import visible

MAX_TABLE_ROWS = 10  # likeliest tokens shown per distribution
MAX_SLOTS = 128  # cache slots shown
MAX_UINT16 = 65535

DecodeBytes = Callable[[Sequence[int]], bytes]


def build_tour(record: TourRecord, model, run_name: str) -> str:
    """The whole page. `model`: as `gpt.load` returns it."""
    decode_bytes = model.tokenizer.decode_bytes
    new_ids = [sampled.token for sampled in record.sampled]
    tokens = display_tokens([*record.prompt_ids, *new_ids], decode_bytes)
    T = len(record.prompt_ids)
    prompt = record.prompt or decode_bytes(record.prompt_ids).decode("utf-8", "replace")
    # New tokens may complete a character left unfinished by the prompt.
    _, unfinished = split_end(decode_bytes(record.prompt_ids))
    new_text = (unfinished + decode_bytes(new_ids)).decode("utf-8", "replace")

    body = Template(read_asset("tour.html")).substitute(
        prompt=escape(prompt),
        run=escape(run_name),
        step=f"{model.step:,}",
        n_parameters=f"{flops.parameters(record.config):,}",
        text=escape(record.prompt),
        new_text=escape(new_text),
        n_calls=len(record.calls),
        n_positions=len(record.read_ids),
        prompt_chips="".join(map(chip, tokens[:T], record.prompt_ids)),
        new_chips="".join(
            chip(token, token_id, is_new=True)
            for token, token_id in zip(tokens[T:], new_ids, strict=True)
        ),
        **describe_shapes(record),
        steps="".join(describe_call(record, i, tokens, decode_bytes) for i in range(len(new_ids))),
    )
    # Escape every character that could end the data's element or begin a tag.
    data = json.dumps(script_data(record, tokens, decode_bytes), separators=(",", ":"))
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    scripts = f"""<script type="application/json" id="data">{data}</script>
<script>
{read_asset("tour.js")}
</script>"""
    return build_page(f"Tour: {prompt[:60]}", body, scripts)


def script_data(
    record: TourRecord, tokens: list["DisplayToken"], decode_bytes: DecodeBytes
) -> dict:
    """What tour.js reads."""
    ids = record.read_ids
    following = [*ids[1:], record.sampled[-1].token]
    named = {*np.unique(record.lens_ids).tolist(), *following}
    words = {token: display_tokens([token], decode_bytes)[0] for token in named}
    return {
        "q": pack(record.by_position("q")),
        "k": pack(record.cached("k")),
        "v": pack(record.cached("v")),
        "mix": pack(record.by_position("mix")),
        "scores": pack(record.attention_map("scores")),
        "weights": pack(record.attention_map("weights")),
        "groups": record.config.n_heads // record.config.kv_heads,
        "prefilled": len(record.prompt_ids),
        "tokens": [[t.text, int(t.is_partial), t.characters] for t in tokens[: len(ids)]],
        "following": following,
        "words": {token: [word.text, int(word.is_partial)] for token, word in words.items()},
        "lens": {
            "layers": record.lens_layers,
            "ids": record.lens_ids.tolist(),
            "probs": pack(record.lens_probs),
        },
    }


def pack(array: np.ndarray) -> dict:
    """An array as base64, with 16 bits per number over the range of its values and 0. The error is
    at most half of `width` / 65535."""
    low = float(array.min(initial=0))
    width = float(array.max(initial=0)) - low or 1.0
    levels = np.rint((array - low) / width * MAX_UINT16).astype("<u2")
    data = base64.b64encode(levels.tobytes()).decode()
    return {"shape": list(array.shape), "low": low, "width": width, "data": data}


# Tokens as text


@dataclass(frozen=True)
class DisplayToken:
    """A token as shown. `is_partial`: it splits a character, so `text` has its bytes;
    `characters`: those it forms with its neighbors."""

    text: str
    is_partial: bool = False
    characters: str = ""


def display_tokens(ids: Sequence[int], decode_bytes: DecodeBytes) -> list[DisplayToken]:
    """A text's tokens, with spaces and line ends shown as symbols."""
    token_bytes = [decode_bytes([token]) for token in ids]
    text = b"".join(token_bytes).decode("utf-8", "surrogateescape")
    character_of_byte = [
        i for i, character in enumerate(text) for _ in character.encode("utf-8", "surrogateescape")
    ]
    shown = []
    start = 0
    for token in token_bytes:
        end = start + len(token)
        try:
            shown.append(DisplayToken(show_blanks(token.decode())))
        except UnicodeDecodeError:
            around = text[character_of_byte[start] : character_of_byte[end - 1] + 1]
            if any("\ud800" <= character <= "\udfff" for character in around):
                around = ""  # not valid UTF-8: part of no character
            escaped = show_blanks(token.decode("utf-8", "backslashreplace"))
            shown.append(DisplayToken(escaped, is_partial=True, characters=show_blanks(around)))
        start = end
    return shown


def show_blanks(text: str) -> str:
    return visible(text.translate(str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥"})))


def chip(token: DisplayToken, token_id: int | None = None, is_new: bool = False) -> str:
    """A framed token; the frame is dashed if `is_new`."""
    css_class = "chip sampled" if is_new else "chip"
    if token.is_partial:
        css_class += " bytes"
    title = f' title="part of {escape(token.characters)}"' if token.characters else ""
    number = "" if token_id is None else f"<sup>{token_id}</sup>"
    return f'<span class="{css_class}"{title}>{escape(token.text)}{number}</span>'


# Shapes


def describe_shapes(record: TourRecord) -> dict[str, str]:
    """The fields of the shapes section, as HTML: axis sizes and array shapes by their letters, and
    how positions enter."""
    c = record.config
    sizes = {
        "B": 1,
        "T": len(record.prompt_ids),
        "D": c.d_model,
        "N": c.n_heads,
        "K": c.kv_heads,
        "G": c.n_heads // c.kv_heads,
        "H": c.head_width,
        "F": c.ff_width,
        "V": c.vocab_size,
        "L": c.n_layers,
    }
    fields = {letter: f"{size:,}" for letter, size in sizes.items()}

    calls = {"prefill": record.calls[0]}
    if len(record.calls) > 1:
        calls["a decode step"] = record.calls[-1]
    fields["calls"] = "".join(f'<th scope="col">{name}</th>' for name in calls)
    for letters in ("BT", "BTD", "BTNH", "BKSH", "BKGTS", "BTF", "BV"):
        fields[letters] = ""
        for call in calls.values():
            sizes |= {"T": len(call.tokens), "S": call.n_slots}
            shape = ", ".join(str(sizes[letter]) for letter in letters)
            fields[letters] += f'<td><span class="mono">[{shape}]</span></td>'

    position, rotated = "", ""
    if c.positions == "learned":
        position = " plus a learned vector for its position"
    elif c.positions == "sinusoidal":
        position = " plus sines and cosines of its position"
    elif c.positions == "rope":
        rotated = ", then rotated by an angle proportional to the position"
    return fields | {"position": position, "rotated": rotated, "mlp": escape(c.mlp)}


# Prefill and decode


def describe_call(
    record: TourRecord, i: int, tokens: list[DisplayToken], decode_bytes: DecodeBytes
) -> str:
    """A model call and the token sampled after it, as HTML; the script shows one call at a time."""
    call, sampled = record.calls[i], record.sampled[i]
    T = len(record.prompt_ids)
    name, title = "prefill", "Prefill"
    if i > 0:
        name = f"step {i}"
        title = f"Decode step {i}: reads {tokens[T + i - 1].text}"

    # What it read from and wrote to the cache, and the cost.
    c = record.config
    n_new, n_before = len(call.tokens), call.first_position
    n_empty = call.n_slots - n_before - n_new
    kinds = ["read"] * n_before + ["written"] * n_new + [""] * n_empty
    slots = "".join(f'<span class="slot {kind}"></span>' for kind in kinds[:MAX_SLOTS])

    written_size = decimal(flops.cache_bytes(c, 1, n_new))
    if n_before == 0:
        wrote = f"slots 0 to {n_new - 1}"
        read = "nothing: the cache was empty"
        n_bytes = flops.prefill_bytes(c, 1, n_new)
    else:
        wrote = f"slot {n_before}"
        read = f"{n_before:,} positions, {decimal(flops.cache_bytes(c, 1, n_before))}"
        n_bytes = flops.decode_bytes(c, 1, n_before)
    n_flops = flops.forward_flops(c, n_new, n_before, 1)
    label = f"cache: {n_before} slots read, {n_new} written"
    return f"""<article class="step" data-name="{name}"><h3>{escape(title)}</h3>
<div class="slots" role="img" aria-label="{label}">{slots}</div>
<p>Wrote {wrote}: a key and a value in each of {c.n_layers} layers and {c.kv_heads} heads,
{written_size}. Read {read}.</p>
<p class="soft">{n_flops / n_new / 1e6:,.2f} million operations per token;
{decimal(n_bytes)} moved, weights included:
<b>{n_flops / n_bytes:,.1f} operations per byte</b>.</p>
{distribution_table(sampled, decode_bytes)}
<p>{explain_choice(sampled, tokens[T + i])}</p></article>"""


def distribution_table(sampled: SampledToken, decode_bytes: DecodeBytes) -> str:
    """The likeliest next tokens as the model predicts them and after each setting."""
    stages = sampled.stages
    top = np.argsort(-stages["the model"], kind="stable")[:MAX_TABLE_ROWS].tolist()
    if sampled.token not in top:
        top.append(sampled.token)
    rows = []
    for token in top:
        (shown,) = display_tokens([token], decode_bytes)
        row = [chip(shown, is_new=token == sampled.token)]
        row += [show_probability(probs[token]) for probs in stages.values()]
        rows.append(row)
    rows.append(["tokens left", *(f"{np.count_nonzero(probs):,}" for probs in stages.values())])
    return table(["next token", *stages], rows, "distribution")


def show_probability(p: float) -> str:
    """A probability with a bar; a dash if the token was removed."""
    if p == 0:
        return '<span class="gone">–</span>'
    text = f"{p:.1%}" if p >= 0.001 else f"{p:.0e}".replace("e-0", "e-")
    return f'<span class="share" style="--p:{100 * p:.1f}%">{text}</span>'


def explain_choice(sampled: SampledToken, shown: DisplayToken) -> str:
    """How the token was chosen from those left."""
    chosen = chip(shown, is_new=True)
    if sampled.uniform is None:
        return f"Temperature 0 takes the likeliest token, {chosen}."
    probs = list(sampled.stages.values())[-1]
    low = float(probs[: sampled.token].sum(dtype=np.float64))
    high = low + float(probs[sampled.token])
    return (
        "Laid end to end in vocabulary order, the probabilities cover 0 to 1. The "
        f"random number {sampled.uniform:.4f} falls between {low:.4f} and {high:.4f}: {chosen}."
    )
