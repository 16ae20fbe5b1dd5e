import dataclasses

import pytest

from dsparse.errors import DsparseError
from dsparse.training.config import TrainConfig, parse_config
from dsparse.training.loop import main

REQUIRED = ["--model", "m", "--data", "a.txt", "b.txt"]


def test_every_field_is_an_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_config(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in text
        assert field.metadata["help"].split()[0] in text


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('data = ["x.txt"]\nlearning_rate = 1\nsteps = 7\nmesh = "data=2"\nresume = true\n')
    config = parse_config(["--model", "m", "--config", str(file), "--steps", "9", "--no-tensorboard"])
    assert config == TrainConfig(
        model="m", data=("x.txt",), learning_rate=1.0, steps=9, mesh="data=2", resume=True, tensorboard=False
    )
    assert isinstance(config.learning_rate, float)


def test_values_are_typed():
    config = parse_config([*REQUIRED, "--learning-rate", "3e-4", "--schedule", "linear", "--batch-size", "4"])
    assert (config.learning_rate, config.schedule, config.batch_size, config.data) == (
        3e-4,
        "linear",
        4,
        ("a.txt", "b.txt"),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat = 1.0", r"run\.toml: unknown key 'learning_rat'"),
        ("steps = 1.5", r"run\.toml: steps: expected a whole number, found 1.5"),
        ('schedule = "cubic"', "schedule: expected one of cosine, linear, constant, found 'cubic'"),
        ("steps = 0", "steps must be at least 1"),
        ("learning_rate = nan", "learning_rate must be at least 0"),
        ("batch_size = 3\ngradient_accumulation = 2", r"gradient_accumulation \(2\) does not divide batch_size \(3\)"),
        ("warmup_steps = 500", r"warmup_steps \(500\) exceeds steps"),
        ("steps = ", r"run\.toml: cannot be read as TOML"),
    ],
)
def test_bad_values_are_named(tmp_path, text, message):
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(DsparseError, match=message):
        parse_config([*REQUIRED, "--config", str(file)])


def test_a_missing_option_is_one_line_and_a_failure(capsys):
    assert main(["--model", "m"]) == 1
    printed = capsys.readouterr()
    assert printed.err == "error: training option data is missing: give --data or set it in a --config file\n"
