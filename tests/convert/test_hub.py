"""Models as the hub has them, made small: read field by field, with the logits they should give."""

import hub_configs
import numpy as np
import pytest
import standins

from gpt.convert import fields, incoming
from gpt.errors import UserError
from gpt.model import transformer

IDS = np.random.default_rng(0).integers(300, size=64)


def plainly(c):
    """The config in the words that the independent form knows."""
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or c.get("rope_theta", 10000.0)
    stretched = rope if rope.get("rope_type") == "llama3" else None
    return c | {"rope_theta": theta, "rope_scaling": stretched}


@pytest.mark.parametrize("name", hub_configs.CONFIGS)
def test_a_model_of_the_hub(name, tmp_path):
    fields.read_config(hub_configs.CONFIGS[name])  # as large as it is
    c = hub_configs.small(hub_configs.CONFIGS[name])
    weights = standins.tensors(plainly(c))
    source, _ = incoming.open_source(standins.write(tmp_path, c, weights))
    ours = transformer.forward(source.config, incoming.read_params(source), IDS[None])[0]
    exact = standins.logits(plainly(c), weights, IDS)
    assert exact.std() > 0.3
    assert np.abs(ours - exact).max() < 1e-5 * max(1, np.abs(exact).max())


def test_mistral_without_a_word_of_its_window():
    """transformers takes 4,096 where the field is absent: less than the context of v0.3."""
    c = hub_configs.CONFIGS["Mistral-7B-v0.3"]
    absent = {name: value for name, value in c.items() if name != "sliding_window"}
    with pytest.raises(UserError, match="sliding_window is 4096"):
        fields.read_config(absent)
    fields.read_config(absent | {"max_position_embeddings": 4096})
