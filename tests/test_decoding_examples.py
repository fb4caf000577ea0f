"""The examples that decode: the command line and the exported programs."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import seq2seq_fast as s2s

FOLDER = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def examples(monkeypatch):
    """The example modules, and a checkpoint of an untrained model."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import pronounce
    import pronounce_words

    yield pronounce, pronounce_words
    for name in ("pronounce", "pronounce_words", "export_step"):
        sys.modules.pop(name, None)


@pytest.fixture
def checkpoint(examples, tmp_path):
    torch.manual_seed(0)
    model = examples[0].build(24)
    with torch.no_grad():
        model.decoder.fc_out.weight.mul_(6)
        model.decoder.fc_out.bias[examples[0].EOS] += 2
    path = tmp_path / "model.pt"
    torch.save({"model": model.state_dict(), "hidden": 24}, path)
    return path


def test_the_command_line_streams_words_in_order(examples, checkpoint, monkeypatch, capsys):
    pronounce, command = examples
    monkeypatch.setattr(sys, "stdin", io.StringIO("alpha\nbeta9\nbe\n\ngamma\nAlpha\n"))
    command.main([str(checkpoint), "--batch-size", "3"])
    captured = capsys.readouterr()
    lines = [line.split("\t") for line in captured.out.splitlines()]
    assert [word for word, _ in lines] == ["alpha", "be", "gamma", "Alpha"]
    assert lines[0][1] == lines[3][1]
    model = command.load(checkpoint, "float32")
    for word, said in lines[:3]:
        assert tuple(said.split()) == pronounce.pronounce(model, [word], "cpu")[0]
    assert "beta9" in captured.err and "4 words" in captured.err


def test_a_word_waits_for_no_other(checkpoint):
    """Nor for the end of the input."""
    script = [sys.executable, FOLDER / "pronounce_words.py", checkpoint]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(script, **pipes) as command:
        for word in (b"alpha", b"beta"):
            command.stdin.write(word + b"\n")
            command.stdin.flush()
            assert command.stdout.readline().startswith(word + b"\t")
        command.stdin.write(b"ga")
        command.stdin.flush()
        command.stdin.write(b"mma")
        rest, _ = command.communicate()
    assert rest.startswith(b"gamma\t") and command.returncode == 0


def test_the_command_line_tells_several_pronunciations(examples, checkpoint, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    drawn = tmp_path / "drawn"
    arguments = ["alpha", "be", "--beam", "4", "--n-best", "3", "--scores", "--attention"]
    examples[1].main([str(checkpoint), *arguments, str(drawn)])
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["alpha"] * 3 + ["be"] * 3
    assert all(len(line) == 3 and float(line[2]) <= 0 for line in lines)
    assert {path.name for path in drawn.iterdir()} == {"alpha.png", "be.png"}
    with pytest.raises(SystemExit):
        examples[1].main([str(checkpoint), "be", "--n-best", "2"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "--batch-size: got 0, expected at least 1"),
        (["--beam", "0"], "--beam: got 0, expected 1 to 42"),
        (["--beam", "100"], "--beam: got 100, expected 1 to 42"),
        (["--beam", "3", "--n-best", "4"], "--n-best: got 4, expected 1 to 3"),
    ],
    ids=str,
)
def test_the_command_line_refuses_bad_arguments(examples, checkpoint, arguments, message, capsys):
    with pytest.raises(SystemExit):
        examples[1].main([str(checkpoint), "be", *arguments])
    assert message in capsys.readouterr().err


def test_what_is_no_checkpoint_is_refused(examples, tmp_path):
    path = tmp_path / "other.pt"
    with pytest.raises(SystemExit, match="other.pt: No such file"):
        examples[1].main([str(path), "be"])
    path.write_text("words")
    with pytest.raises(SystemExit, match="other.pt: got another file, expected a checkpoint"):
        examples[1].main([str(path), "be"])
    for other in ({"model": {}}, torch.ones(2)):
        torch.save(other, path)
        with pytest.raises(SystemExit, match="other.pt: got no 'hidden', expected a checkpoint"):
            examples[1].main([str(path), "be"])


def test_bytes_that_are_no_text_are_left_out_and_a_closed_pipe_ends_it(checkpoint):
    def run(command, text):
        script = FOLDER / "pronounce_words.py"
        return subprocess.run(
            ["bash", "-c", f"'{sys.executable}' '{script}' '{checkpoint}' {command}"],
            input=text,
            capture_output=True,
        )

    ran = run("", b"alpha\n\xff\xfe\nbe\n")
    assert ran.returncode == 0, ran.stderr
    assert [line.split(b"\t")[0] for line in ran.stdout.splitlines()] == [b"alpha", b"be"]
    assert b"left out" in ran.stderr
    ran = run("--batch-size 1 | head -n 1", b"alpha\n" * 2000)
    assert ran.stdout.startswith(b"alpha\t") and b"Traceback" not in ran.stderr


RUN = """
import sys, torch
folder, src = sys.argv[1], torch.tensor([[int(i) for i in sys.argv[2].split(",")]])
encoder, step = (torch.export.load(f"{folder}/{n}.pt2").module() for n in ("encoder", "step"))
*source, hidden, cell = encoder(src)
token, tokens = torch.tensor([1]), []
for _ in range(8):
    token, weights, hidden, cell = step(token, hidden, cell, *source)
    tokens.append(int(token))
assert not any(name.startswith("seq2seq_fast") for name in sys.modules)
print(tokens)
"""


@pytest.mark.unsanitized
@pytest.mark.filterwarnings("ignore")
def test_the_exported_step_runs_without_the_library(examples, checkpoint, tmp_path):
    import export_step

    pronounce, command = examples
    with pytest.raises(SystemExit):
        export_step.main([str(tmp_path), "--word", "it's"])
    model = command.load(checkpoint, "float32")
    src = pronounce.spelled(["gamma"], "cpu")
    export_step.export(model, src.shape[1], tmp_path)
    (row,) = export_step.decode(tmp_path, src)
    options = {"bos": pronounce.SOS, "eos": pronounce.EOS, "max_length": pronounce.LONGEST}
    want = model.generate(src, **options)
    n = int(want.lengths) - int(want.finished)
    assert row == want.tokens[0, :n].tolist()
    src_text = ",".join(str(i) for i in src[0].tolist())
    ran = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path), src_text], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    free = model.generate(src, **options | {"max_length": 8, "min_length": 8})
    told = eval(ran.stdout)
    assert told[: min(8, n)] == free.tokens[0, : min(8, n)].tolist()
    assert s2s.backends()["decode"]["cpu"]
