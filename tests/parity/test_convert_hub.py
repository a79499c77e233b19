"""Models with the hub's own config.json, made small: transformers' logits, there and back."""

import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import hub_configs  # noqa: E402
import numpy as np  # noqa: E402
import standins  # noqa: E402
import their_models  # noqa: E402  (needs torch)
from programs import call  # noqa: E402

from gpt.model import transformer  # noqa: E402

IDS = np.random.default_rng(0).integers(300, size=(2, 64))


def their_logits(folder):
    """What transformers makes of a folder, in float32."""
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    return their_models.logits_of(model, IDS)


@pytest.mark.parametrize("name", hub_configs.CONFIGS)
def test_logits_of_a_model_of_the_hub(name, tmp_path):
    c = hub_configs.small(hub_configs.CONFIGS[name])
    folder = standins.write(tmp_path / "theirs", c)
    expected = their_logits(folder)
    config, params = their_models.read(folder)
    ours = np.asarray(transformer.forward(config, params, IDS))
    assert expected.std() > 0.3, "logits so flat that they would agree by themselves"
    assert np.abs(ours - expected).max() < 1e-5 * max(1, np.abs(expected).max())
    for command in (
        ("import", folder, tmp_path / "run"),
        ("export", tmp_path / "run", tmp_path / "b"),
    ):
        done = call("gpt/convert/__main__", *command)
        assert done.code == 0, done.err
    assert np.array_equal(their_logits(tmp_path / "b"), expected)
