"""Our models against transformers' on torch, with the same weights: two readings of the same
papers, by different people, in different frameworks. Every family and variant: test_convert.py."""

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from types import SimpleNamespace  # noqa: E402

import their_models  # noqa: E402  (needs torch)

from gpt.data.tokenizers import IdTokenizer  # noqa: E402
from gpt.model import transformer  # noqa: E402
from gpt.sampling import generate  # noqa: E402
from gpt.sampling.settings import Settings  # noqa: E402
from gpt.training import loss  # noqa: E402

KINDS = {name: their_models.KINDS[name] for name in ("gpt2", "llama 3", "qwen2", "qwen3")}
WIDE = {"vocab_size": 50257, "n_embd": 768, "n_layer": 2, "n_head": 12}
KINDS["gpt2's width"] = their_models.Kind("GPT2", WIDE)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """A config, our weights, and their model that holds the same."""
    folder = tmp_path_factory.mktemp("theirs")
    wide = request.param == "gpt2's width"
    model = their_models.make(KINDS[request.param].config(), loud=0.08 if wide else 0.2)
    model.save_pretrained(folder)
    return *their_models.read(folder), model


def token_ids(config, rows, length, seed=1):
    return np.random.default_rng(seed).integers(config.vocab_size, size=(rows, length))


def test_logits(pair):
    config, params, model = pair
    ids = token_ids(config, 2, 160)
    expected = their_models.logits_of(model, ids)
    logits = jax.jit(transformer.forward, static_argnums=0)(config, params, ids)
    assert expected.std() > 0.3, "logits so flat that they would agree by themselves"
    assert np.abs(logits - expected).max() < 1e-5 * max(1, np.abs(expected).max())


def test_loss_of_labels(pair):
    """Their loss shifts the labels itself and is a mean over the predicted tokens."""
    config, params, model = pair
    ids = token_ids(config, 3, 65)
    with torch.no_grad():
        expected = model(torch.tensor(ids), labels=torch.tensor(ids)).loss.item()
    assert expected > 1
    losses, *_ = jax.jit(loss.sequence_losses, static_argnums=0)(config, params, ids)
    assert float(losses.mean()) == pytest.approx(expected, rel=1e-5)


def test_greedy_text_of_several_prompts(pair):
    """60 tokens after prompts of several lengths, read together by us and one by one by them."""
    config, params, model = pair
    prompts = [token_ids(config, 1, length, seed=length)[0].tolist() for length in (1, 33, 60)]
    letters = IdTokenizer(config.vocab_size)
    lm = SimpleNamespace(
        config=config, params=transformer.unstack(params), tokenizer=letters, mesh=None
    )
    done = generate.complete(lm, prompts, Settings(max_new_tokens=60, temperature=0))
    for prompt, completion in zip(prompts, done, strict=True):
        assert completion.token_ids == their_models.greedy(model, prompt, 60)
    assert len({token for one in done for token in one.token_ids}) > 8
