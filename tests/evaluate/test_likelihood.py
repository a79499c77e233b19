"""Log-likelihoods of answers: batched or one by one, on a forked cache or in one pass."""

import jax
import numpy as np
import pytest
from byte_models import CONFIG, make_model

from gpt.errors import UserError
from gpt.evaluate import likelihood
from gpt.model import transformer
from gpt.sampling import engine

forward = jax.jit(transformer.forward, static_argnums=0)
T = CONFIG.context_length


@pytest.fixture(scope="module")
def model():
    return make_model()


def random_ids(rng, length):
    return rng.integers(256, size=length).tolist()


def logprobs_after(model, ids):
    """[len(ids), V], in one full pass."""
    tokens = np.zeros((1, T), np.int32)
    tokens[0, : len(ids)] = ids
    return np.asarray(jax.nn.log_softmax(forward(CONFIG, model.params, tokens)[0]))[: len(ids)]


@pytest.fixture(scope="module")
def requests(model):
    """Contexts with one answer and with several, and too long for the model."""
    rng = np.random.default_rng(0)
    made = []
    for n_context, n_answers in ((1, 2), (T - 12, 3), (T + 20, 1)):
        context = random_ids(rng, n_context)
        made += [(context, random_ids(rng, n)) for n in (5, 1, 12)[:n_answers]]
    context = random_ids(rng, T - 13)
    likeliest = int(logprobs_after(model, context)[-1].argmax())
    return [*made, (context, [likeliest]), (context, random_ids(rng, 12))]


@pytest.fixture(scope="module")
def expected(model, requests):
    """One full pass for each request, over the last tokens that fit: the harness's own rule."""
    found = []
    for context, continuation in requests:
        ids = [*context, *continuation][-(T + 1) :]
        logprobs_PV = logprobs_after(model, ids[:-1])[-len(continuation) :]
        logprob = logprobs_PV[range(len(continuation)), continuation].sum(dtype=np.float64)
        found.append((logprob, (logprobs_PV.argmax(-1) == continuation).all()))
    return found


def by_number(model, requests, batch_size):
    found = {}
    for batch in likelihood.loglikelihoods(model, requests, batch_size):
        assert not found.keys() & batch.keys()
        found |= batch
    return [found[number] for number in range(len(requests))]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_each_is_that_of_a_pass_of_its_own(model, requests, expected, batch_size):
    found = by_number(model, requests, batch_size)
    assert [one.logprob for one in found] == pytest.approx([a for a, _ in expected], abs=3e-4)
    assert [one.is_greedy for one in found] == [is_greedy for _, is_greedy in expected]
    assert found[-2].is_greedy and not found[0].is_greedy


def test_a_shared_context_is_read_once(model, requests, watch):
    prefills = watch(engine, "prefill_in_pieces")
    shared = [request for request in requests if len(request[0]) == T - 12]
    by_number(model, shared, 4)
    assert len(shared) == 3 and [n_B.tolist() for *_, n_B in prefills] == [[T - 13]]


def test_a_long_context_of_one_answer_is_read_in_pieces(model, monkeypatch):
    request = (random_ids(np.random.default_rng(1), 90), [1, 2, 3])
    whole = by_number(model, [request], 1)
    monkeypatch.setattr(engine, "PIECE", 32)
    assert by_number(model, [request], 1)[0].logprob == pytest.approx(whole[0].logprob, abs=1e-4)


def test_an_answer_longer_than_the_context_is_refused(model):
    with pytest.raises(UserError, match=f"an answer has {T + 1} tokens, which exceeds"):
        by_number(model, [([1], [2] * (T + 1))], 1)


def test_a_rolled_text_predicts_each_token_once(model):
    """Whole windows, and a last one that ends with the text."""
    ids = random_ids(np.random.default_rng(2), 2 * T + 11)
    expected = 0.0
    for first, n_new in ((0, T), (T, T), (T + 10, 10)):
        window = np.array([ids[first : first + T]])
        logprobs_TV = jax.nn.log_softmax(forward(CONFIG, model.params, window)[0])
        targets = ids[first + 1 : first + T + 1]
        expected += sum(float(logprobs_TV[t, targets[t]]) for t in range(T - n_new, T))
    assert likelihood.rolling_loglikelihood(model, ids) == pytest.approx(expected, abs=1e-3)
    assert likelihood.rolling_loglikelihood(model, ids[:1]) == 0.0
