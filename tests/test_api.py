"""The public names: load a run, generate, stream, score."""

import pydoc

import jax
import numpy as np
import pytest
from programs import run_python

import gpt


@pytest.fixture(scope="module")
def model(trained):
    return gpt.load(trained[1])


def test_every_public_name_is_there():
    """Shown by dir(), and so by TAB, and by help()."""
    assert dir(gpt) == sorted(gpt.__all__)
    text = pydoc.plain(pydoc.render_doc(gpt))
    assert "class LanguageModel" in text and "logits(" in text and "load(" in text
    for name in gpt.__all__:
        assert getattr(gpt, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = gpt.lode


def test_importing_the_package_starts_no_jax():
    """Nor does the parser of flags, or NumPy."""
    heavy = "{'jax', 'numpy', 'flax', 'optax', 'matplotlib'} & set(sys.modules)"
    code = f"import sys, gpt.cli; print({heavy}, gpt.ModelConfig().n_layers > 0)"
    code += "; print('jax' in sys.modules); gpt.load; print('jax' in sys.modules)"
    done = run_python("-c", code)
    assert done.stdout.split() == ["set()", "True", "False", "True"], done.stderr


def test_a_loaded_model_says_what_it_is(model, trained):
    assert isinstance(model, gpt.LanguageModel)
    assert (model.step, model.config.d_model, model.notes) == (12, 16, ())
    assert gpt.load(str(trained[1]), step=8).step == 8
    assert len(repr(model)) < 600  # and not every weight


def test_one_prompt_gives_one_completion_and_more_give_a_list(model):
    done = model.generate("a cat", max_new_tokens=5)
    assert isinstance(done, gpt.Completion)
    assert str(done) == "a cat" + done.text
    assert 0 < len(done.token_ids) <= 5
    assert [d.prompt for d in model.generate(["a", "b"], max_new_tokens=2)] == ["a", "b"]
    assert [d.sample for d in model.generate("a", max_new_tokens=2, num_samples=3)] == [0, 1, 2]
    assert len(model.generate(["a"], max_new_tokens=2)) == 1
    assert model.generate(max_new_tokens=2).prompt == ""
    ids = model.tokenizer.encode_ordinary("a cat")
    assert model.generate([ids], max_new_tokens=5)[0].token_ids == done.token_ids


def test_logits_and_module_are_those_that_score(model):
    score = model.score("the cat")
    # The logits after end-of-text and each token but the last predict the tokens.
    ids = [model.tokenizer.eot_token, *score.token_ids]
    for logits_TV in (model.logits(ids), model.module()(np.array([ids]))[0]):
        assert logits_TV.shape == (len(ids), model.config.vocab_size)
        logprobs_TV = jax.nn.log_softmax(np.asarray(logits_TV))
        predicted = logprobs_TV[np.arange(len(ids) - 1), score.token_ids]
        assert np.allclose(predicted, score.logprobs, atol=1e-5)
    assert np.allclose(model.logits("the cat"), model.logits(score.token_ids), atol=1e-6)


def test_a_folder_in_the_home_is_found(trained, monkeypatch):
    monkeypatch.setenv("HOME", str(trained[1].parent))
    assert gpt.load(f"~/{trained[1].name}").step == 12


def test_mistakes_are_user_errors(trained, model):
    for name in ("dtype", "weights", "quantize", "prefix"):
        with pytest.raises(gpt.UserError, match=f"{name} is 'int4': expected one of "):
            gpt.load(trained[1], **{name: "int4"})
    with pytest.raises(gpt.UserError, match="not both"):
        model.generate("a", gpt.Settings(), seed=3)
    for wrong, said in (({"seed": [1, 2]}, "an integer"), ({"temperature": "hot"}, "a number")):
        with pytest.raises(gpt.UserError, match=f"expected {said}"):
            model.generate("x", **wrong)
    with pytest.raises(gpt.UserError, match="exceeds the model's context of 16: shorten it"):
        model.logits("x" * 30)
