"""The benchmark keeps its phases apart and prints what it is asked for. Nothing here is timed: the
clock is a fake, and planted functions move it."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpt import flops, hardware
from gpt.bench import __main__ as bench
from gpt.bench import measure
from gpt.compile_log import compilations
from gpt.config import ModelConfig
from gpt.errors import UserError
from gpt.presets import PRESETS
from gpt.sampling import engine, language_model
from gpt.sharding import on_mesh

CONFIG = ModelConfig(50, context_length=64, n_layers=1, n_heads=2, d_model=8).computing_in(
    "float32"
)
CELL = measure.Cell(batch=2, prompt_length=20, new_tokens=21)
CEILINGS = {"read_bytes_per_second": 1e6, "matmul_flops_per_second": 1e7, "read_bytes": 1}


@pytest.fixture(scope="module", autouse=True)
def model():
    """The preset "small" as the benchmark loads it, once: all tests share what is compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "small", dataclasses.replace(PRESETS["tiny"], model=CONFIG))
        patch.setattr(hardware, "ceilings", lambda n_bytes, dtype: CEILINGS)
        patch.setattr(bench.cli, "prepare_jax", lambda cache: None)
        name, config, mesh, make_params = bench.choose_model(bench.Args(preset="small"))
        params = make_params()
        yield name, config, mesh, lambda: params


def figures(model):
    """The figures of CELL where a prefill takes 1 s, the first token 0.25, a chunk of steps 0.5, a
    single step 0.125, and each of the first four calls 100 more, to compile."""
    _, config, mesh, make_params = model
    now, calls = [0.0], []

    with pytest.MonkeyPatch.context() as patch, on_mesh(mesh):

        def slow(module, name, seconds):
            real = getattr(module, name)

            def planted(*args):
                compiling = 100 if len(calls) < 4 else 0
                now[0] += seconds(args) + compiling
                compilations.seconds += compiling
                calls.append(name)
                return real(*args)

            patch.setattr(module, name, planted)

        patch.setattr(hardware, "clock", lambda: now[0])
        slow(engine, "prefill", lambda _: 1.0)
        slow(measure, "start_decoding", lambda _: 0.25)
        slow(measure, "decode_chunk", lambda args: 0.125 if args[-1] == 1 else 0.5)
        return measure.measure_cell(config, make_params(), CELL, 2, CEILINGS)


def test_figures_of_known_times(model):
    """20 steps: two chunks of 16 and 4 in the loop, 20 calls from the host. What compiles is in no
    other figure. Once compiled, a measurement compiles nothing."""
    cell = figures(model)
    prefill, decode = cell["prefill"], cell["decode"]
    assert cell["compile_seconds"] >= 400
    n_flops = 2 * flops.forward_flops(CONFIG, 20, n_logit_positions=1)
    assert (cell["batch"], cell["prompt_length"], cell["new_tokens"]) == (2, 20, 21)
    assert cell["ttft_seconds"] == 1.25
    assert prefill["seconds"] == 1 and prefill["seconds_of_repeats"] == [1] * 4
    assert prefill["tokens_per_second"] == 40
    assert prefill["flops"] == n_flops and prefill["mfu"] == n_flops / 1e7
    assert decode["seconds_per_step"] == pytest.approx(0.05)
    assert decode["tokens_per_second"] == pytest.approx(40)
    assert decode["bytes_per_step"] == flops.decode_bytes(CONFIG, 2, 29)
    assert decode["mbu"] == pytest.approx(decode["bytes_per_step"] / 0.05 / 1e6)
    percentiles = [decode[f"seconds_per_step_p{p}"] for p in (50, 90, 99)]
    assert percentiles == pytest.approx([0.125] * 3)
    assert decode["host_seconds_per_step"] == pytest.approx(0.075)
    assert cell["peak_bytes"] > 2**20

    programs = compilations.programs
    figures(model)
    assert compilations.programs == programs


def test_ceilings_come_from_the_shortest_run(monkeypatch):
    """A run reads the matrix several times; a slower one must not lower the ceiling."""
    readings = iter([0, 50, 50, 53, 53, 55, 55, 59, 59, 60, 60, 68, 68, 75])
    monkeypatch.setattr(hardware, "clock", lambda: next(readings))
    assert hardware.best_seconds(lambda: None) == 1
    monkeypatch.setitem(hardware.PASSES_BYTES, "cpu", 2**20)
    monkeypatch.setattr(hardware, "timed", lambda f, *args: (0.5, f(*args)))
    assert hardware.read_rate(256 * 256 * 4) == 2**21
    assert hardware.matmul_rate.__wrapped__("float32") == 4 * 2 * 1024**3 / 0.5


def output(capsys, *argv):
    """What the benchmark prints: the table, the result, standard error."""
    assert bench.main(["--repeats", "1", *argv]) == 0
    out, err = capsys.readouterr()
    table, line = out.rstrip("\n").rsplit("\n", 1)
    return table, json.loads(line), err


@pytest.fixture
def planted(model, monkeypatch):
    """Every repeat takes a second, without being run; returns what was measured."""
    measured = []

    def repeat(config, params, cell, times):
        for seconds in (times.prefill, times.first_token, times.step, times.host_step):
            seconds.append(1.0)
        measured.append((cell.batch, cell.prompt_length))

    monkeypatch.setattr(measure, "repeat", repeat)
    monkeypatch.setattr(bench, "choose_model", lambda args: model)
    return measured


def test_the_last_line_is_the_json_that_the_file_holds(planted, tmp_path, capsys):
    """Each row is told on standard error too, after what is compiled for it. int8 weights are
    counted as such."""
    path = tmp_path / "result.json"
    argv = ["--preset", "small", "--quantize", "int8", "--batch-sizes", "2"]
    argv += ["--prompt-lengths", "32,20", "--new-tokens", "21", "--json", str(path)]
    table, result, err = output(capsys, *argv)
    n_bytes = flops.weight_bytes(CONFIG, int8=True)
    assert result == json.loads(path.read_text()) and "incomplete" not in result
    assert {"device", "jax", "model", "parameters"} <= set(result)
    assert (result["weights"], result["weight_bytes"]) == ("int8", n_bytes)
    assert f"{n_bytes / 1e3:.1f} kB of int8 weights" in table
    assert result["precision"] == "float32" and result["ceilings"] == CEILINGS
    assert [(c["batch"], c["prompt_length"]) for c in result["cells"]] == [(2, 20), (2, 32)]
    n_bytes = result["cells"][0]["decode"]["bytes_per_step"]
    assert n_bytes == flops.decode_bytes(CONFIG, 2, 29, int8=True)
    assert "batch 2, prompt 20: compiling prefill and decode\n" in err
    for cell in result["cells"]:
        assert f"{cell['prefill']['tokens_per_second']:,.0f}" in table
        assert f"batch: 2; prompt tokens: {cell['prompt_length']}; " in err


def test_a_terminal_gets_the_card_and_no_json(planted, capsys, monkeypatch):
    monkeypatch.setattr(bench.sys.stdout, "isatty", lambda: True)
    argv = ["--preset", "small", "--repeats", "1", "--batch-sizes", "2"]
    assert bench.main(argv) == 0
    plain = capsys.readouterr().out
    assert "limited by memory" in plain and "MBU, memory bandwidth utilization" in plain
    assert '"cells"' not in plain and "host-driven" not in plain and "compile" not in plain
    assert bench.main([*argv, "--verbose"]) == 0
    verbose = capsys.readouterr().out
    assert "host-driven" in verbose and "compile" in verbose and "peak" in verbose


def test_a_benchmark_that_is_stopped_leaves_what_it_measured(planted, tmp_path, monkeypatch):
    path, measure_cell = tmp_path / "result.json", measure.measure_cell

    def stop_at_eight_rows(config, params, cell, *more):
        if cell.batch == 8:
            raise KeyboardInterrupt
        return measure_cell(config, params, cell, *more)

    monkeypatch.setattr(measure, "measure_cell", stop_at_eight_rows)
    with pytest.raises(KeyboardInterrupt):
        bench.main(["--preset", "small", "--json", str(path)])
    left = json.loads(path.read_text())
    assert left["incomplete"] is True and [cell["batch"] for cell in left["cells"]] == [1]


def test_speculation_of_known_times(planted, tmp_path, monkeypatch, capsys):
    """Two rows gain 20 tokens each after the first: plainly in 20 steps and 4 seconds, and with
    proposals, of which they accept 15 and 10, in the 10 steps and 2 seconds of the slower one."""
    prompts_given = []

    def complete(model, prompts, settings):
        prompts_given.append(prompts)
        accepted = (15, 10) if settings.speculate == 3 else (0, 0)
        return [
            SimpleNamespace(
                token_ids=[1] * settings.max_new_tokens,
                decode_seconds=2.0 if settings.speculate else 4.0,
                proposed=2 * n,
                accepted=n,
            )
            for n in accepted
        ]

    monkeypatch.setattr(measure.generate, "complete", complete)
    loaded = SimpleNamespace(tokenizer=SimpleNamespace(encode_ordinary=lambda text: list(text)))
    monkeypatch.setattr(language_model, "load", lambda path, **options: loaded)
    (tmp_path / "text").write_text("abcdefgh")
    argv = ["run", "--batch-sizes", "2", "--prompt-lengths", "3", "--new-tokens", "21"]
    argv += ["--speculate", "3", "--prompt-file", str(tmp_path / "text")]
    table, result, _ = output(capsys, *argv)
    (cell,) = result["cells"]
    found, step_bytes = cell["speculation"], cell["decode"]["bytes_per_step"]
    assert prompts_given == [[["a", "b", "c"], ["d", "e", "f"]]] * 4
    assert (found["plain_tokens_per_second"], found["tokens_per_second"]) == (10, 20)
    assert (found["speedup"], found["proposed"], found["accepted"]) == (2, 50, 25)
    assert found["tokens_per_reading"] == pytest.approx(40 / 15)
    assert found["mbu"] == pytest.approx(10 * step_bytes / 2 / 1e6)
    assert found["effective_mbu"] == pytest.approx(20 * step_bytes / 2 / 1e6)
    assert "25 of 50" in table and "2.67" in table and "3 proposals in each step" in table


@pytest.mark.parametrize(
    ("context", "given", "expected"),
    [
        (1024, {}, ([128, 512], 64)),
        (256, {}, ([128], 64)),
        (150, {}, ([86], 64)),
        (4, {}, ([2], 2)),
        (256, {"prompt_lengths": "250,8"}, ([8, 250], 6)),
        (256, {"new_tokens": 200}, ([56], 200)),
    ],
)
def test_lengths_fit_the_context(context, given, expected):
    assert bench.choose_lengths(bench.Args(**given), context) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt_lengths": "60", "new_tokens": 5}, "60 tokens and 5 new ones .* context of 64"),
        ({"prompt_lengths": "8,x"}, "--prompt-lengths 8,x: expected positive integers"),
        ({"prompt_lengths": "0"}, "positive integers"),
        ({"new_tokens": 1}, "--new-tokens 1: expected at least 2"),
        ({"repeats": 0}, "--repeats is 0: expected at least 1"),
        ({"json": Path("no/such/folder/x.json")}, "--json .* does not exist"),
        ({"plot": Path("x.pdf")}, "--plot .*.svg"),
        ({"checkpoint": Path("run"), "preset": "tiny"}, "--preset cannot be combined"),
        ({"grad_accum": 2}, "--grad-accum needs --train: add it, or drop --grad-accum"),
        ({"train": True, "plot": Path("x.png")}, "--train measures .* drop --plot"),
        ({"speculate": 4, "preset": "tiny"}, "--speculate needs a trained model"),
    ],
)
def test_bad_input_is_one_line(given, message):
    args = bench.Args(**given)
    with pytest.raises(UserError, match=f"^[^\n]*{message}[^\n]*$"):
        bench.check(args)
        bench.choose_lengths(args, 64)


def test_training_figures_of_known_times(monkeypatch, capsys):
    """The clock moves by 2 seconds a step: 10 steps per repeat, tokens and FLOPs by formulas."""
    now, honest = [0.0], measure.step_functions.compile_steps

    def compile_steps(config, mesh):
        train_step, evaluate = honest(config, mesh)

        def slow(*args):
            now[0] += 2.0
            return train_step(*args)

        return slow, evaluate

    monkeypatch.setattr(measure.step_functions, "compile_steps", compile_steps)
    monkeypatch.setattr(hardware, "clock", lambda: now[0])
    argv = ["--preset", "small", "--train", "--batch-sizes", "4", "--repeats", "2"]
    table, result, _ = output(capsys, *argv)
    (cell,) = result["cells"]
    found = cell["train"]
    assert cell["batch"] == 4 and found["seconds_of_repeats"] == [2.0, 2.0]
    assert found["tokens_per_second"] == 4 * 64 / 2
    assert found["flops"] == 4 * 64 * flops.train_flops_per_token(CONFIG)
    assert found["mfu"] == pytest.approx(found["flops"] / 2 / 1e7)
    assert f"{4 * 64 / 2:,.0f}" in table


def test_a_batch_is_one_micro_batch_unless_told_otherwise(monkeypatch):
    """With this much memory the preset trains with 16 micro-batches of 32."""
    monkeypatch.setattr(hardware, "memory", lambda: (24 * 10**9, "a machine"))
    measured = []

    def measure_train_step(config, *_):
        measured.append((config.batch_size, config.grad_accum))

    monkeypatch.setattr(measure, "measure_train_step", measure_train_step)
    monkeypatch.setattr(bench, "add_cell", lambda args, result, cell: None)
    for given in ({}, {"batch_sizes": "8,32"}, {"batch_sizes": "32", "grad_accum": 4}):
        bench.measure_training(bench.Args(preset="gpt2", train=True, **given))
    assert measured == [(32, 1), (8, 1), (32, 1), (32, 4)]


def test_what_does_not_fit_is_refused_before_it_is_tried(monkeypatch):
    """A batch, or floats and int8 together while the weights are quantized."""
    memory = [10**6]
    monkeypatch.setattr(hardware, "memory", lambda: (memory[0], "this machine's memory"))
    with pytest.raises(UserError, match=r"5,000 rows of 64 tokens.* MB.*--batch-sizes"):
        measure.require_memory(CONFIG, measure.Cell(5000, 32, 32))

    small = measure.Cell(1, 4, 4, int8=True)
    memory[0] = flops.weight_bytes(CONFIG) + flops.weight_bytes(CONFIG, int8=True)
    measure.require_memory(CONFIG, small)
    memory[0] -= 1
    with pytest.raises(UserError, match="choose a smaller model"):
        measure.require_memory(CONFIG, small)


def test_formulas_are_printed_on_request(capsys):
    assert bench.main(["--formulas"]) == 0
    assert "decode_bytes: Bytes one decode step must move" in capsys.readouterr().out
